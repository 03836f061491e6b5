"""The seam between the synchronizer and one vLLM engine: vLLM's own control calls, one each phase of a push."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Rollout(ABC):
    """One vLLM engine with all its workers, reached over HTTP or in process.

    Trainer rank 0 calls every method, each from one thread at a time; different rollouts from different threads. A push
    of whole weights is `start`, `update` (the workers receive meanwhile), `update` (they check), `pause`, `finish`,
    `set_version`, `reset_cache`, `resume`; one of an adapter is `call` (the workers receive) and `load_adapter`.
    Methods raise `RolloutError` when vLLM refuses. Each ends within the timeout, but for an engine that runs in this
    very process: its calls take as long as vLLM takes.

    Attributes:
        name: what people call it: its URL, or `local`.
        host: the host its workers run on, as the trainer reaches it.
        token: secret that it signs requests with, None if it signs none.
        timeout_s: seconds that one call may take; a synchronizer sets its own.
    """

    name: str
    host: str
    token: str | None = None
    timeout_s: float = 300.0

    @property
    def held(self) -> bool:
        """Whether it generates nothing before `resume` although no push has paused it, such as one that sleeps."""
        return False

    @abstractmethod
    def world_size(self) -> int:
        """Number of its workers: tensor x pipeline x data parallel. Also the first call, so it checks reachability."""

    @abstractmethod
    def models(self) -> list[str]:
        """Names under which it serves the base model, which no adapter may have."""

    @abstractmethod
    def join(self, request: dict[str, Any]) -> None:
        """Hands each worker an invitation to the engine's group; they join in the background."""

    @abstractmethod
    def start(self) -> None:
        """Opens an update session."""

    @abstractmethod
    def update(self, info: dict[str, Any]) -> None:
        """Tells each worker to receive or to abort, which returns at once, or to check what it received."""

    @abstractmethod
    def finish(self) -> None:
        """Closes the session; workers that hold a complete stage commit it."""

    @abstractmethod
    def pause(self, mode: str, *, clear_cache: bool) -> None:
        """Stops generation for the commit. `mode` says what becomes of requests in flight: keep, wait or abort."""

    @abstractmethod
    def is_paused(self) -> bool:
        """Whether it is paused, by whomever: an earlier trainer may have ended in the middle of a push."""

    @abstractmethod
    def resume(self) -> None:
        """Lifts the pause."""

    @abstractmethod
    def reset_cache(self) -> None:
        """Drops cached prefixes, and makes running requests compute theirs again."""

    @abstractmethod
    def set_version(self, version: int) -> None:
        """Sets the weight version it reports and stamps on outputs."""

    @abstractmethod
    def version(self) -> str:
        """The weight version it reports; `default` before the first push."""

    @abstractmethod
    def call(self, call: dict[str, Any]) -> None:
        """Hands each worker a signed `AdapterCall`; they do it in the background."""

    @abstractmethod
    def load_adapter(self, name: str, path: str) -> None:
        """Lets requests that come from now on and name this adapter be answered with the version at `path`.

        Args:
            name: of the adapter.
            path: of a version that every worker holds, as `AdapterPath` writes it, or a folder of adapter files where
                the rollout runs.
        """

    @abstractmethod
    def unload_adapter(self, name: str) -> None:
        """Takes an adapter away that no request uses."""

    @abstractmethod
    def adapters(self) -> dict[str, str]:
        """Path of the version that each adapter is at, by the adapters' names."""

    @abstractmethod
    def close(self) -> None:
        """Frees the trainer's side of the connection. Idempotent; never raises."""
