"""Buckets that receivers see in the master's own memory: no byte is sent, only word of what is filled and what read.

What little does travel, control blocks and headers, goes through Gloo, as do words, unless a subclass has a faster way:
one byte, broadcast, says that a slice is filled; one byte back, from each receiver, that a bucket may be filled again.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import torch

from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.engines.backend import Pending
from twinkle_callbacks.engines.gloo import GlooBackend
from twinkle_callbacks.errors import DeadlineError, EngineError, TwinkleError, from_wire

if TYPE_CHECKING:
    from torch.distributed import Store


MAPPED = 2
"""Tag of the word that a receiver has mapped the buckets, or could not; 0 and 1 are those of released buckets."""


class _Offer(msgspec.Struct, frozen=True):
    """What a receiver needs to map each bucket, or why there is none; also a receiver's answer."""

    tickets: list[bytes]
    failure: Failure | None = None


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
        if self._rank == 0:
            self._share(nbytes)
        else:
            self._see(nbytes)
        return self._buckets

    def _share(self, nbytes: int) -> None:
        """On the master. What is in the store is announced by a word over the links: those tell at once who is gone."""
        try:
            made = [self.create(nbytes) for _ in range(2)]
        except TwinkleError as error:
            self._offer([], Failure.of(error))
            raise
        self._buckets = [bucket for bucket, _ in made]
        self._offer([ticket for _, ticket in made])
        for rank in self._receivers:
            try:
                self._word_from(rank, MAPPED).wait()
            except DeadlineError as error:
                raise DeadlineError(f"rank {rank} did not map the buckets within {self._timeout_s:g} s") from error
            answer = msgspec.msgpack.decode(self._store.get(f"mapped/{rank}"), type=_Offer)
            if answer.failure is not None:
                raise from_wire(answer.failure.type, f"rank {rank}: {answer.failure.message}", EngineError)
        self.all_mapped()

    def _offer(self, tickets: list[bytes], failure: Failure | None = None) -> None:
        self._store.set("buckets", msgspec.msgpack.encode(_Offer(tickets, failure)))
        super().broadcast(_word()).wait()

    def _see(self, nbytes: int) -> None:
        """On a receiver."""
        super().broadcast(_word()).wait()
        offer = msgspec.msgpack.decode(self._store.get("buckets"), type=_Offer)
        if offer.failure is not None:
            raise from_wire(offer.failure.type, f"the sender: {offer.failure.message}", EngineError)
        failure = None
        try:
            self._buckets = [self.map(ticket, nbytes) for ticket in offer.tickets]
        except TwinkleError as error:
            failure = Failure.of(error)
            raise
        finally:
            self._store.set(f"mapped/{self._rank}", msgspec.msgpack.encode(_Offer([], failure)))
            self._words[MAPPED] = self.start(lambda group: group.send([_word()], 0, MAPPED), "word of mapped buckets")

    def broadcast(self, buffer: torch.Tensor) -> Pending:
        side = next((side for side, bucket in enumerate(self._buckets) if _holds(bucket, buffer)), None)
        if side is None:
            return super().broadcast(buffer)
        if self._rank == 0:
            self.filled()
        return self.word_of_filled(side)

    def word_of_filled(self, side: int) -> Pending:
        """Tells the receivers that the next slice of a bucket is filled; on a receiver, what waits until it is."""
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
