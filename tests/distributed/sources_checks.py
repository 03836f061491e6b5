"""What every source must do on a trained policy, whatever shards it: checked on each rank, against a single process."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from tests.distributed.sources_trained import Tensors, Trained
from twinkle_callbacks.sources import WeightSource

LEADER = 0


# What the checkpoint of a single process has


def saved(policy: Any) -> Tensors:
    """The files of `save_pretrained`; of a `PeftModel`, those of its merged policy."""
    if hasattr(policy, "merge_and_unload"):
        policy = policy.merge_and_unload(safe_merge=True)
    return _files_of(policy)


def saved_adapter(policy: Any) -> Tensors:
    """The file of an adapter, as PEFT saves it and vLLM loads it."""
    return _files_of(policy)


def _files_of(policy: Any) -> Tensors:
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        tensors: Tensors = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(file)
    return tensors


def filled(fresh: nn.Module, full: Tensors) -> nn.Module:
    """A policy that was never sharded, with the values that the framework itself gathered, in its dtypes."""
    for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]:
        if name in full or isinstance(tensor, nn.Parameter):
            tensor.data = full[name]
    return fresh


# What a stream may not touch


class Held(NamedTuple):
    """One tensor as a rank holds it: where, what, and whether it trains."""

    address: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: bytes


def snapshot(trained: Trained) -> tuple[dict[str, Held], dict[str, bool]]:
    """Everything that this rank holds of weights and optimizer state, and which parameters train."""
    memory = trained.held() | {f"optimizer state {name}": tensor for name, tensor in trained.optimizer_state().items()}
    held = {
        name: Held(tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, _bytes(tensor))
        for name, tensor in memory.items()
    }
    return held, {name: parameter.requires_grad for name, parameter in trained.policy.named_parameters()}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_untouched(before: Any, after: Any) -> None:
    (held, trains), (held_after, trains_after) = before, after
    assert list(held) == list(held_after)
    for name, was in held.items():
        now = held_after[name]
        changed = [field for field, old, new in zip(Held._fields, was, now, strict=True) if old != new]
        assert not changed, f"the stream changed {', '.join(changed)} of {name}"
    assert trains == trains_after, "the stream changed requires_grad"


# The stream itself


class Drained(NamedTuple):
    """A stream as this rank saw it, and what was announced."""

    specs: list[Any]
    pairs: list[tuple[str, torch.Tensor]]
    plain: bool


def drained(source: WeightSource) -> Drained:
    """Collective, like the stream; checks nothing, so that the ranks stay together whatever is wrong on one."""
    specs = [(spec.name, spec.dtype, tuple(spec.shape)) for spec in source.specs()]
    pairs, plain = [], True
    for name, tensor in source.stream():
        plain &= not (isinstance(tensor, DTensor) or tensor.requires_grad)
        pairs.append((name, tensor.clone()))
    return Drained(specs, pairs, plain)


def assert_announced(got: Drained) -> None:
    """Rank 0 gets what `specs()` says, each name once, plain and detached; the others nothing."""
    streamed = [(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in got.pairs]
    announced = got.specs if dist.get_rank() == LEADER else []
    odd = [pair for pair in [*streamed, *announced] if (pair in streamed) != (pair in announced)]
    assert streamed == announced, f"{len(streamed)} streamed, {len(announced)} announced; odd: {odd[:3]}"
    assert got.plain, "a tensor is a DTensor or attached to the graph"
    assert len(dict(got.pairs)) == len(got.pairs), "a name came twice"


def assert_equal(got: Tensors, want: Tensors, dtype: torch.dtype | None) -> None:
    assert set(got) == set(want), f"names: {_some(set(got) ^ set(want))}"
    wrong = []
    for name, tensor in got.items():
        wanted = want[name] if dtype is None else want[name].to(dtype)
        assert tensor.dtype == wanted.dtype, f"{name}: {tensor.dtype}, not {wanted.dtype}"
        assert tensor.shape == wanted.shape, f"{name}: {tuple(tensor.shape)}, not {tuple(wanted.shape)}"
        if _bytes(tensor) != _bytes(wanted):
            wrong.append(f"{name} (by up to {(tensor.float() - wanted.float()).abs().max():.3g})")
    assert not wrong, f"{len(wrong)} of {len(got)} differ: {_some(wrong)}"


def _some(texts: Iterable[str]) -> str:
    return ", ".join(sorted(texts)[:4])


def conforms(
    trained: Trained,
    fresh: Callable[[], nn.Module],
    open_stream: Callable[[Any, torch.dtype | None], WeightSource],
    want: Callable[[Any], Tensors],
) -> None:
    """Streams in the policy's own dtype and in bfloat16, twice each, and compares bit for bit on rank 0.

    Everything collective comes first.
    """
    sources = {dtype: open_stream(trained.model, dtype) for dtype in (None, torch.bfloat16)}
    before = snapshot(trained)
    got = [(dtype, drained(source)) for dtype, source in sources.items() for _ in range(2)]
    after = snapshot(trained)
    full = trained.full()
    announced: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(announced, [stream.specs for _, stream in got])
    assert all(each == announced[LEADER] for each in announced), "the ranks disagree on specs()"
    assert_untouched(before, after)
    for _, stream in got:
        assert_announced(stream)
    if dist.get_rank() == LEADER:
        wanted = want(filled(fresh(), full))
        for dtype, stream in got:
            assert_equal(dict(stream.pairs), wanted, dtype)


# What the ranks have to say


def run_all(cases: Mapping[str, Callable[[], None]], timeout_s: float) -> NoReturn:
    """Runs every case on this rank, whatever fails, and ends the process.

    Prints `result CASE | ok` for each, or the first error of any rank. All ranks go on together.

    Args:
        cases: what to run, in order, by its name.
        timeout_s: deadline of a collective.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    failed = False
    for case, run in cases.items():
        outcome = "ok"
        try:
            run()
        except BaseException as error:  # every case has its say; the test fails for any
            traceback.print_exc()
            outcome = f"{type(error).__name__}: {error}".splitlines()[0]
        outcome = _of_all_ranks(case, outcome)
        print(f"result {case} | {outcome}", flush=True)
        failed |= outcome != "ok"
    dist.destroy_process_group()
    sys.exit(failed)


def _of_all_ranks(case: str, outcome: str) -> str:
    """The first outcome that is not ok. Through the store: a collective would meet those that a rank left behind."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{case}/{dist.get_rank()}", outcome)
    outcomes = [store.get(f"{case}/{rank}").decode() for rank in range(dist.get_world_size())]
    return next((f"rank {rank}: {each}" for rank, each in enumerate(outcomes) if each != "ok"), "ok")
