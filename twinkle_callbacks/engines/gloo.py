"""Gloo: TCP between any hosts, CPU tensors; the engine that runs everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from twinkle_callbacks.engines.backend import CollectiveBackend, Pending
from twinkle_callbacks.engines.collective import CollectiveCheckpointEngine
from twinkle_callbacks.errors import DeadlineError, EngineError

if TYPE_CHECKING:
    from torch.distributed import Store


# Gloo has no error types, only texts (gloo/transport/tcp): the wait that runs out says "Timed out waiting ...", and
# closes the pairs, so all other waits say "Application timeout caused pair closure". Which is seen first is a race.
_TIMEOUT = re.compile("timed out|timeout", re.IGNORECASE)


class _GlooWork:
    """A broadcast under way. It keeps connections open, so it is let go of when it has ended or the group closes."""

    def __init__(self, work: Any, timeout_s: float) -> None:
        self.work = work
        self._timeout_s = timeout_s

    def wait(self) -> None:
        work, self.work = self.work, None
        try:
            work.wait()
        except RuntimeError as error:
            del work  # the error's traceback keeps this frame
            if _TIMEOUT.search(str(error)):
                raise DeadlineError(
                    f"a broadcast took longer than {self._timeout_s:g} s: a peer is stuck or slow; "
                    f"raise timeout_s if it is only slow"
                ) from error
            raise EngineError(f"the connection to a peer broke in a broadcast: {error}") from error


class GlooBackend(CollectiveBackend):
    """A `ProcessGroupGloo` of its own, independent of the default group of torch.distributed."""

    def __init__(self) -> None:
        self._group: Any = None
        self._works: list[_GlooWork] = []
        self._timeout_s = 0.0

    def connect(self, store: Store, rank: int, world_size: int, *, host: str, timeout_s: float) -> None:
        from torch.distributed import ProcessGroupGloo

        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # absent from torch's stubs
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=timeout_s)
        self._timeout_s = timeout_s
        try:
            self._group = ProcessGroupGloo(store, rank, world_size, options)
        except RuntimeError as error:
            raise EngineError(f"Gloo could not connect rank {rank} of {world_size} from {host}: {error}") from error

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def broadcast(self, buffer: torch.Tensor) -> Pending:
        return self.start(lambda group: group.broadcast(buffer, 0), f"a broadcast of {buffer.numel()} bytes")

    def start(self, call: Callable[[Any], Any], what: str) -> Pending:
        """Starts a call of the process group."""
        try:
            work = _GlooWork(call(self._group), self._timeout_s)
        except RuntimeError as error:
            raise EngineError(f"Gloo refused {what}: {error}") from error
        self._works = [*(each for each in self._works if each.work is not None), work]
        return work

    def close(self) -> None:
        for each in self._works:
            each.work = None
        self._works, self._group = [], None


class GlooCheckpointEngine(CollectiveCheckpointEngine):
    """Sends over TCP with Gloo. Needs nothing but torch; tensors on other devices are copied to the CPU first."""

    name: ClassVar[str] = "gloo"
    backend_cls: ClassVar[type[CollectiveBackend]] = GlooBackend
