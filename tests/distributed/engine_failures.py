"""Contract: every failure is told to all sides, with its cause, in time, and the next group works."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.distributed.engine_contract import (
    KIB,
    MIB,
    NamedTensors,
    Outcome,
    Rank,
    Scenarios,
    expect,
    outcome_of,
    pause,
    receive,
    send,
)
from tests.unit.engine_streams import picture
from twinkle_callbacks import errors
from twinkle_callbacks.engines import CheckpointEngine

scenario = Scenarios()
TIMEOUT_S = 15.0
AT_ONCE_S = 6.0  # far below the timeout, and far above what a busy machine needs
SHORT_S = 2.0
LATE_S = 3.0  # how much later than its timeout an error may come on a busy machine
BROKEN = (errors.EngineError, errors.DeadlineError)


def rebuilt(rank: Rank, engine: CheckpointEngine, world_size: int = 3, group: str = "rebuilt") -> None:
    """The engine that failed works again after finalize() and a new group."""
    took = outcome_of(engine.finalize)
    assert took.error is None
    assert took.seconds < AT_ONCE_S, f"finalize() took {took.seconds:.1f} s"
    engine.timeout_s = TIMEOUT_S  # the others may only now be finding out
    stream = rank.stream([100, 90 * KIB, 3 * MIB], seed=7)
    rank.join(world_size, engine=engine, group=group)
    if rank.is_master:
        send(engine, stream)
    else:
        assert picture(receive(engine)) == picture(stream)


def failing(rank: Rank, error: Exception, after: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from rank.stream([100, 90 * KIB, 3 * MIB, 100, 100])[:after]
    raise error


def error_in_the_source(rank: Rank, error: Exception, after: int) -> None:
    engine = rank.join(group=f"{type(error).__name__}/{after}", timeout=TIMEOUT_S)
    if rank.is_master:
        sent = outcome_of(lambda: send(engine, failing(rank, error, after)))
        assert sent.error is error
        assert sent.seconds < AT_ONCE_S
    else:
        received = outcome_of(lambda: receive(engine))
        own = isinstance(error, errors.TwinkleError)
        expect(received, type(error) if own else errors.PeerError, "layer 3 is on fire")
        assert own or type(error).__name__ in str(received.error)
        assert received.seconds < AT_ONCE_S
    again = outcome_of(lambda: send(engine, []) if rank.is_master else receive(engine))
    expect(again, errors.PoisonedError, "layer 3 is on fire", "finalize()")
    rebuilt(rank, engine, group=f"{type(error).__name__}/{after}/rebuilt")


@scenario
def error_of_the_iterable_reaches_receivers_with_its_cause_at_once(rank: Rank) -> None:
    for after in (0, 1, 3, 5):
        error_in_the_source(rank, ValueError("layer 3 is on fire"), after)
    error_in_the_source(rank, errors.SourceError("layer 3 is on fire"), 2)


@scenario
def deadline_of_a_gather_reaches_receivers_with_its_cause_at_once(rank: Rank) -> None:
    error_in_the_source(rank, errors.DeadlineError("layer 3 is on fire"), 2)


@scenario
def engine_error_of_a_gather_reaches_receivers_with_its_cause_at_once(rank: Rank) -> None:
    error_in_the_source(rank, errors.EngineError("layer 3 is on fire"), 2)


@scenario
def slow_receiver_is_waited_for(rank: Rank) -> None:
    engine = rank.join(timeout=6.0)
    stream = rank.stream([4 * MIB] * 8)

    def linger(name: str) -> None:
        if rank.rank == 2 and name in ("layers.0.weight", "layers.3.weight"):
            pause(2.0)

    if rank.is_master:
        assert outcome_of(lambda: send(engine, stream)).error is None
    else:
        assert picture(receive(engine, use=linger)) == picture(stream)


def too_slow(rank: Rank, stream: NamedTensors) -> Outcome | None:
    """A receiver that stops in the middle for longer than the timeout; the sender's outcome."""
    if rank.rank == 2:
        return None
    engine = rank.join(2, timeout=SHORT_S)
    if rank.is_master:
        sent = outcome_of(lambda: send(engine, stream))
        rank.tell("sender gave up")
        expect(sent, errors.DeadlineError)
        assert SHORT_S * 0.9 < sent.seconds < SHORT_S + LATE_S
    else:
        sent = outcome_of(lambda: receive(engine, use=lambda name: rank.hear("sender gave up")))
    rebuilt(rank, engine, 2)
    return sent


@scenario
def receiver_slower_than_the_timeout_is_a_deadline_error_on_the_sender(rank: Rank) -> None:
    too_slow(rank, rank.stream([4 * MIB] * 16))


@scenario
def receiver_that_never_acknowledges_is_named_by_the_deadline_error(rank: Rank) -> None:
    sent = too_slow(rank, rank.stream([100]))
    if rank.is_master:
        assert sent is not None
        expect(sent, errors.DeadlineError, "rank 1", "2 s")


@scenario
def sender_slower_than_the_timeout_is_a_deadline_error_on_receivers(rank: Rank) -> None:
    engine = rank.join(2, timeout=SHORT_S) if rank.rank < 2 else None

    def slow() -> Iterator[tuple[str, torch.Tensor]]:
        yield from rank.stream([90 * KIB])
        rank.hear("receiver gave up")

    if engine is not None and rank.is_master:
        expect(outcome_of(lambda: send(engine, slow())), BROKEN)
    elif engine is not None:
        received = outcome_of(lambda: receive(engine))
        rank.tell("receiver gave up")
        expect(received, errors.DeadlineError)
        assert received.seconds < SHORT_S + LATE_S
    if engine is not None:
        rebuilt(rank, engine, 2)


@scenario
def peer_that_does_not_come_is_named_within_the_timeout(rank: Rank) -> None:
    if rank.rank == 2:
        return rank.hear("given up")
    joined = outcome_of(lambda: rank.join(timeout=SHORT_S))
    expect(joined, errors.DeadlineError)
    assert joined.seconds < SHORT_S + LATE_S
    if rank.is_master:
        expect(joined, errors.DeadlineError, "rank 2", "2 s")
        assert "rank 1" not in str(joined.error)
        rank.tell("given up")
    return None


def dies_in_the_middle(name: str) -> None:
    if name == "layers.3.weight":
        os.kill(os.getpid(), signal.SIGKILL)


@scenario
def receiver_killed_in_the_middle_is_an_engine_error_on_the_sender_at_once(rank: Rank) -> None:
    stream = rank.stream([4 * MIB] * 16)
    if rank.rank == 1 and not rank.is_victim:
        assert rank.run_victim() == -signal.SIGKILL
        return rebuilt(rank, rank.engine())
    engine = rank.join(timeout=TIMEOUT_S)
    if rank.is_master:
        sent = outcome_of(lambda: send(engine, stream))
        expect(sent, errors.EngineError)
        assert sent.seconds < AT_ONCE_S
    else:
        received = outcome_of(lambda: receive(engine, use=dies_in_the_middle if rank.is_victim else str))
        expect(received, errors.EngineError)  # its link to the sender breaks when that one gives up
        assert received.seconds < TIMEOUT_S
    return rebuilt(rank, engine)


@scenario
def sender_killed_in_the_middle_is_an_engine_error_on_receivers_at_once(rank: Rank) -> None:
    if rank.is_master and not rank.is_victim:
        assert rank.run_victim() == -signal.SIGKILL
        rank.tell("killed")
        return rebuilt(rank, rank.engine())
    engine = rank.join(timeout=TIMEOUT_S)
    if rank.is_master:

        def dying() -> Iterator[tuple[str, torch.Tensor]]:
            for item in rank.stream([90 * KIB] * 8):
                yield item
                dies_in_the_middle(item[0])

        send(engine, dying())
    received = outcome_of(lambda: receive(engine))
    expect(received, errors.EngineError)
    assert received.seconds < AT_ONCE_S
    rank.hear("killed")
    return rebuilt(rank, engine)


@scenario
def receiver_that_gives_up_in_the_middle_tells_the_sender_why(rank: Rank) -> None:
    """An older torch on the receiver's side, without one of the dtypes."""
    if rank.rank == 2:
        return
    stream = [
        *rank.stream([3 * MIB] * 4),
        ("new", rank.tensor(torch.float8_e8m0fnu, (3 * MIB,), 0)),
        *rank.stream([3 * MIB] * 9),
    ]
    engine = rank.join(2, timeout=TIMEOUT_S)
    if rank.is_master:
        sent = outcome_of(lambda: send(engine, stream))
        expect(sent, errors.EngineError, "rank 1", "float8_e8m0fnu")
        assert sent.seconds < AT_ONCE_S
    else:
        dtype = torch.float8_e8m0fnu
        del torch.float8_e8m0fnu
        try:
            expect(outcome_of(lambda: receive(engine)), errors.ProtocolError, "float8_e8m0fnu")
        finally:
            torch.float8_e8m0fnu = dtype
    rebuilt(rank, engine, 2)


def leaves(engine: CheckpointEngine, how: str) -> None:
    async def consume() -> None:
        async for _ in engine.receive_weights():
            if how == "raises":
                raise MemoryError("no room for the staged copy")
            break

    if how == "raises":
        expect(outcome_of(lambda: asyncio.run(consume())), MemoryError, "no room")
    else:
        asyncio.run(consume())


def consumer_that(how: str, rank: Rank, stream: NamedTensors) -> None:
    if rank.rank == 2:
        return
    engine = rank.join(2, timeout=TIMEOUT_S)
    if rank.is_master:
        sent = outcome_of(lambda: send(engine, stream))
        expect(sent, errors.EngineError)
        assert sent.seconds < AT_ONCE_S
    else:
        leaves(engine, how)
        expect(outcome_of(lambda: receive(engine)), errors.PoisonedError, "finalize()")
    rebuilt(rank, engine, 2)


@scenario
def consumer_that_leaves_early_is_an_error_on_the_sender_once_it_finalizes(rank: Rank) -> None:
    consumer_that("leaves", rank, rank.stream([3 * MIB] * 16))


@scenario
def consumer_that_leaves_a_short_stream_is_an_error_on_the_sender_once_it_finalizes(rank: Rank) -> None:
    consumer_that("leaves", rank, rank.stream([100, 100]))


@scenario
def consumer_that_raises_is_an_error_on_the_sender_once_it_finalizes(rank: Rank) -> None:
    consumer_that("raises", rank, rank.stream([3 * MIB] * 16))


def finalized_under_way(rank: Rank, call: Callable[[CheckpointEngine], Any], who: int) -> None:
    """On one side a call waits for a peer that does nothing; finalize() from the event loop ends it."""
    if rank.rank == 2:
        return None
    engine = rank.join(2, timeout=TIMEOUT_S)
    if rank.rank != who:
        rank.hear("finalized")
        return rebuilt(rank, engine, 2)

    async def interrupt() -> None:
        task = asyncio.ensure_future(call(engine))
        await asyncio.sleep(0.5)
        assert not task.done()
        took = outcome_of(engine.finalize)
        assert took.seconds < AT_ONCE_S, f"finalize() took {took.seconds:.1f} s"
        ended = await asyncio.gather(asyncio.wait_for(task, AT_ONCE_S), return_exceptions=True)
        assert isinstance(ended[0], errors.TwinkleError), ended

    threads = threading.active_count()
    try:
        asyncio.run(interrupt())
    finally:
        rank.tell("finalized")
    deadline = time.monotonic() + AT_ONCE_S
    while threading.active_count() > threads and time.monotonic() < deadline:
        pause(0.05)
    assert threading.active_count() <= threads, "the engine's thread is still there"
    return rebuilt(rank, engine, 2)


async def received(engine: CheckpointEngine) -> list[str]:
    return [name async for name, _ in engine.receive_weights()]


@scenario
def finalize_ends_a_receive_that_is_under_way(rank: Rank) -> None:
    finalized_under_way(rank, received, 1)


@scenario
def finalize_ends_a_receive_whose_consumer_is_at_work(rank: Rank) -> None:
    """The tensors come in chunks, so that nothing is read ahead: the engine's thread has nothing to do meanwhile."""
    if rank.rank == 2:
        return
    engine = rank.join(2, timeout=TIMEOUT_S)
    if rank.is_master:
        ended = outcome_of(lambda: send(engine, rank.stream([4 * MIB] * 4)))
    else:
        ended = outcome_of(lambda: receive(engine, use=lambda name: engine.finalize()))
        assert ended.seconds < AT_ONCE_S, f"the receive ended {ended.seconds:.1f} s later"
    expect(ended, errors.TwinkleError)
    rebuilt(rank, engine, 2)


@scenario
def finalize_ends_a_send_that_is_under_way(rank: Rank) -> None:
    finalized_under_way(rank, lambda engine: engine.send_weights(rank.stream([4 * MIB] * 16)), 0)


@scenario
def cancelled_send_poisons_the_engine_and_can_be_set_up_again(rank: Rank) -> None:
    if rank.rank == 2:
        return
    engine = rank.join(2, timeout=TIMEOUT_S)
    if rank.is_master:
        call = engine.send_weights(rank.stream([4 * MIB] * 16))

        async def cancelled() -> None:
            await asyncio.wait_for(call, 0.5)

        expect(outcome_of(lambda: asyncio.run(cancelled())), TimeoutError)
        expect(outcome_of(lambda: send(engine, [])), errors.PoisonedError, "finalize()")
    else:
        rank.hear("rebuilt/metadata")
    rebuilt(rank, engine, 2)


@scenario
def iterable_is_drained_after_a_failure(rank: Rank) -> None:
    """Every trainer rank takes part in each gather, so the master may not stop drawing from the iterable."""
    engine = rank.join(timeout=SHORT_S)
    drawn = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in rank.stream([4 * MIB] * 16):
            drawn.append(name)
            yield name, tensor

    if rank.is_master:
        expect(outcome_of(lambda: send(engine, gathered())), BROKEN)
        assert len(drawn) == 16
        rank.tell("drained")
    rank.hear("drained")
    rebuilt(rank, engine)


if __name__ == "__main__":
    scenario.run()
