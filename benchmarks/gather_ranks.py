"""One trainer rank of `bench_gather.py`: our stream and the naive ways of one kind of sharding, in turn."""

from __future__ import annotations

import gc
import os
import statistics
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

LEADER = 0
OURS = "ours"
GROUP_TIMEOUT_S = 120.0
BUCKET_BYTES = 32 << 20


class Case(NamedTuple):
    """What is measured: a policy (see `gather_models.build`), and under which name."""

    name: str
    kind: str
    policy: str
    layers: int | None = None
    vocab: int = 32_000


def run(rank: int, world_size: int, port: int, cases: list[Case], rounds: int, link: Connection, log: Path) -> None:
    """Measures every case; rank 0 sends `("round", name)` after each round and `("case", result)` after each case.

    Whatever the frameworks print goes to `log`.
    """
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))
        for case in cases:
            result = _measure(case, rounds, link)
            if rank == LEADER:
                link.send(("case", result))
            gc.collect()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        raise


def _measure(case: Case, rounds: int, link: Connection) -> dict[str, Any]:
    import torch.distributed as dist

    from benchmarks.gather_models import build
    from benchmarks.gather_naive import ways
    from tests.distributed.sources_sharding import shard
    from twinkle_callbacks.sources import open_source

    policy = build(case.policy, case.layers, case.vocab)
    trained = shard(case.kind, policy.module)
    source = _adapter_source(trained.model) if policy.is_adapter else open_source(trained.model)
    naive = ways(case.kind, policy, trained.model)
    contenders = {OURS: source.stream, **naive}
    digests = {name: _digest(contender()) for name, contender in contenders.items()}
    if dist.get_rank() == LEADER:
        odd = [name for name in naive if digests[name] != digests[OURS]]
        assert not odd, f"{case.name}: {OURS} and {', '.join(odd)} do not deliver the same tensors"
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = dict.fromkeys(contenders, 0)
    for number in range(rounds):
        for name in list(contenders) if number % 2 == 0 else reversed(contenders):
            took, peak = _timed(contenders[name])
            seconds[name].append(took)
            peaks[name] = max(peaks[name], peak)
        if dist.get_rank() == LEADER:
            link.send(("round", case.name))
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, peaks)
    return _result(case, source.specs(), seconds, everyones, _largest_bytes(policy))


def _adapter_source(model: Any) -> Any:
    from twinkle_callbacks.sources.adapter import AdapterSource

    return AdapterSource(model)


def _digest(stream: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """What a stream delivers, bit for bit, by name; nothing on ranks other than 0."""
    import torch
    import torch.distributed as dist

    digests = {}
    for name, tensor in stream:
        if dist.get_rank() == LEADER:
            data = tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests[name] = f"{tensor.dtype} {tuple(tensor.shape)} {xxh3_128_hexdigest(data)}"
    return digests


def _timed(contender: Any) -> tuple[float, int]:
    """Seconds until every rank is through, and this rank's peak extra bytes."""
    import torch
    import torch.distributed as dist

    from benchmarks.common import peak_memory, reset_peak_memory

    gc.collect()
    dist.barrier()
    before = reset_peak_memory()
    began = time.perf_counter()
    with torch.no_grad():
        for _ in contender():
            pass
    dist.barrier()
    return time.perf_counter() - began, peak_memory() - before


def _largest_bytes(policy: Any) -> int:
    """Bytes of the largest tensor that is gathered, which is also the largest unit: no case merges."""
    parameters = policy.twin.parameters() if not policy.is_adapter else policy.module.parameters()
    wanted = [p for p in parameters if p.requires_grad] if policy.is_adapter else list(parameters)
    sizes = [getattr(p, "ds_numel", p.numel()) * p.element_size() for p in wanted]
    return max(sizes)


def _result(
    case: Case, specs: list[Any], seconds: dict[str, list[float]], peaks: list[dict[str, int]], largest_bytes: int
) -> dict[str, Any]:
    from benchmarks.common import case as entry
    from twinkle_callbacks.buckets.packing import dtype_of, nbytes_of

    naive = {name: statistics.median(took) for name, took in seconds.items() if name != OURS}
    best = min(naive, key=lambda name: naive[name])
    worst = {name: max(rank[name] for rank in peaks) / 1e6 for name in seconds}
    return entry(
        case.name,
        seconds[OURS],
        best,
        seconds[best],
        sum(nbytes_of(dtype_of(spec.dtype), tuple(spec.shape)) for spec in specs),
        tensors=len(specs),
        naive_s=naive,
        peak_extra_mb=worst[OURS],
        peak_extra_mb_of_rank_0=peaks[LEADER][OURS] / 1e6,
        naive_peak_extra_mb={name: worst[name] for name in naive},
        allowed_extra_mb=(2 * max(BUCKET_BYTES, largest_bytes) + largest_bytes) / 1e6,
        largest_tensor_mb=largest_bytes / 1e6,
    )
