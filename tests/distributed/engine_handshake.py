"""Contract: a group forms only when every side agrees and proves the token; strangers get nothing and break nothing."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from tests.distributed.engine_contract import KIB, MIB, Rank, Scenarios, expect, outcome_of, pause, receive, send
from tests.unit.engine_streams import picture
from twinkle_callbacks import errors
from twinkle_callbacks.engines import CheckpointEngine

scenario = Scenarios()
SHORT_S = 2.0
LATE_S = 3.0


def works(rank: Rank, engine: CheckpointEngine) -> None:
    """The group carries a stream."""
    stream = rank.stream([100, 90 * KIB, 2 * MIB])
    if rank.is_master:
        send(engine, stream)
    else:
        assert picture(receive(engine)) == picture(stream)


def works_again(rank: Rank, engine: CheckpointEngine, world_size: int, group: str) -> None:
    engine.finalize()
    works(rank, rank.join(world_size, engine=engine, group=group))


def transferred_nothing(rank: Rank, engine: CheckpointEngine) -> None:
    """After a failed handshake not even the first tensor is asked for."""
    drawn: list[str] = []

    def weights() -> Any:
        drawn.append("the first")
        yield from rank.stream([100])

    moved = outcome_of(lambda: send(engine, weights()) if rank.is_master else receive(engine))
    expect(moved, errors.EngineError)
    assert not drawn


@scenario
def another_world_size_is_an_error_on_both_sides_naming_both(rank: Rank) -> None:
    if rank.rank == 2:
        return
    engine = rank.engine()
    joined = outcome_of(lambda: rank.join(2 if rank.is_master else 3, engine=engine))
    expect(joined, errors.EngineError, "rank 1", "world_size=3", "the master 2")
    transferred_nothing(rank, engine)
    works_again(rank, engine, 2, "again")


@scenario
def engine_whose_handshake_failed_is_poisoned_on_all_sides(rank: Rank) -> None:
    engine = rank.engine(bucket_size=(128 if rank.rank == 2 else 64) * KIB)
    expect(outcome_of(lambda: rank.join(3, engine=engine)), errors.EngineError, "bucket_size")
    again = outcome_of(lambda: send(engine, []) if rank.is_master else receive(engine))
    expect(again, errors.PoisonedError, "bucket_size", "finalize()")


@scenario
def another_bucket_size_is_an_error_on_all_sides_naming_both(rank: Rank) -> None:
    engine = rank.engine(bucket_size=(128 if rank.rank == 2 else 64) * KIB)
    joined = outcome_of(lambda: rank.join(3, engine=engine))
    expect(joined, errors.EngineError, "rank 2", f"bucket_size={128 * KIB}", f"the master {64 * KIB}")
    transferred_nothing(rank, engine)


@scenario
def rank_that_is_taken_is_an_error_on_all_sides(rank: Rank) -> None:
    engine = rank.engine(timeout=SHORT_S)
    joined = outcome_of(lambda: rank.join(3, engine=engine, rank=0 if rank.is_master else 1))
    assert isinstance(joined.error, errors.EngineError | errors.DeadlineError), joined
    assert joined.seconds < SHORT_S + LATE_S
    if rank.is_master:
        expect(joined, errors.DeadlineError, "rank 2 did not join")
    else:
        rank.tell(f"error/{rank.rank}", str(joined.error))
        assert "rank 1 is taken" in rank.hear("error/1") + rank.hear("error/2")
    transferred_nothing(rank, engine)
    works_again(rank, engine, 3, "again")


@scenario
def receiver_beyond_the_masters_world_learns_what_differs(rank: Rank) -> None:
    joined = outcome_of(lambda: rank.join(3 if rank.rank == 2 else 2))
    if rank.rank == 2:
        expect(joined, errors.EngineError, "world_size")
    else:
        assert joined.error is None
        works(rank, joined.value)


@scenario
def rank_that_does_not_fit_the_role_is_refused_before_anyone_waits(rank: Rank) -> None:
    engine = rank.engine()
    metadata = engine.prepare()
    if rank.is_master:
        rank.tell("metadata", metadata)
    metadata = rank.hear("metadata")
    for wrong in (3, 17, -2, 1 if rank.is_master else 0):
        refused = outcome_of(lambda wrong=wrong: engine.init_process_group(wrong, 3, master_metadata=metadata))
        expect(refused, errors.ConfigError, f"rank={wrong}", "world_size=3")
        assert refused.seconds < 1
    engine.init_process_group(rank.rank, 3, master_metadata=metadata)
    works(rank, engine)


@scenario
def another_token_is_an_authentication_error_on_both_sides(rank: Rank) -> None:
    if rank.rank == 2:
        return
    engine = rank.engine(token=f"the token of rank {rank.rank}")
    joined = outcome_of(lambda: rank.join(2, engine=engine))
    expect(joined, errors.AuthenticationError, "token")
    assert joined.seconds < engine.timeout_s / 2
    transferred_nothing(rank, engine)


@scenario
def one_stranger_among_the_receivers_turns_all_away_and_is_named(rank: Rank) -> None:
    engine = rank.engine(token="the token of a stranger" if rank.rank == 2 else "the token of the others")
    joined = outcome_of(lambda: rank.join(3, engine=engine))
    expect(joined, errors.AuthenticationError, "rank 2", "token")
    transferred_nothing(rank, engine)


@scenario
def token_comes_from_the_environment(rank: Rank) -> None:
    works(rank, rank.join(token=None))


@scenario
def receivers_may_come_before_the_master_and_after_it(rank: Rank) -> None:
    engine = rank.engine()
    if rank.is_master:
        rank.tell("metadata", engine.prepare())
    metadata = rank.hear("metadata")
    if rank.is_master:
        pause(0.7)
    elif rank.rank == 2:
        pause(1.4)
    engine.init_process_group(rank.rank, 3, master_metadata=metadata)
    works(rank, engine)


@scenario
def master_that_is_gone_is_an_error_naming_its_address_in_time(rank: Rank) -> None:
    engine = rank.engine(timeout=SHORT_S)
    if rank.is_master:
        rank.tell("metadata", engine.prepare())
        engine.finalize()
        rank.tell("gone")
        return
    metadata = rank.hear("metadata")
    rank.hear("gone")
    joined = outcome_of(lambda: engine.init_process_group(rank.rank, 3, master_metadata=metadata))
    expect(
        joined, (errors.DeadlineError, errors.EngineError), str(metadata.get("host", "")), str(metadata.get("port", ""))
    )
    assert joined.seconds < 2 * SHORT_S + LATE_S  # a store's client waits longer and longer between its attempts


@scenario
def garbage_from_a_stranger_on_the_port_disturbs_nobody(rank: Rank) -> None:
    engine = rank.engine()
    if rank.is_master:
        rank.tell("metadata", engine.prepare())
    metadata = rank.hear("metadata")
    if rank.rank < 2:
        rank.hear("disturbed")
        engine.init_process_group(rank.rank, 2, master_metadata=metadata)
        works(rank, engine)
        rank.tell(f"worked/{rank.rank}")
    elif "port" not in metadata:  # nothing listens
        rank.tell("disturbed")
    else:
        with ExitStack() as connections:
            for garbage in (
                b"GET / HTTP/1.1\r\n\r\n",
                b"\x00" * 4096,
                b"\xff" * 4096,
                bytes(range(256)) * 16,
                b"",
                b"x",
            ):
                place = metadata["host"], metadata["port"]
                connections.enter_context(socket.create_connection(place, timeout=5)).sendall(garbage)
            rank.tell("disturbed")
            rank.hear("worked/0")
            rank.hear("worked/1")


@scenario
def keys_that_a_stranger_sets_get_it_nowhere(rank: Rank) -> None:
    """Each side of the group either works, or says that somebody has another token; no side crashes or hangs."""
    engine = rank.engine(timeout=5.0)
    if rank.is_master:
        rank.tell("metadata", engine.prepare())
    metadata = rank.hear("metadata")
    if rank.rank < 2:
        rank.hear("keys are set")
        joined = outcome_of(lambda: engine.init_process_group(rank.rank, 2, master_metadata=metadata))
        assert isinstance(joined.error, errors.TwinkleError), joined
        assert joined.seconds < 5.0 + LATE_S
        transferred_nothing(rank, engine)
        works_again(rank, engine, 2, "again")
    else:
        if "port" in metadata:
            set_keys(metadata)
        rank.tell("keys are set")


def set_keys(metadata: dict[str, Any]) -> None:
    place = metadata["host"], metadata["port"]
    store = TCPStore(*place, None, False, timedelta(seconds=SHORT_S), wait_for_workers=False)
    for key in ("nonce", "hello/1", "welcome", "ack/1/1", "joined/1"):
        store.set(f"{metadata['session']}/{key}", "from a stranger")


if __name__ == "__main__":
    scenario.run()
