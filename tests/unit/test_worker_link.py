"""A worker's link to one trainer: when it counts as alive, and what it does not receive."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
import torch

from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.errors import RolloutError
from twinkle_callbacks.worker import link as link_module
from twinkle_callbacks.worker.link import Link, alive
from twinkle_callbacks.worker.messages import Adapter, JoinRequest, Staged


class FakeEngine:
    """Joins when it is let; knows its master from then on. Receives `stream`."""

    def __init__(self, **settings: Any) -> None:
        self.may_join, self.posted, self.master = threading.Event(), threading.Event(), False
        self.answers = threading.Event()
        self.answers.set()
        self.stream = [("a", torch.zeros(2)), ("b", torch.zeros(9)), ("c", torch.zeros(1))]
        self.received: list[str] = []
        self.receipts: dict[str, bytes] = {}
        self.sent_digests = b""

    def prepare(self) -> dict[str, Any]:
        return {}

    def init_process_group(self, *arguments: Any, **metadata: Any) -> None:
        assert self.may_join.wait(10)
        self.master = True

    async def receive_weights(self) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        for name, tensor in self.stream:
            self.received.append(name)
            yield name, tensor

    def stays(self, tensor: torch.Tensor) -> bool:
        return False

    def post_receipt(self, topic: str, payload: bytes) -> None:
        self.receipts[topic] = payload
        self.posted.set()

    def is_master_there(self) -> bool:
        assert self.answers.wait(10)
        return self.master

    def finalize(self) -> None:
        self.may_join.set()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(link_module, "get_engine", lambda name: lambda **settings: engine)
    return engine


def make_link(adapter: Adapter | None = None) -> Link:
    request = JoinRequest(
        engine="fake",
        metadata={},
        rank_offset=1,
        world_size=2,
        bucket_size=1,
        timeout_s=5.0,
        verify=False,
        client="a",
        adapter=adapter,
    )
    return Link(request, "a-token-of-the-server")


def test_a_link_that_still_joins_counts_as_alive(engine: FakeEngine) -> None:
    """Or the next trainer that connects would end it, to take its slot."""
    link = make_link()
    link.join(1, dict)  # type: ignore[arg-type]
    assert alive([link]) == [link]
    engine.may_join.set()
    assert engine.posted.wait(10)
    link.submit(lambda: None).result(10)
    assert alive([link]) == [link]
    engine.master = False
    assert alive([link]) == []
    link.close()


def test_trainers_that_do_not_answer_are_asked_side_by_side(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "PROBE_S", 0.2)
    links = [make_link() for _ in range(10)]
    engine.answers.clear()
    began = time.monotonic()
    assert alive(links) == []
    assert time.monotonic() - began < 1.0
    engine.answers.set()


def staged(engine: FakeEngine) -> Staged:
    return msgspec.msgpack.decode(engine.receipts["staged-1"], type=Staged)


def test_a_trainer_that_was_refused_sends_nothing(engine: FakeEngine) -> None:
    link = make_link(Adapter("math", {}, {"a": (2,)}))
    link.refusal = Failure.of(RolloutError("rank 64 is too much"))
    with pytest.raises(RolloutError, match="rank 64"):
        link.receive(1, lambda stage: "").result(10)
    assert staged(engine).failure == link.refusal
    assert engine.received == []
    link.close()


def test_the_first_tensor_that_was_not_announced_ends_the_stream(engine: FakeEngine) -> None:
    link = make_link(Adapter("math", {}, {"a": (2,), "b": (3,), "c": (1,)}))
    with pytest.raises(ValueError, match=r"b \[9\] was sent"):
        link.receive(1, lambda stage: "").result(10)
    failure = staged(engine).failure
    assert failure is not None
    assert failure.type == "WeightMismatchError"
    assert engine.received == ["a", "b"]
    link.close()


def test_whole_weights_are_not_announced(engine: FakeEngine) -> None:
    link = make_link()
    link.receive(1, lambda stage: "base").result(10)
    assert staged(engine) == Staged(3, "", None, "base")
    link.close()
