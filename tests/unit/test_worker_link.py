"""A worker's link to one trainer: when it counts as alive."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from twinkle_callbacks.worker import link as link_module
from twinkle_callbacks.worker.link import Link
from twinkle_callbacks.worker.messages import JoinRequest


class FakeEngine:
    """Joins when it is let; knows its master from then on."""

    def __init__(self, **settings: Any) -> None:
        self.may_join, self.posted, self.master = threading.Event(), threading.Event(), False

    def prepare(self) -> dict[str, Any]:
        return {}

    def init_process_group(self, *arguments: Any, **metadata: Any) -> None:
        assert self.may_join.wait(10)
        self.master = True

    def post_receipt(self, topic: str, payload: bytes) -> None:
        self.posted.set()

    def is_master_there(self) -> bool:
        return self.master

    def finalize(self) -> None:
        self.may_join.set()


def test_a_link_that_still_joins_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the next trainer that connects would end it, to take its slot."""
    engine = FakeEngine()
    monkeypatch.setattr(link_module, "get_engine", lambda name: lambda **settings: engine)
    request = JoinRequest(
        engine="fake", metadata={}, rank_offset=1, world_size=2, bucket_size=1, timeout_s=5.0, verify=True, client="a"
    )
    link = Link(request, "a-token-of-the-server")
    link.join(1, dict)  # type: ignore[arg-type]
    assert link.is_alive()
    engine.may_join.set()
    assert engine.posted.wait(10)
    link.submit(lambda: None).result(10)
    assert link.is_alive()
    engine.master = False
    assert not link.is_alive()
    link.close()
