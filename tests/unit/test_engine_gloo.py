"""Gloo's errors, which are only texts: which of them are deadlines. The real Gloo's are in the engine contract."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from twinkle_callbacks.engines.backend import Pending
from twinkle_callbacks.engines.gloo import GlooBackend
from twinkle_callbacks.errors import DeadlineError, EngineError


def failing_with(text: str) -> Pending:
    def wait() -> None:
        raise RuntimeError(text)

    return GlooBackend().start(lambda group: SimpleNamespace(wait=wait), "a broadcast of 4 bytes")


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/unbound_buffer.cc:133] Timed out waiting 2000ms for send operation to complete",
        "Application timeout caused pair closure",  # said by all others when one wait has run out
        "[gloo/transport/tcp/pair.cc:640] Read timeout [10.0.0.1]:7045",
    ],
)
def test_a_wait_that_ran_out_is_a_deadline_whichever_thread_saw_it_first(text: str) -> None:
    with pytest.raises(DeadlineError, match="a peer is stuck or slow"):
        failing_with(text).wait()


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:7045: Connection reset by peer",
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7045",
    ],
)
def test_a_connection_that_broke_is_not_a_deadline(text: str) -> None:
    with pytest.raises(EngineError, match=r"pair\.cc"):
        failing_with(text).wait()
