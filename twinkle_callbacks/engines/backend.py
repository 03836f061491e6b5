"""The small part of the collective engine that differs between Gloo, NCCL and HCCL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch

from twinkle_callbacks.errors import ProtocolError

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


class Place(NamedTuple):
    """Where a tensor lies: what a receiver needs to map the allocation, and the tensor's first byte in it."""

    ticket: bytes
    offset: int


class CollectiveBackend(ABC):
    """A private group of ranks in which rank 0 broadcasts flat uint8 buffers.

    All methods run on one thread, the engine's own. `connect` comes first, `close` last and in any state. Several
    broadcasts may be under way at a time; all ranks start them in the same order.
    """

    shares: ClassVar[bool] = False
    """Whether receivers see the master's buckets in its own memory; else each rank has two of its own."""

    piece_bytes: int = 32 << 20
    """How much of a bucket one `broadcast` carries, at most: few enough calls, yet several under way at a time."""

    @classmethod
    def device(cls) -> int | None:
        """Index of the GPU on which the engine made by this thread is to work; None where it works on the CPU.

        Raises:
            ConfigError: there is none.
        """
        return None

    @abstractmethod
    def connect(self, store: Store, rank: int, world_size: int, *, host: str, timeout_s: float) -> None:
        """Makes the group and its links. `host` is this rank's address towards the others."""

    @abstractmethod
    def allocate(self, nbytes: int) -> torch.Tensor:
        """Returns a flat uint8 buffer that `broadcast` takes, on the backend's device."""

    def allocate_bucket(self, nbytes: int) -> torch.Tensor:
        """Returns a flat uint8 buffer for tensors, on the device where receivers want them."""
        return self.allocate(nbytes)

    def consumed(self) -> None:  # noqa: B027  # on the CPU what was called has been done
        """On a receiver, on its caller's thread: waits until what it started on the tensors it was given is done."""

    def shared_buckets(self, nbytes: int) -> list[torch.Tensor]:
        """The master's two buckets, if `shares`: on the master made anew, elsewhere mapped. All ranks call it once.

        `broadcast` of a slice of one of them copies nothing: it tells the receivers that the slice is filled.

        Raises:
            EngineError, DeadlineError: the same on all ranks: there is no memory, or a receiver cannot see it.
        """
        raise NotImplementedError

    def release(self, side: int) -> None:  # noqa: B027  # nothing to do where no bucket is shared
        """On a receiver: lets the master fill this shared bucket again."""

    def reclaim(self, side: int) -> None:  # noqa: B027  # as `release`
        """On the master: waits until every receiver has released this shared bucket.

        Raises:
            DeadlineError, EngineError: one did not, or is gone.
        """

    def begin_stream(self) -> bool:
        """On the master: a stream begins, and memory may have been freed since the last.

        Makes visible what was written, on whichever thread, to memory that receivers see.

        Returns:
            Whether what lies at an address now lies where it did in the stream before, as far as receivers can see.
        """
        return True

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        """On the master: where receivers can see this tensor itself; None if they cannot."""
        return None

    def filled(self) -> None:  # noqa: B027  # as `release`
        """On the master: makes visible what this thread wrote since the stream began."""

    def view(self, place: Place, nbytes: int) -> torch.Tensor:
        """On a receiver: the bytes at a place, as a flat uint8 tensor.

        Raises:
            EngineError: this process cannot see them.
        """
        raise ProtocolError("the sender's memory cannot be seen over this engine")

    def unmap_all_but(self, tickets: set[bytes]) -> None:  # noqa: B027  # as `release`
        """On a receiver: lets go of all other allocations of the master's."""

    @abstractmethod
    def broadcast(self, buffer: torch.Tensor) -> Pending:
        """Starts sending `buffer` from rank 0 into the same slice on every other rank; `buffer` stays in use."""

    def interrupt(self) -> None:  # noqa: B027  # most notice that peers are gone
        """From any thread: the group is being left, so a call that waits for a peer need not wait for its deadline."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the group on this rank, after the call under way; peers see the connection close."""
