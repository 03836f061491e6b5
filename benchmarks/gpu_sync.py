"""What `bench_gpu.py` measures with a real vLLM: the ways to bring weights into it, their seconds and their memory."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import NotRunError, case, median_and_spread

GIB = 1 << 30
WARM_ROUNDS = 2
PUSHES = 2  # measured in a row, of each way, in each round
PACKED_BUFFER_BYTES = 2 * GIB  # vLLM's default of 1 GiB refuses the embeddings of the larger models
COPY_BUFFER_BYTES = 4 * GIB  # far above any cache
KV_CACHE_BYTES = GIB // 2
MARGIN_BYTES = 3 * GIB  # CUDA's context, activations while vLLM profiles itself, and fragmentation
TOKENS = 128
TIMEOUT_S = 60.0


class Shape(NamedTuple):
    """Of a Qwen3; what is not here is the same for all of them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tied: bool = False
    vocab: int = 151_936


MODELS = {
    "0.6B": Shape(1024, 3072, 28, 16, tied=True),
    "8B": Shape(4096, 12_288, 36, 32),
    "32B": Shape(5120, 25_600, 64, 64),
}
Series = dict[str, list[float]]


class Way:
    """One way to bring the policy's weights somewhere. In use as a context manager, for some pushes in a row."""

    def __init__(self, name: str, push: Callable[[], Any], use: Callable[[], AbstractContextManager[Any]]) -> None:
        self.name, self.push, self.use = name, push, use


def run_sync(model: str, bucket_size_mb: int, rounds: int, attention_backend: str | None) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(MODELS[model])
        config.save_pretrained(folder)
        nbytes = bytes_of(config)
        needed, (free, _) = 2 * nbytes + MARGIN_BYTES + KV_CACHE_BYTES + COPY_BUFFER_BYTES, torch.cuda.mem_get_info()
        if free < needed:
            raise NotRunError(
                f"the trainer and vLLM need {needed / 1e9:.0f} GB of GPU memory, and {free / 1e9:.0f} GB are free"
            )
        policy = make_policy(config, "cuda")
        settings = {"attention_backend": attention_backend} if attention_backend else {}
        comparison = Comparison(policy, Path(folder), bucket_size_mb, rounds, settings)
        comparison.run()
        return comparison.cases(f"{model} ipc")


def make_config(shape: Shape) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )


def make_policy(config: Any, device: str) -> torch.nn.Module:
    """Random weights of that configuration, made where they stay."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    with torch.device(device):
        policy: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return policy


def bytes_of(config: Any) -> int:
    return sum(parameter.nbytes for parameter in make_policy(config, "meta").parameters())


@contextmanager
def serving(folder: Path, backend: str, nbytes: int, settings: dict[str, Any]) -> Iterator[Any]:
    """A vLLM with an engine process of its own. Only the native backend is allowed to unpickle what it gets."""
    from vllm import LLM

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1" if backend == "ipc" else "0"
    _, total = torch.cuda.mem_get_info()
    llm = LLM(
        str(folder),
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=TOKENS,
        max_num_seqs=4,
        max_num_batched_tokens=TOKENS,
        gpu_memory_utilization=(nbytes + KV_CACHE_BYTES + GIB) / total,  # what must be free when it starts
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        weight_transfer_config={"backend": backend},
        **settings,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


class Comparison:
    """All ways, in turn. What was measured is in `series` by way, in `phases` by way and phase, and in `memory`."""

    def __init__(
        self, policy: torch.nn.Module, folder: Path, bucket_size_mb: int, rounds: int, settings: dict[str, Any]
    ) -> None:
        self._policy, self._folder, self._settings = policy, folder, settings
        self._bucket_size_mb, self._rounds = bucket_size_mb, rounds
        self._versions = itertools.count(1)
        self.nbytes = sum(parameter.nbytes for parameter in policy.parameters())
        self.order = "all ways in turn"
        self.series: Series = defaultdict(list)
        self.phases: dict[str, Series] = defaultdict(lambda: defaultdict(list))
        self.memory: dict[str, dict[str, float]] = {}
        self.not_measured: dict[str, str] = {}  # why, by way
        self._answers: dict[str, list[int]] = {}

    def run(self) -> None:
        copy = self._copy()
        with self._serving("twinkle") as llm:
            ours = [self._ours(llm, verify) for verify in ("off", "digest")]
            self._measure_memory(ours)
            free, _ = torch.cuda.mem_get_info()
            if free > self.nbytes + MARGIN_BYTES + KV_CACHE_BYTES + PACKED_BUFFER_BYTES:
                with self._serving("ipc") as native_llm:
                    native = self._natives(native_llm)
                    self._measure_memory(native)
                    self._take_turns([*ours, *native, copy])
                    self._note_answer("native", native_llm)
            else:
                self.order = "native after ours, as both vLLMs do not fit beside the trainer"
                self._take_turns([*ours, copy])
                del copy  # the next vLLM needs its memory
                torch.cuda.empty_cache()
            self._note_answer("ours", llm)
        if "native" not in self._answers:
            self._take_native_turns()

    def _take_native_turns(self) -> None:
        """One way after the other. One that fails, such as for want of memory, is the last, and costs no result."""
        name = "native"
        try:
            with self._serving("ipc") as llm:
                for way in self._natives(llm):
                    name = way.name
                    self._measure_memory([way])
                    self._take_turns([way])
                    self._note_answer("native", llm)
        except Exception as error:  # vLLM tells what happened in its process by text alone
            traceback.print_exc()
            self.not_measured[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            self.series.pop(name, None)

    def _serving(self, backend: str) -> AbstractContextManager[Any]:
        return serving(self._folder, backend, self.nbytes, self._settings)

    def _ours(self, llm: Any, verify: str) -> Way:
        """Opens anew for its turns, as a worker is in one synchronizer's group at a time; the first sync is no turn."""
        from twinkle_callbacks import WeightSynchronizer
        from twinkle_callbacks.rollouts import LocalRollout

        sync = WeightSynchronizer(
            self._policy,
            rollouts=LocalRollout(llm),
            engine="ipc",
            verify=verify,
            bucket_size_mb=self._bucket_size_mb,
            timeout_s=TIMEOUT_S,
        )
        return Way(f"ours, {verify}", lambda: sync.push(version=next(self._versions)), lambda: sync)

    def _natives(self, llm: Any) -> list[Way]:
        """As the examples of vLLM 0.26 do it."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

        llm.init_weight_transfer_engine({"init_info": {}})

        def send(info: Any) -> None:
            llm.update_weights({"update_info": {name: getattr(info, name) for name in info.__dataclass_fields__}})

        def way(packed: bool) -> Way:
            arguments = IPCTrainerSendWeightsArgs(
                send_mode=send, packed=packed, packed_buffer_size_bytes=PACKED_BUFFER_BYTES
            )

            def push() -> None:
                llm.start_weight_update()
                IPCWeightTransferEngine.trainer_send_weights(self._policy.named_parameters(), arguments)
                llm.finish_weight_update()

            return Way(f"native, {'packed' if packed else 'unpacked'}", push, nullcontext)

        return [way(packed=False), way(packed=True)]

    def _copy(self) -> Way:
        buffer = torch.empty(min(self.nbytes, COPY_BUFFER_BYTES), dtype=torch.uint8, device="cuda")
        sources = [parameter.detach().view(-1).view(torch.uint8) for parameter in self._policy.parameters()]

        def push() -> None:
            start = 0
            for source in sources:
                if start + source.numel() > buffer.numel():
                    start = 0
                buffer[start : start + source.numel()].copy_(source, non_blocking=True)
                start += source.numel()

        return Way("copy", push, nullcontext)

    def _take_turns(self, ways: list[Way]) -> None:
        for round_ in range(WARM_ROUNDS + self._rounds):
            for way in ways[round_ % len(ways) :] + ways[: round_ % len(ways)]:
                with way.use():
                    for _ in range(PUSHES):
                        seconds, report = timed(way.push)
                        if round_ >= WARM_ROUNDS:
                            self._note(way.name, seconds, report)

    def _note(self, way: str, seconds: float, report: Any) -> None:
        self.series[way].append(seconds)
        if report is None:
            return
        phases = {name: getattr(report, name) for name in ("gather_s", "transfer_s", "commit_s")}
        phases["start_s"] = report.seconds - sum(phases.values())
        phases["worker_commit_s"] = report.replicas[0].commit_s
        for name, value in phases.items():
            self.phases[way][name].append(value)

    def _measure_memory(self, ways: list[Way]) -> None:
        """Before anything else: what was taken once is not seen when it is taken again."""
        for way in ways:
            peaks: dict[str, float] = {}
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            free, held = free_bytes(), torch.cuda.memory_allocated()
            with WatchedMemory() as first, way.use():
                way.push()
            with way.use(), WatchedMemory() as later:
                way.push()
            peaks["first_peak_extra_mb"] = (free - first.lowest) / 1e6
            peaks["peak_extra_mb"] = (free - later.lowest) / 1e6
            peaks["trainer_peak_extra_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6
            torch.cuda.empty_cache()
            peaks["left_extra_mb"] = (free - free_bytes()) / 1e6
            self.memory[way.name] = peaks

    def _note_answer(self, whose: str, llm: Any) -> None:
        self._answers[whose] = answer(llm)

    def cases(self, name: str) -> list[dict[str, Any]]:
        import vllm

        native = {way: times for way, times in self.series.items() if way.startswith("native")}
        faster = min(native, key=lambda way: statistics.median(native[way])) if native else "copy"
        shared = {
            "naive_s": {way: median_and_spread(times) for way, times in native.items()},
            "copy_s": median_and_spread(self.series["copy"]),
            "order": self.order,
            "same_answers": self._answers["ours"] == self._answers["native"] if native else None,
            "tensors": len(list(self._policy.parameters())),
            "bucket_size_mb": self._bucket_size_mb,
            "allowed_extra_mb": 4 * self._bucket_size_mb * (1 << 20) / 1e6,
            "native_memory": {way: self.memory[way] for way in native},
            "not_measured": self.not_measured,
            "vllm": vllm.__version__,
        }
        return [
            case(
                name if verify == "off" else f"{name}, {verify}",
                self.series[f"ours, {verify}"],
                f"vLLM's {faster.replace('native', 'native ipc')}" if native else "a copy on the GPU",
                self.series[faster],
                self.nbytes,
                verify=verify,
                phases={p: median_and_spread(t) for p, t in self.phases[f"ours, {verify}"].items()},
                **self.memory[f"ours, {verify}"],
                **shared,
            )
            for verify in ("off", "digest")
        ]


def timed(push: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = push()
    torch.cuda.synchronize()
    return time.perf_counter() - began, result


def free_bytes() -> int:
    """Of the whole GPU."""
    return int(torch.cuda.mem_get_info()[0])


class WatchedMemory:
    """The lowest free memory of the GPU while in this context, as often as the driver tells it."""

    def __enter__(self) -> WatchedMemory:
        self.lowest = free_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.0005):
            self.lowest = min(self.lowest, free_bytes())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def answer(llm: Any) -> list[int]:
    """Greedy tokens, which tell apart policies that differ."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids)
