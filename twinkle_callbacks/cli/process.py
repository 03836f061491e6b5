"""A server as a child process: its output, when it is ready, and that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import httpx

from twinkle_callbacks.errors import ConfigError, DeadlineError, RolloutError

TAIL_LINES = 30
POLL_S = 0.2
TERMINATE_S = 30.0  # vLLM stops its engine core first
DRAIN_S = 2.0  # its descendants, once it is gone


class ServerProcess:
    """One HTTP server and all its descendants, in a process group of their own.

    The constructor starts it, `wait_ready` waits until it serves, `stop` ends it; `stop` must follow in any case. The
    server also ends when the thread that started it does, however that happens.

    Attributes:
        url: where it serves.
        log_path: file with everything it has written to stdout and stderr.
        pid: its process id, also the id of the group.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        url: str,
        log_path: Path,
        echo: BinaryIO | None = None,
    ) -> None:
        """Starts the command.

        Args:
            command: program, given by its full path, and arguments.
            env: its whole environment.
            url: where it will serve.
            log_path: file that its output is written to.
            echo: where its output is also copied to as it comes.

        Raises:
            ConfigError: the log file cannot be written; nothing was started.
        """
        self.url = url
        self.log_path = log_path
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log = log_path.open("wb", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write the server's log to {log_path} ({error}); choose another file") from None
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        tethered = [sys.executable, "-m", "twinkle_callbacks.cli.tether", str(os.getpid()), *command]
        self._process = subprocess.Popen(
            tethered,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, args=(log, echo), name=f"log of {self.pid}", daemon=True)
        self._reader.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Returns once `GET /health` answers 200.

        Raises:
            RolloutError: the server ended first; carries the end of its log.
            DeadlineError: it was not ready after `timeout_s` seconds; carries the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while True:
                if (code := self._process.poll()) is not None:
                    raise RolloutError(self._ended(code))
                with contextlib.suppress(httpx.TransportError):  # not listening yet
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"the server at {self.url} was not ready after {timeout_s:g} s; give it longer with "
                        f"--ready-timeout (ready_timeout_s=) if it still makes progress\n{self.tail()}"
                    )
                self._wait(POLL_S)

    def wait(self) -> None:
        """Blocks for as long as the server runs.

        Raises:
            RolloutError: it ended; carries the end of its log.
        """
        raise RolloutError(self._ended(self._process.wait()))

    def stop(self) -> None:
        """Ends the server and every descendant; returns when they have let go of everything. Any number of times."""
        if self._process.poll() is None:
            self._process.terminate()
            self._wait(TERMINATE_S)
        # The pipe reports its end when the last process that writes to it is gone.
        self._reader.join(DRAIN_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(DRAIN_S)

    def tail(self) -> str:
        """The last lines of its log, indented."""
        lines = (line.decode(errors="replace").rstrip() for line in tuple(self._tail))
        return "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"

    def _wait(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def _ended(self, code: int) -> str:
        self._reader.join(POLL_S)
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"the server at {self.url} ended with {how}; the end of its log:\n{self.tail()}"

    def _read(self, log: RawIOBase, echo: BinaryIO | None) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output, log:
            for line in output:
                log.write(line)
                self._tail.append(line)
                if echo is not None:
                    with contextlib.suppress(BrokenPipeError):  # nobody reads any more; the server must go on
                        echo.write(line)
                        echo.flush()
