"""Contract: an engine lasts through hundreds of syncs and many groups, and a call out of place is a clear error."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import peak_memory, reset_peak_memory
from tests.distributed.engine_contract import KIB, MIB, Rank, Scenarios, expect, outcome_of, pause, receive, send
from tests.unit.engine_streams import picture
from twinkle_callbacks import errors
from twinkle_callbacks.engines import CheckpointEngine

scenario = Scenarios()
WARM_SYNCS, SYNCS = 20, 200
WARM_GROUPS, GROUPS = 3, 15
WARM_GROUPS_ON_GPU, GROUPS_ON_GPU = 20, 32  # NCCL's host memory grows with its first fifteen, then no more
SLACK_MIB = 6.0


class Usage(NamedTuple):
    """What this process holds of the machine."""

    resident_mib: float
    gpu_mib: float
    threads: int
    descriptors: int

    @classmethod
    def now(cls) -> Usage:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        threads, descriptors = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
        resident_mib = pages * os.sysconf("SC_PAGE_SIZE") / MIB
        return cls(resident_mib, torch.cuda.memory_allocated() / MIB, threads, descriptors)

    def assert_flat(self, later: Usage) -> None:
        assert later.resident_mib - self.resident_mib < SLACK_MIB, f"{self} became {later}"
        assert later.gpu_mib - self.gpu_mib < SLACK_MIB, f"{self} became {later}"
        assert later.threads <= self.threads, f"{self} became {later}"
        assert later.descriptors <= self.descriptors, f"{self} became {later}"


def settled(like: Usage) -> Usage:
    """The usage once threads and connections of a finalized group are gone, or after five seconds."""
    deadline = time.monotonic() + 5
    while (now := Usage.now()).threads > like.threads or now.descriptors > like.descriptors:
        if time.monotonic() > deadline:
            break
        pause(0.05)
    return now


@scenario
def two_hundred_syncs_take_no_more_than_twenty(rank: Rank) -> None:
    full = rank.stream([1 * MIB, 12, 0, *[4 * KIB] * 40, 90 * KIB, 600 * KIB])
    adapter = rank.stream([4 * KIB] * 20, seed=1)
    engine = rank.join(bucket_size=128 * KIB)
    before = None
    for sync in range(SYNCS):
        stream = adapter if sync % 5 == 4 else full
        if rank.is_master:
            send(engine, stream)
        elif sync % 50 == 49:
            assert picture(receive(engine)) == picture(stream)
        else:
            assert len(receive(engine)) == len(stream)
        if sync + 1 == WARM_SYNCS:
            before = Usage.now()
    assert before is not None
    before.assert_flat(Usage.now())


def start_peak(rank: Rank) -> int:
    """Bytes in use where the engine's buffers are, from which on the peak counts."""
    if rank.case.device == "cpu":
        return reset_peak_memory()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_since(rank: Rank) -> int:
    return peak_memory() if rank.case.device == "cpu" else torch.cuda.max_memory_allocated()


@scenario
def extra_memory_is_two_buckets_and_the_largest_tensor(rank: Rank) -> None:
    bucket, largest = 4 * MIB, 48 * MIB
    weight = rank.tensor(torch.float32, (largest // 4,), 0)

    def model() -> Iterator[tuple[str, torch.Tensor]]:
        for layer in range(3):
            yield f"layers.{layer}.experts.gate_up_proj", weight
            yield f"layers.{layer}.experts.down_proj", weight.view(2, -1).t()

    async def use() -> None:
        async for _, tensor in engine.receive_weights():
            assert tensor.numel() == largest // 4

    engine = rank.join(bucket_size=bucket)
    before = start_peak(rank)
    asyncio.run(engine.send_weights(model()) if rank.is_master else use())
    extra = (peak_since(rank) - before) / MIB
    allowed = (2 * bucket + largest) / MIB + SLACK_MIB
    assert extra < allowed, f"{extra:.0f} MiB more at the peak, {allowed:.0f} are allowed"


def assert_groups_leave_nothing(rank: Rank, engine: CheckpointEngine, use: Callable[[], None]) -> None:
    """Many groups, one after another, each used and left, take no more than a few."""
    before = None
    warm, groups = (WARM_GROUPS, GROUPS) if rank.case.device == "cpu" else (WARM_GROUPS_ON_GPU, GROUPS_ON_GPU)
    for group in range(groups):
        rank.join(engine=engine, group=f"group/{group}")
        use()
        engine.finalize()
        rank.meet(f"left/{group}")
        if group + 1 == warm:
            before = Usage.now()
    assert before is not None
    before.assert_flat(settled(before))


@scenario
def groups_made_and_left_again_leave_nothing_behind(rank: Rank) -> None:
    stream = rank.stream([100, 90 * KIB, 2 * MIB])
    engine = rank.engine()

    def carry() -> None:
        if rank.is_master:
            send(engine, stream)
        else:
            assert picture(receive(engine)) == picture(stream)

    assert_groups_leave_nothing(rank, engine, carry)


@scenario
def groups_that_failed_leave_nothing_behind(rank: Rank) -> None:
    engine = rank.engine()

    def fail() -> None:
        outcome = outcome_of(lambda: send(engine, [("a", None)]) if rank.is_master else receive(engine))
        expect(outcome, errors.SourceError, "'a'")

    assert_groups_leave_nothing(rank, engine, fail)


@scenario
def group_lets_go_of_its_port(rank: Rank) -> None:
    import socket

    engine = rank.engine()
    metadata = engine.prepare()
    engine.finalize()
    if "port" in metadata:
        refused = outcome_of(lambda: socket.create_connection((metadata["host"], metadata["port"]), timeout=5))
        expect(refused, ConnectionRefusedError)


@scenario
def finalize_is_allowed_at_any_time_and_leads_back_to_the_start(rank: Rank) -> None:
    engine = rank.engine()
    engine.finalize()
    for group in ("first", "second"):
        engine.prepare()
        engine.finalize()
        engine.finalize()
        rank.join(engine=engine, group=group)
        outcome = outcome_of(lambda: send(engine, rank.stream([100])) if rank.is_master else receive(engine))
        assert outcome.error is None
        engine.finalize()
        engine.finalize()


@scenario
def finalize_does_not_mind_that_the_peers_are_gone(rank: Rank) -> None:
    engine = rank.join()
    rank.meet("joined")
    if rank.is_master:
        engine.finalize()
        rank.tell("left")
    rank.hear("left")
    pause(0.2)
    assert outcome_of(engine.finalize).error is None


@scenario
def calls_out_of_place_are_clear_errors(rank: Rank) -> None:
    engine = rank.engine()
    expect(outcome_of(lambda: send(engine, [])), errors.EngineError, "init_process_group()")
    if not rank.is_master:
        expect(outcome_of(lambda: receive(engine)), errors.EngineError, "init_process_group()")
    metadata = engine.prepare()
    if rank.is_master:
        expect(outcome_of(engine.prepare), errors.EngineError, "prepare() was called already", "finalize()")
        rank.tell("metadata", metadata)
    metadata = rank.hear("metadata")
    engine.init_process_group(rank.rank, 3, master_metadata=metadata)
    rank.meet("joined")
    expect(outcome_of(engine.prepare), errors.EngineError, "finalize()")
    twice = outcome_of(lambda: engine.init_process_group(rank.rank, 3, master_metadata=metadata))
    expect(twice, errors.EngineError, f"rank {rank.rank}", "finalize()")
    backwards = outcome_of(lambda: receive(engine) if rank.is_master else send(engine, []))
    expect(backwards, errors.EngineError)
    engine.finalize()
    for call in (lambda: send(engine, []), lambda: receive(engine), lambda: engine.post_receipt("joined", b"")):
        expect(outcome_of(call), errors.EngineError, "init_process_group()")


@scenario
def master_alone_sends_to_nobody(rank: Rank) -> None:
    if rank.is_master:
        engine = rank.join(1)
        asyncio.run(engine.send_weights(iter(rank.stream([100, 90 * KIB]))))
        assert engine.stats is not None
        assert engine.stats.tensors == 2


if __name__ == "__main__":
    scenario.run()
