"""Threads of one's own: for an engine's blocking calls, so that nobody else is stuck in them, and for an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_S = 1.0
"""How long a thread is waited for that has nothing more to do."""


class EngineThread:
    """Runs calls in the order in which they are submitted.

    A transport's call cannot be interrupted from outside; it ends by its own deadline. `abandon` frees those who wait
    for it, and as a daemon the thread keeps no process alive for it.
    """

    def __init__(self, name: str, device: int | None = None) -> None:
        """Starts the thread; `device` is the index of the GPU that it works on, None for none."""
        self._device = device
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._waiting: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._ended: Exception | None = None  # what calls get that come too late
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queues a call. After `abandon`, it fails at once, as those that had not ended then."""
        with self._lock:
            if self._ended is None:
                return self._queue(call)
            refused: Future[T] = Future()
            refused.set_exception(_another(self._ended))
            return refused

    def _queue(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._waiting.add(future)
        self._calls.put((future, call))
        return future

    def abandon(self, error: Exception, last: Callable[[], None] = lambda: None, patience_s: float = CLOSE_S) -> None:
        """Fails every call that has not ended, and ends the thread after one more call. Once is enough.

        Args:
            error: what those who wait for a call get.
            last: runs on the thread once the call under way, if any, has ended.
            patience_s: seconds to wait for the thread's end, unless a call is under way.
        """
        with self._lock:
            if self._ended is not None:
                return
            self._ended = _another(error)
            abandoned, self._waiting = self._waiting, set()
            self._queue(last)
            self._calls.put(None)
        is_busy = any(future.running() for future in abandoned)
        for future in abandoned:
            with contextlib.suppress(InvalidStateError):  # cancelled by whoever waited for it
                future.set_exception(error)
        if not is_busy and threading.current_thread() is not self._thread:  # which may drop the last reference
            self._thread.join(patience_s)

    def _run(self) -> None:
        if self._device is not None:
            import torch

            torch.cuda.set_device(self._device)  # a new thread would work on GPU 0
        while (item := self._calls.get()) is not None:
            self._work_off(*item)
            del item  # what a call holds may not outlive it

    def _work_off(self, future: Future[Any], call: Callable[[], Any]) -> None:
        with self._lock:
            if future not in self._waiting or not future.set_running_or_notify_cancel():
                return
        result, error = None, None
        try:
            result = call()
        except BaseException as raised:  # handed to whoever waits
            error = raised
        with self._lock:
            if future not in self._waiting:
                return  # abandoned
            self._waiting.remove(future)
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _another(error: Exception) -> Exception:
    """The same error without what it was raised through, which would live as long."""
    return type(error)(*error.args)


class LoopThread:
    """An event loop on a thread: for a caller that has none, or is inside one that must go on, as in a notebook."""

    def __init__(self, name: str) -> None:
        """Starts nothing yet."""
        self._name = name
        self._running: tuple[EngineThread, asyncio.Runner] | None = None

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs a coroutine to its end. An interrupted one goes on to its own deadline, and the next has a new loop."""
        thread, runner = self._running = self._running or (EngineThread(self._name), asyncio.Runner())
        try:
            return thread.submit(lambda: runner.run(call())).result()
        except BaseException:
            self.close()
            raise

    def close(self, patience_s: float = CLOSE_S) -> None:
        """Ends the thread after what is under way, and waits for that no longer than `patience_s`. Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            thread, runner = running
            thread.abandon(RuntimeError("the loop was closed"), runner.close, patience_s)

    def __del__(self) -> None:  # dropped without close()
        self.close(0.0)
