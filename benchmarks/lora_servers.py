"""What the LoRA benchmark compares: the policy, the servers of it, and the ways in which an adapter reaches them."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import torch

from twinkle_callbacks.cli.launch import TRANSFER_FLAG, current_environment, plan_launch
from twinkle_callbacks.cli.process import ServerProcess
from twinkle_callbacks.cli.serve import _claim_port

ADAPTER = "policy"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
READY_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 300.0
MAX_TOKENS = 512  # of a prompt and its answer
BUSY_PERCENT = 10.0  # of all cores, of a machine that is at rest
REST_TIMEOUT_S = 10.0


class Size(NamedTuple):
    """The benchmark's model. Heads and the feed-forward layers keep the proportions of Qwen3 0.6B at any `hidden`."""

    hidden: int
    layers: int
    vocab: int
    rank: int


def rest() -> None:
    """Waits until the cores are at rest: for a second after each call, vLLM's processes wait for more in busy loops."""
    deadline = time.monotonic() + REST_TIMEOUT_S
    while (busy := psutil.cpu_percent(interval=0.25)) > BUSY_PERCENT:
        if time.monotonic() > deadline:
            print(f"this machine is {busy:.0f} % busy with other work, so what follows is slower", file=sys.stderr)
            return


def make_policy(size: Size, folder: Path) -> Any:
    """Saves a random Qwen3 into `folder` and returns it with a LoRA on all linear layers of its blocks.

    Both are bfloat16, as in the servers, so that no way of bringing the adapter there has fewer bytes to move.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128,
        head_dim=128,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(folder)
    _tokenizer(size.vocab).save_pretrained(folder)
    lora = LoraConfig(r=size.rank, lora_alpha=2 * size.rank, target_modules=LAYERS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def _tokenizer(vocab: int) -> Any:
    """One whose words are the numbers of their tokens; vLLM's completion route does not go without."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(token): token for token in range(vocab)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0", eos_token="1")


def adapter_bytes(policy: Any) -> int:
    """Bytes of the adapter's tensors."""
    return sum(parameter.nbytes for name, parameter in policy.named_parameters() if "lora_" in name)


@torch.no_grad()
def change(policy: Any) -> None:
    """Stands for an optimizer step: gives every tensor of the adapter other values."""
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.05)


class Servers(NamedTuple):
    """The three servers of the same model, by their URLs."""

    alone: str
    file: str
    merged: str


@contextlib.contextmanager
def running(folder: Path, rank: int, logs: Path) -> Iterator[Servers]:
    """Starts the servers side by side and yields when all are ready."""
    flags = [
        *("--enforce-eager", "--dtype", "bfloat16", "--generation-config", "vllm"),
        *("--kv-cache-memory-bytes", "512M", "--max-num-seqs", "16", "--max-model-len", str(MAX_TOKENS)),
        *("--block-size", "32"),
    ]
    with_lora = [*flags, "--enable-lora", "--max-loras", "2", "--max-lora-rank", str(rank)]
    with ExitStack() as stack:
        servers = []
        for name in Servers._fields:
            arguments = flags if name == "merged" else with_lora
            server = _start(folder, arguments, name == "file", logs / f"{name}.log")
            stack.callback(server.stop)
            servers.append(server)
        for server in servers:
            server.wait_ready(READY_TIMEOUT_S)
        yield Servers(*(server.url for server in servers))


def _start(folder: Path, flags: Sequence[str], stock: bool, log: Path) -> ServerProcess:
    port = _claim_port("127.0.0.1", 0)
    command, env = plan_launch(str(folder), "127.0.0.1", port, flags, current_environment())
    if stock:  # what vLLM is without this package: no backend, no middlewares, no plugin of ours
        command = command[: command.index(TRANSFER_FLAG)]
        env = {name: value for name, value in env.items() if name != "VLLM_SERVER_DEV_MODE"}
        env |= {"VLLM_PLUGINS": "", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return ServerProcess(command, env=env, url=f"http://127.0.0.1:{port}", log_path=log)


class FileRoute:
    """What users of stock vLLM do: PEFT saves the adapter, and the server loads it from there.

    Each version has a folder of its own, since vLLM's prefix cache tells versions apart by their path. The folders are
    in memory where there is room, which is the fastest place that a trainer and a server of one machine share.
    """

    WAYS = ("load_inplace", "unload, then load")

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=CALL_TIMEOUT_S, trust_env=False)
        memory = Path("/dev/shm")  # noqa: S108 -- a folder of a random name is made in it
        roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30
        self.root = Path(tempfile.mkdtemp(prefix="bench-lora-", dir=memory if roomy else None))
        self._versions = 0
        self._folder: Path | None = None

    def bring(self, policy: Any, way: str) -> dict[str, float]:
        """Brings the adapter as it is now to the server; returns the seconds of each step."""
        self._versions += 1
        before, self._folder = self._folder, self.root / str(self._versions)
        began = time.perf_counter()
        policy.save_pretrained(self._folder, save_embedding_layers=False)
        saved = time.perf_counter()
        load = {"lora_name": ADAPTER, "lora_path": str(self._folder)}
        if way == "load_inplace":
            load["load_inplace"] = True
        elif before is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": ADAPTER})
        self._post("/v1/load_lora_adapter", load)
        ended = time.perf_counter()
        if before is not None:
            shutil.rmtree(before)
        return {"seconds": ended - began, "save_s": saved - began, "load_s": ended - saved}

    @property
    def saved_bytes(self) -> int:
        """Bytes of the files of one version."""
        assert self._folder is not None
        return sum(file.stat().st_size for file in self._folder.iterdir())

    def close(self) -> None:
        self._client.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def _post(self, path: str, body: dict[str, Any]) -> None:
        response = self._client.post(path, json=body)
        if response.status_code != httpx.codes.OK:
            raise RuntimeError(f"{path} answered {response.status_code}: {response.text[:500]}")


class Answer(NamedTuple):
    """What a server answered to some prompts: tokens and their log-probabilities, and the seconds that it took."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    seconds: float


def ask(url: str, model: str, prompts: list[list[int]], tokens: int) -> Answer:
    """All prompts in one request; greedy, and `tokens` tokens each."""
    body = {
        "model": model,
        "prompt": prompts,
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with httpx.Client(timeout=CALL_TIMEOUT_S, trust_env=False) as client:
        began = time.perf_counter()
        response = client.post(f"{url}/v1/completions", json=body)
        seconds = time.perf_counter() - began
    if response.status_code != httpx.codes.OK:
        raise RuntimeError(f"{url} answered {response.status_code}: {response.text[:500]}")
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    return Answer(
        [choice["token_ids"] for choice in choices],
        [choice["logprobs"]["token_logprobs"] for choice in choices],
        seconds,
    )
