"""Words of one byte from the master to receivers on its host, through named pipes: a slice of a bucket is filled.

The kernel wakes the reader itself. Through a socket and Gloo's threads a word takes 0.2 to 0.4 ms while all cores copy,
so that slices had to be too large for a CPU's cache.
"""

from __future__ import annotations

import os
import select
import stat
import weakref
from pathlib import Path

from twinkle_callbacks.errors import DeadlineError, EngineError


class PipesOut:
    """The master's ends, a pipe for each receiver; `wait` is that of a broadcast which is done at once."""

    def __init__(self, paths: list[Path]) -> None:
        self._handles: list[int] = []
        self.close = weakref.finalize(self, _close, self._handles)
        for path in paths:
            os.mkfifo(path, 0o600)
            # For reading too, or it could not be opened before the receiver has opened it.
            self._handles.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))

    def tell(self) -> None:
        """Sends a word to every receiver."""
        for handle in self._handles:
            try:
                os.write(handle, b"\0")
            except OSError as error:
                raise EngineError(f"no word reaches a receiver: {error}") from error

    def wait(self) -> None:
        """Nothing to wait for: a word is on its way at once."""


class PipeIn:
    """A receiver's end; each `wait` takes a word."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._handles = [os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)]
        self.close = weakref.finalize(self, _close, self._handles)
        if not stat.S_ISFIFO(os.fstat(self._handles[0]).st_mode):
            raise OSError(f"{path} is no pipe")
        self._poll = select.poll()
        self._poll.register(self._handles[0], select.POLLIN)

    def wait(self) -> None:
        """Blocks until the next word is there.

        Raises:
            DeadlineError: none came within the timeout.
            EngineError: the master is gone.
        """
        if not self._poll.poll(self._timeout_s * 1000):
            raise DeadlineError(
                f"the sender filled no slice of a bucket within {self._timeout_s:g} s: it is stuck or slow; raise "
                f"timeout_s if it is only slow"
            )
        if not os.read(self._handles[0], 1):
            raise EngineError("the sender is gone: it has closed its end of a pipe")


def _close(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())
