"""Threads that outlive a call: the loop in a notebook, after an error, closed and dropped; and calls that end late."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from twinkle_callbacks.engines.thread import EngineThread, LoopThread

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


def test_a_loop_that_is_dropped_ends() -> None:
    loop = LoopThread(NAME)
    ended, _ = loop.run(where)
    [thread] = [thread for thread in threading.enumerate() if thread.name == NAME]
    del loop
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
    assert ended.is_closed()


def test_calls_of_a_thread_that_was_abandoned_fail_at_once() -> None:
    thread = EngineThread(NAME)
    over, ran = RuntimeError("over"), threading.Event()
    thread.abandon(over)
    thread.abandon(RuntimeError("again"))
    for _ in range(2):
        error = thread.submit(ran.set).exception(5)
        assert isinstance(error, RuntimeError)
        assert error.args == ("over",)
        assert error is not over, "it would keep alive what it was raised through"
    assert not ran.is_set()


def test_a_thread_may_be_abandoned_by_what_it_runs_itself() -> None:
    thread = EngineThread(NAME)
    ended = threading.Event()
    thread.submit(lambda: thread.abandon(RuntimeError("over"), ended.set, 60.0))
    assert ended.wait(5)
