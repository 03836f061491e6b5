"""Contract: what the master's iterable yields is what receivers yield, bit for bit, whatever it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.engine_contract import (
    KIB,
    MIB,
    TOKEN,
    NamedTensors,
    Rank,
    Scenarios,
    expect,
    longest_gap_while,
    outcome_of,
    pause,
    receive,
    send,
)
from tests.unit.engine_streams import DTYPES, LAYOUTS, picture
from twinkle_callbacks.errors import DeadlineError, EngineError

scenario = Scenarios()
SHAPES = [(), (0,), (1,), (7,), (5, 0, 3), (3, 5, 7), (150, 131)]


def every_kind(rank: Rank, seed: int = 0) -> NamedTensors:
    """Every dtype in every shape, larger than a bucket of 64 KiB too, laid out in memory in all ways."""
    kinds = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]
    return [
        (f"{dtype}{shape}", rank.tensor(dtype, shape, seed + i, LAYOUTS[i % len(LAYOUTS)]))
        for i, (dtype, shape) in enumerate(kinds)
    ]


def carried(rank: Rank, engine: Any, *streams: NamedTensors) -> None:
    """Sends the streams one after another; receivers compare."""
    for stream in streams:
        if rank.is_master:
            send(engine, iter(stream))
        else:
            assert picture(receive(engine)) == picture(stream)


@scenario
def every_dtype_and_shape_arrives_at_one_receiver(rank: Rank) -> None:
    if rank.rank < 2:
        carried(rank, rank.join(2), every_kind(rank), every_kind(rank, 1))


@scenario
def every_dtype_and_shape_arrives_at_two_receivers(rank: Rank) -> None:
    carried(rank, rank.join(), every_kind(rank), every_kind(rank, 1))


@scenario
def streams_may_change_from_one_to_the_next(rank: Rank) -> None:
    whole, large = every_kind(rank), rank.stream([5 * MIB, 3 * MIB, 1 * MIB, 1 * MIB + 4, 12])
    streams = [whole, whole[:20], whole[10:], large, [], whole[:5] + large + whole[5:], large[::-1], large, whole]
    carried(rank, rank.join(), *streams)


@scenario
def stream_that_repeats_brings_what_its_tensors_hold_now(rank: Rank) -> None:
    engine, sizes = rank.join(), [4 * KIB, 12, 90 * KIB, 1 * MIB]
    held = [(name, torch.nn.Parameter(tensor, requires_grad=False)) for name, tensor in rank.stream(sizes)]
    for seed in range(4):
        for (_, parameter), (_, tensor) in zip(held, rank.stream(sizes, seed), strict=True):
            parameter.copy_(tensor)
        engine.begin_stream(repeats=seed > 0)
        carried(rank, engine, held)
    carried(rank, engine, rank.stream(sizes, 7), held)  # what was said counts for the next stream alone
    engine.begin_stream(repeats=True)
    engine.begin_stream(repeats=False)  # and what was said last
    carried(rank, engine, rank.stream(sizes, 8))


@scenario
def bucket_may_be_the_smallest_or_larger_than_the_model(rank: Rank) -> None:
    stream = rank.stream([4, 512, 516, 3000, 40 * KIB, 0])
    carried(rank, rank.join(group="small", bucket_size=512), stream, stream)
    carried(rank, rank.join(group="large", bucket_size=64 * MIB), stream, stream)


@scenario
def two_engines_of_one_process_do_not_disturb_each_other(rank: Rank) -> None:
    engines = [rank.join(group=group) for group in ("first", "second")]
    for seed in range(3):
        for engine in engines:
            carried(rank, engine, rank.stream([100, 90 * KIB], seed))


@scenario
def used_as_in_the_readme(rank: Rank) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(300, 64), torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    model.to(rank.case.device)
    engine = rank.engine(bucket_size=512 << 20)
    expected = picture(model.state_dict().items())

    async def trainer() -> None:
        metadata = engine.prepare()
        rank.tell("metadata", metadata)
        engine.init_process_group(rank=0, world_size=3, master_metadata=metadata)
        await engine.send_weights(model.named_parameters())
        engine.finalize()

    async def rollout() -> None:
        engine.prepare()
        engine.init_process_group(rank=rank.rank, world_size=3, master_metadata=rank.hear("metadata"))
        assert picture([(name, tensor.clone()) async for name, tensor in engine.receive_weights()]) == expected
        engine.finalize()

    asyncio.run(trainer() if rank.is_master else rollout())
    assert all(parameter.requires_grad for parameter in model.parameters())


@scenario
def tensors_are_read_before_the_next_is_requested(rank: Rank) -> None:
    def one_storage(size: int) -> Iterator[tuple[str, torch.Tensor]]:
        room = torch.empty(size, dtype=torch.uint8, device=rank.case.device)
        for value in range(9):
            yield f"t{value}", room.fill_(value)
        room.fill_(255)

    engine = rank.join()
    for size in (10, 30 * KIB, 200 * KIB, 2 * MIB):
        if rank.is_master:
            send(engine, one_storage(size))
        else:
            expected = [(f"t{value}", torch.full((size,), value, dtype=torch.uint8)) for value in range(9)]
            assert picture(receive(engine)) == picture(expected)


@scenario
def received_tensors_stay_intact_until_the_next_is_requested(rank: Rank) -> None:
    engine = rank.join()
    stream = rank.stream([40 * KIB] * 12 + [200 * KIB, 2 * MIB] * 3)
    for _ in range(2):
        if rank.is_master:
            send(engine, stream)
        else:  # meanwhile the next bucket comes in
            assert picture(receive(engine, use=lambda name: pause(0.02))) == picture(stream)


@scenario
def both_sides_learn_the_same_digests(rank: Rank) -> None:
    engine = rank.join()
    for seed in range(2):
        carried(rank, engine, rank.stream([12, 0, 70 * KIB], seed))
        if rank.is_master:
            assert engine.stats is not None
            assert engine.stats.tensors == 3
            assert engine.stats.payload_bytes >= 12 + 70 * KIB
            rank.tell(f"digests/{seed}", engine.stats.digests.hex())
        else:
            assert engine.sent_digests.hex() == rank.hear(f"digests/{seed}") != ""


@scenario
def either_side_may_do_without_digests(rank: Rank) -> None:
    stream = rank.stream([12, 70 * KIB, 2 * MIB])
    carried(rank, rank.join(group="sender", verify=not rank.is_master), stream)
    carried(rank, rank.join(group="receivers", verify=rank.is_master), stream)


@scenario
def event_loop_runs_on_while_sending_and_receiving(rank: Rank) -> None:
    engine = rank.join(2) if rank.rank < 2 else None
    stream = rank.stream([3 * MIB] * 16)

    def slow_source() -> Iterator[tuple[str, torch.Tensor]]:
        pause(1.0)
        yield from stream

    async def slow_consumer() -> None:
        async for name, _ in engine.receive_weights():
            if name == "layers.3.weight":
                await asyncio.sleep(1.0)

    if engine is not None:
        call = engine.send_weights(slow_source()) if rank.is_master else slow_consumer()
        gap = asyncio.run(longest_gap_while(call))
        assert gap < 0.5, f"the event loop stood still for {gap:.2f} s"


@scenario
def trainer_ranks_that_do_not_send_only_drain_the_iterable(rank: Rank) -> None:
    drained = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for item in rank.stream([100, 90 * KIB]):
            drained.append(item[0])
            yield item

    engine = rank.join(2, rank=-1 if rank.rank == 2 else None)
    for _ in range(2):
        if rank.rank == 1:
            assert picture(receive(engine)) == picture(rank.stream([100, 90 * KIB]))
        else:
            send(engine, gathered())
    assert len(drained) == (0 if rank.rank == 1 else 4)
    if rank.rank == 2:
        expect(outcome_of(lambda: receive(engine)), EngineError, "receivers")


@scenario
def group_is_independent_of_the_default_process_group(rank: Rank) -> None:
    if rank.is_master:
        store = dist.TCPStore("127.0.0.1", 0, 3, True, wait_for_workers=False)
        rank.tell("port", store.port)
    else:
        store = dist.TCPStore("127.0.0.1", rank.hear("port"), 3, False)
    dist.init_process_group("gloo", store=store, rank=2 - rank.rank, world_size=3)
    try:
        engine = rank.join()
        carried(rank, engine, rank.stream([100, 90 * KIB]))
        assert dist.get_rank() == 2 - rank.rank
        engine.finalize()
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 3
    finally:
        dist.destroy_process_group()


@scenario
def receipts_reach_the_master_beside_the_data(rank: Rank) -> None:
    engine = rank.join(timeout=2.0)
    if rank.is_master:
        assert engine.collect_receipts("joined", [1, 2]) == {1: b"from 1\x00\xff", 2: b"from 2\x00\xff"}
        missing = outcome_of(lambda: engine.collect_receipts("staged-1", [1, 2]))
        expect(missing, DeadlineError, "rank 2", "staged-1", "2 s")
        assert "rank 1" not in str(missing.error)
    else:
        engine.post_receipt("joined", f"from {rank.rank}\x00".encode() + b"\xff")
        if rank.rank == 1:
            engine.post_receipt("staged-1", b"")
    rank.meet("asked")
    carried(rank, engine, rank.stream([100]))


@scenario
def metadata_is_plain_and_holds_no_secret(rank: Rank) -> None:
    engine = rank.engine()
    metadata = engine.prepare()
    assert json.loads(json.dumps(metadata)) == metadata
    assert TOKEN not in json.dumps(metadata)
    assert bool(metadata) == rank.is_master


if __name__ == "__main__":
    scenario.run()
