"""The small part of the collective engine that differs between Gloo, NCCL and HCCL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch.distributed import Store


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Blocks until this rank's buffer may be used again.

        Raises:
            DeadlineError: it took longer than the group's timeout.
            EngineError: a peer is gone or the transport failed.
        """


class CollectiveBackend(ABC):
    """A private group of ranks in which rank 0 broadcasts flat uint8 buffers.

    All methods run on one thread, the engine's own. `connect` comes first, `close` last and in any state. Several
    broadcasts may be under way at a time; all ranks start them in the same order.
    """

    @abstractmethod
    def connect(self, store: Store, rank: int, world_size: int, *, host: str, timeout_s: float) -> None:
        """Makes the group and its links. `host` is this rank's address towards the others."""

    @abstractmethod
    def allocate(self, nbytes: int) -> torch.Tensor:
        """Returns a flat uint8 buffer that `broadcast` takes, on the backend's device."""

    def shared_buckets(self, nbytes: int) -> list[torch.Tensor] | None:
        """The master's two buckets, if receivers see its memory: on the master made anew, elsewhere mapped.

        All ranks call it, before the first frame. `broadcast` of a slice of one of them copies nothing: it tells the
        receivers that the slice is filled. None where each rank has buckets of its own.
        """
        return None

    def release(self, side: int) -> None:  # noqa: B027  # nothing to do where no bucket is shared
        """On a receiver: lets the master fill this shared bucket again."""

    def reclaim(self, side: int) -> None:  # noqa: B027  # as `release`
        """On the master: waits until every receiver has released this shared bucket.

        Raises:
            DeadlineError, EngineError: one did not, or is gone.
        """

    @abstractmethod
    def broadcast(self, buffer: torch.Tensor) -> Pending:
        """Starts sending `buffer` from rank 0 into the same slice on every other rank; `buffer` stays in use."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the group on this rank, after the call under way; peers see the connection close."""
