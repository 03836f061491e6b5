"""The order of an engine's calls: one out of place is a clear error, and finalize() always leads back to the start.

Over a wire in memory, both sides in this process; the contract tests run the same on real engines and processes.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.unit import engine_loopback
from tests.unit.engine_loopback import TOKEN, LoopbackBackend, LoopbackEngine, Sent, joined, transfer
from tests.unit.engine_streams import picture, random_tensor
from twinkle_callbacks import errors

STREAM = [(f"t{i}", random_tensor(torch.float32, (size,), i)) for i, size in enumerate([3, 700, 5000, 0, 1])]


def master() -> LoopbackEngine:
    engine = LoopbackEngine(4096, 5.0, token=TOKEN)
    engine.is_master = True
    return engine


async def drained(engine: LoopbackEngine) -> list[Any]:
    return [name async for name, _ in engine.receive_weights()]


def test_streams_follow_one_another_and_both_sides_agree_on_their_digests() -> None:
    with joined() as (sender, receiver):
        for _ in range(3):
            sent, received = asyncio.run(transfer(sender, receiver, iter(STREAM)))
            assert sent is None
            assert picture(received) == picture(STREAM)
            assert sender.stats is not None
            assert sender.stats.tensors == len(STREAM)
            assert receiver.sent_digests == sender.stats.digests != b""


@pytest.mark.parametrize("verify", [True, False])
def test_side_that_computes_no_digest_accepts_one_that_does(verify: bool) -> None:
    with joined(verify=verify) as (sender, receiver):
        sender.verify = not verify
        sent, received = asyncio.run(transfer(sender, receiver, STREAM))
        assert sent is None
        assert picture(received) == picture(STREAM)
        assert bool(receiver.sent_digests) == sender.verify


# Calls out of order


def test_prepare_twice_is_an_error_until_finalize() -> None:
    engine = master()
    engine.prepare()
    with pytest.raises(errors.EngineError, match=r"prepare\(\) was called already.*finalize\(\)"):
        engine.prepare()
    engine.finalize()
    assert engine.prepare()["engine"] == "loopback"
    engine.finalize()


def test_metadata_is_plain_and_holds_no_secret() -> None:
    engine = master()
    metadata = engine.prepare()
    engine.finalize()
    assert json.loads(json.dumps(metadata)) == metadata
    assert TOKEN not in json.dumps(metadata)


def test_prepare_opens_nothing_on_ranks_that_are_not_the_master() -> None:
    assert LoopbackEngine(4096, token=TOKEN).prepare() == {}


@pytest.mark.parametrize("times", [1, 2])
def test_finalize_is_allowed_at_any_time(times: int) -> None:
    engine = master()
    for _ in range(times):
        engine.finalize()
    engine.prepare()
    for _ in range(times):
        engine.finalize()


def test_nothing_works_before_init_process_group() -> None:
    engine = master()
    engine.prepare()
    consumed: list[str] = []
    with pytest.raises(errors.EngineError, match=r"init_process_group\(\)"):
        asyncio.run(engine.send_weights(recording(consumed)))
    assert not consumed
    with pytest.raises(errors.EngineError, match=r"init_process_group\(\)"):
        asyncio.run(drained(LoopbackEngine(token=TOKEN)))
    with pytest.raises(errors.EngineError, match=r"init_process_group\(\)"):
        LoopbackEngine(token=TOKEN).post_receipt("joined", b"")
    with pytest.raises(errors.EngineError, match=r"init_process_group\(\)"):
        LoopbackEngine(token=TOKEN).collect_receipts("joined", [1])
    assert LoopbackEngine(token=TOKEN).sent_digests == b""
    engine.finalize()


def test_nothing_works_after_finalize() -> None:
    with joined() as (sender, receiver):
        asyncio.run(transfer(sender, receiver, STREAM))
        sender.finalize()
        receiver.finalize()
        with pytest.raises(errors.EngineError, match=r"init_process_group\(\)"):
            asyncio.run(sender.send_weights(STREAM))
        with pytest.raises(errors.EngineError, match=r"init_process_group\(\)"):
            asyncio.run(drained(receiver))
        with pytest.raises(errors.EngineError, match=r"init_process_group\(\)"):
            receiver.post_receipt("joined", b"")


def test_init_process_group_twice_is_an_error_naming_the_rank() -> None:
    with joined() as (_, receiver), pytest.raises(errors.EngineError, match=r"rank 1.*finalize\(\)"):
        receiver.init_process_group(1, 2, master_metadata={})


def test_master_must_prepare_first() -> None:
    other = master()
    metadata = other.prepare()
    with pytest.raises(errors.EngineError, match=r"prepare\(\)"):
        master().init_process_group(0, 2, master_metadata=metadata)
    other.finalize()


@pytest.mark.parametrize(
    ("rank", "world_size", "is_master"),
    [(2, 2, False), (5, 2, False), (-2, 2, False), (0, 2, False), (1, 2, True), (-1, 2, True), (0, 0, True)],
)
def test_rank_that_does_not_fit_the_world_or_the_role_is_refused_at_once(
    rank: int, world_size: int, is_master: bool
) -> None:
    host = master()
    metadata = host.prepare()
    engine = host if is_master else LoopbackEngine(4096, token=TOKEN)
    with pytest.raises(errors.ConfigError, match=f"rank={rank}, world_size={world_size}, is_master={is_master}"):
        engine.init_process_group(rank, world_size, master_metadata=metadata)
    host.finalize()


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.pop("port"),
        lambda metadata: metadata.update(port="29500"),
        lambda metadata: metadata.update(extra=1),
        lambda metadata: metadata.clear(),
    ],
    ids=["missing", "of another type", "unknown", "empty"],
)
def test_metadata_that_prepare_does_not_return_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    host = master()
    metadata = host.prepare()
    change(metadata)
    with pytest.raises(errors.ConfigError, match=r"master_metadata=.*prepare\(\)"):
        LoopbackEngine(token=TOKEN).init_process_group(1, 2, master_metadata=metadata)
    host.finalize()


def test_master_of_another_engine_is_refused_and_both_are_named() -> None:
    host = master()
    metadata = host.prepare() | {"engine": "nccl"}
    with pytest.raises(errors.ConfigError, match=r"'nccl'.*'loopback'"):
        LoopbackEngine(token=TOKEN).init_process_group(1, 2, master_metadata=metadata)
    host.finalize()


@pytest.mark.parametrize("host", ["256.1.1.1", "no-such-host.invalid", "203.0.113.1"])
def test_address_that_is_not_this_hosts_is_a_config_error(host: str) -> None:
    engine = LoopbackEngine(4096, 2.0, token=TOKEN, host=host)
    engine.is_master = True
    with pytest.raises(errors.ConfigError, match=f"host='{host}'"):
        engine.prepare()


def test_token_that_is_too_short_is_refused_on_the_master() -> None:
    engine = LoopbackEngine(4096, 2.0, token="short")
    engine.is_master = True
    with pytest.raises(errors.AuthenticationError, match="16"):
        engine.prepare()


def test_only_the_master_sends_and_only_receivers_receive() -> None:
    with joined() as (_, receiver), pytest.raises(errors.EngineError, match="rank 1 is a receiver"):
        asyncio.run(receiver.send_weights(STREAM))
    with joined() as (sender, _), pytest.raises(errors.EngineError, match="receivers"):
        asyncio.run(drained(sender))


# Ranks that do not send


def recording(consumed: list[str], error: Exception | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in STREAM:
        consumed.append(name)
        yield name, tensor
    if error is not None:
        raise error


def test_trainer_rank_that_does_not_send_drains_the_iterable_and_joins_nothing() -> None:
    host, other = master(), LoopbackEngine(4096, token=TOKEN)
    other.prepare()
    other.init_process_group(-1, 2, master_metadata=host.prepare())
    for _ in range(2):
        consumed: list[str] = []
        asyncio.run(other.send_weights(recording(consumed)))
        assert consumed == [name for name, _ in STREAM]
    with pytest.raises(errors.EngineError, match="receivers"):
        asyncio.run(drained(other))
    other.finalize()
    host.finalize()


def test_error_of_the_iterable_is_raised_on_ranks_that_do_not_send_too() -> None:
    host, other = master(), LoopbackEngine(4096, token=TOKEN)
    other.init_process_group(-1, 2, master_metadata=host.prepare())
    with pytest.raises(ValueError, match="on fire"):
        asyncio.run(other.send_weights(recording([], ValueError("on fire"))))
    other.finalize()
    host.finalize()


# Failures in the middle


def test_error_of_the_iterable_reaches_the_receiver_and_poisons_both() -> None:
    with joined() as (sender, receiver):
        error = ValueError("layer 3 is on fire")
        sent, received = asyncio.run(transfer(sender, receiver, recording([], error)))
        assert sent is error
        assert type(received) is errors.PeerError
        assert "ValueError" in str(received)
        for call in (sender.send_weights(STREAM), drained(receiver)):
            with pytest.raises(errors.PoisonedError, match=r"on fire.*finalize\(\)"):
                asyncio.run(call)


def test_engines_work_again_after_finalize_and_a_new_group() -> None:
    with joined() as (sender, receiver):
        asyncio.run(transfer(sender, receiver, recording([], ValueError("on fire"))))
        sender.finalize()
        receiver.finalize()
        metadata = sender.prepare()
        receiver.prepare()
        entering = threading.Thread(
            target=receiver.init_process_group, args=(1, 2), kwargs={"master_metadata": metadata}
        )
        entering.start()
        sender.init_process_group(0, 2, master_metadata=metadata)
        entering.join(20)
        sent, received = asyncio.run(transfer(sender, receiver, STREAM))
        assert sent is None
        assert picture(received) == picture(STREAM)


def test_damaged_payload_is_a_digest_mismatch_on_both_sides_naming_tensor_and_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def damaging(self: Sent) -> None:
        self.data = self.source.numpy().tobytes()
        if len(self.data) > 2000 and b"TWKL" not in self.data:
            self.data = b"\xff" * 4 + self.data[4:]
        self.ready.set()

    monkeypatch.setattr(Sent, "wait", damaging)
    with joined() as (sender, receiver):
        sent, received = asyncio.run(transfer(sender, receiver, STREAM))
        assert isinstance(received, errors.DigestMismatchError)
        assert str(received).endswith("t0, t2")  # the first of a bucket, and the one that travels in chunks
        assert isinstance(sent, errors.DigestMismatchError)
        assert "rank 1" in str(sent)


def test_broken_wire_poisons_the_sender_which_still_drains_the_iterable(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined() as (sender, _):

        def broken(self: LoopbackBackend, buffer: torch.Tensor) -> Any:
            raise errors.EngineError("the cable was pulled")

        monkeypatch.setattr(LoopbackBackend, "broadcast", broken)
        consumed: list[str] = []
        with pytest.raises(errors.EngineError, match="the cable was pulled"):
            asyncio.run(sender.send_weights(recording(consumed)))
        assert consumed == [name for name, _ in STREAM]  # every trainer rank takes part in each gather
        with pytest.raises(errors.PoisonedError, match="the cable was pulled"):
            asyncio.run(sender.send_weights(STREAM))


def test_receiver_that_fails_tells_the_sender_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined() as (sender, receiver):

        def full(self: LoopbackBackend, nbytes: int) -> torch.Tensor:
            raise torch.OutOfMemoryError("no room for a bucket")

        backend = receiver._group.backend
        assert backend is not None
        monkeypatch.setattr(backend, "allocate", full.__get__(backend))
        sent, received = asyncio.run(transfer(sender, receiver, STREAM))
        assert isinstance(received, torch.OutOfMemoryError)
        assert isinstance(sent, errors.EngineError)
        assert "rank 1" in str(sent)
        assert "no room for a bucket" in str(sent)


def test_consumer_that_leaves_early_poisons_the_receiver() -> None:
    async def leave(receiver: LoopbackEngine) -> None:
        tensors = receiver.receive_weights()
        await anext(tensors)
        await tensors.aclose()

    with joined(timeout_s=3.0) as (sender, receiver):
        sending = threading.Thread(target=lambda: asyncio.run(quietly(sender.send_weights(STREAM))))
        sending.start()
        asyncio.run(leave(receiver))
        with pytest.raises(errors.PoisonedError, match="left receive_weights"):
            asyncio.run(drained(receiver))
        receiver.finalize()
        sending.join(20)


async def quietly(call: Any) -> None:
    try:
        await call
    except errors.TwinkleError:
        return


def test_iterable_runs_off_the_event_loop() -> None:
    async def ticks_while(call: Any) -> int:
        ticks = 0
        task = asyncio.ensure_future(call)
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        await task
        return ticks

    def slow() -> Iterator[tuple[str, torch.Tensor]]:
        for item in STREAM:
            threading.Event().wait(0.1)  # a gather that blocks
            yield item

    with joined() as (sender, receiver):
        assert asyncio.run(ticks_while(transfer(sender, receiver, slow()))) > 10


def test_no_group_forms_over_links_that_lead_to_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is proven in the store; a link of the data group may still end at a stranger that was faster."""
    connect = LoopbackBackend.connect

    def hijacked(self: LoopbackBackend, store: Any, rank: int, world_size: int, **options: Any) -> None:
        connect(self, store, rank, world_size, **options)
        if rank == 1:
            self.wire = queue.SimpleQueue()

    monkeypatch.setattr(LoopbackBackend, "connect", hijacked)
    monkeypatch.setattr(engine_loopback, "TIMEOUT_S", 1.0)
    with pytest.raises((errors.EngineError, errors.DeadlineError, errors.AuthenticationError)), joined(timeout_s=1.0):
        pass


# Messages beside the data


def test_receipts_arrive_once_for_each_rank_and_topic() -> None:
    with joined() as (sender, receiver):
        receiver.post_receipt("joined", b"\x00binary\xff")
        receiver.post_receipt("staged-1", b"")
        assert sender.collect_receipts("joined", [1]) == {1: b"\x00binary\xff"}
        assert sender.collect_receipts("staged-1", range(1, 2)) == {1: b""}
        assert sender.collect_receipts("nobody", []) == {}


def test_receipt_that_does_not_come_is_a_deadline_error_naming_rank_and_topic() -> None:
    with joined(timeout_s=1.0) as (sender, _):
        with pytest.raises(errors.DeadlineError, match="rank 1 did not send its staged-1 within 1 s"):
            sender.collect_receipts("staged-1", [1])


def test_no_thread_stays_behind() -> None:
    before = threading.active_count()
    with joined() as (sender, receiver):
        asyncio.run(transfer(sender, receiver, STREAM))
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert threading.active_count() <= before
