"""Buckets that receivers see in the master's own memory: no byte is sent, only word of what is filled and what is read.

What little does travel, control blocks and headers, goes through Gloo, as does the word: one byte, broadcast, says that
a slice is filled; one byte back, from each receiver, that a bucket may be filled again.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import torch

from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.engines.backend import Pending
from twinkle_callbacks.engines.gloo import GlooBackend
from twinkle_callbacks.errors import DeadlineError, EngineError, TwinkleError, from_wire, text_of

if TYPE_CHECKING:
    from torch.distributed import Store


class MappedBackend(GlooBackend):
    """Shares two buckets of the master's; subclasses say in which memory."""

    shares: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._buckets: list[torch.Tensor] = []
        self._store: Any = None
        self._rank = 0
        self._receivers = range(0)
        self._words: dict[int, Pending] = {}  # a send ends when the master asks for it, so the last may be under way

    @abstractmethod
    def create(self, nbytes: int) -> tuple[torch.Tensor, bytes]:
        """On the master: a bucket, and what a receiver needs to map it."""

    @abstractmethod
    def map(self, ticket: bytes, nbytes: int) -> torch.Tensor:
        """On a receiver: the master's bucket.

        Raises:
            EngineError: this process cannot see it.
        """

    def all_mapped(self) -> None:
        """On the master: every receiver has mapped the buckets."""

    def connect(self, store: Store, rank: int, world_size: int, *, host: str, timeout_s: float) -> None:
        super().connect(store, rank, world_size, host=host, timeout_s=timeout_s)
        self._store, self._rank, self._receivers = store, rank, range(1, world_size)

    def shared_buckets(self, nbytes: int) -> list[torch.Tensor]:
        self._buckets = self._share(nbytes) if self._rank == 0 else self._map_all(nbytes)
        return self._buckets

    def _share(self, nbytes: int) -> list[torch.Tensor]:
        try:
            made = [self.create(nbytes) for _ in range(2)]
        except TwinkleError as error:
            self._store.set("buckets", msgspec.msgpack.encode(Failure.of(error)))
            raise
        self._store.set("buckets", msgspec.msgpack.encode([ticket for _, ticket in made]))
        for rank in self._receivers:
            self._check_mapped(rank)
        self.all_mapped()
        return [bucket for bucket, _ in made]

    def _map_all(self, nbytes: int) -> list[torch.Tensor]:
        told = msgspec.msgpack.decode(
            self._get("buckets", "the master", "share its buckets"), type=list[bytes] | Failure
        )
        if isinstance(told, Failure):
            raise from_wire(told.type, f"the master: {told.message}", EngineError)
        try:
            mapped = [self.map(ticket, nbytes) for ticket in told]
        except TwinkleError as error:
            self._store.set(f"mapped/{self._rank}", f"{type(error).__name__}:{error}")
            raise
        self._store.set(f"mapped/{self._rank}", "")
        return mapped

    def _check_mapped(self, rank: int) -> None:
        kind, _, reason = self._get(f"mapped/{rank}", f"rank {rank}", "map the buckets").decode().partition(":")
        if kind:
            raise from_wire(kind, f"rank {rank}: {reason}", EngineError)

    def _get(self, key: str, who: str, doing: str) -> bytes:
        try:
            return bytes(self._store.get(key))
        except RuntimeError as error:
            raise DeadlineError(f"{who} did not {doing} within {self._timeout_s:g} s: {text_of(error)}") from error

    def broadcast(self, buffer: torch.Tensor) -> Pending:
        if not any(_holds(bucket, buffer) for bucket in self._buckets):
            return super().broadcast(buffer)
        if self._rank == 0:
            self.filled()
        return super().broadcast(_word())

    def release(self, side: int) -> None:
        before = self._words.pop(side, None)
        if before is not None:
            before.wait()  # it has ended, or the master would not have filled this bucket again
        self._words[side] = self.start(lambda group: group.send([_word()], 0, side), "word of a released bucket")

    def reclaim(self, side: int) -> None:
        for word in [self._word_from(rank, side) for rank in self._receivers]:
            word.wait()

    def _word_from(self, rank: int, side: int) -> Pending:
        return self.start(lambda group: group.recv([_word()], rank, side), "word of a released bucket")

    def close(self) -> None:
        self._buckets, self._words, self._store = [], {}, None
        super().close()


def _word() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8)


def _holds(bucket: torch.Tensor, part: torch.Tensor) -> bool:
    return bucket.data_ptr() <= part.data_ptr() < bucket.data_ptr() + bucket.numel()
