"""The loop on a thread of its own: in a notebook, after an error, and when it is closed."""

from __future__ import annotations

import asyncio
import threading

import pytest

from twinkle_callbacks.engines.thread import LoopThread

NAME = "test-loop"


def is_running() -> bool:
    return NAME in {thread.name for thread in threading.enumerate()}


async def where() -> tuple[asyncio.AbstractEventLoop, str]:
    return asyncio.get_running_loop(), threading.current_thread().name


def test_coroutines_share_a_loop_beside_that_of_the_caller() -> None:
    loop = LoopThread(NAME)

    async def caller() -> None:
        first, name = loop.run(where)
        assert loop.run(where) == (first, name) == (first, NAME)
        assert first is not asyncio.get_running_loop()

    asyncio.run(caller())
    assert is_running()
    loop.close()
    loop.close()
    assert not is_running()


def test_after_an_error_there_is_a_new_loop() -> None:
    loop = LoopThread(NAME)

    async def fail() -> None:
        raise ValueError("no")

    before, _ = loop.run(where)
    with pytest.raises(ValueError, match="no"):
        loop.run(fail)
    assert not is_running()
    assert before.is_closed()
    after, _ = loop.run(where)
    assert after is not before
    loop.close()
