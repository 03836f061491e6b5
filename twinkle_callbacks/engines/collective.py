"""The one collective engine: everything but the transport, which a `CollectiveBackend` provides.

Reading order: `rendezvous.py` (who may join), this file (lifecycle, threads), `sender.py` and `receiver.py` (frames).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import msgspec
import torch

from twinkle_callbacks import auth
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.engines.backend import CollectiveBackend
from twinkle_callbacks.engines.base import CheckpointEngine
from twinkle_callbacks.engines.receiver import FrameReceiver, NamedTensors
from twinkle_callbacks.engines.rendezvous import Metadata, Rendezvous, parse_metadata
from twinkle_callbacks.engines.sender import FrameSender
from twinkle_callbacks.engines.thread import EngineThread
from twinkle_callbacks.errors import (
    ConfigError,
    DigestMismatchError,
    EngineError,
    PoisonedError,
    from_wire,
    text_of,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

LINK_PROOF_BYTES = 32
LEAVE_S = 5.0


class Ack(msgspec.Struct, frozen=True):
    """A receiver's answer to a stream: the digest of what it holds, empty when it computes none, or its error."""

    digest: str
    failure: Failure | None = None


@dataclass(eq=False)
class _Group:
    """What an engine holds from `prepare()` to `finalize()`; a call that outlives it leaves the next one alone."""

    rendezvous: Rendezvous | None = None
    rank: int | None = None
    world_size: int = 0
    thread: EngineThread | None = None
    backend: CollectiveBackend | None = None
    sender: FrameSender | None = None
    receiver: FrameReceiver | None = None
    streams: int = 0
    poison: str = ""

    def leave(self) -> None:
        """Lets go of everything; on the engine's thread if there is one."""
        try:
            if self.receiver is not None:
                self.receiver.close()
            self.hang_up()
        finally:  # whatever state the device is in
            if self.rendezvous is not None:
                self.rendezvous.close()
            self.sender = self.receiver = None

    def hang_up(self) -> None:
        """Closes the links, so that peers notice; the rendezvous stays."""
        backend, self.backend = self.backend, None
        if backend is not None:
            backend.close()


class CollectiveCheckpointEngine(CheckpointEngine):
    """Broadcasts frames from rank 0 over a private group. Subclasses name the engine and its backend.

    All transport calls, and the iterable given to `send_weights`, run on one thread of the engine's own, so neither an
    event loop nor the caller's thread ever blocks in them.
    """

    backend_cls: ClassVar[type[CollectiveBackend]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group = _Group()
        self._device = self.backend_cls.device()

    def prepare(self) -> dict[str, Any]:
        group = self._group
        if group.rendezvous is not None or group.rank is not None:
            raise EngineError("prepare() was called already; call finalize() before preparing again")
        if not self.is_master:
            return {}
        group.rendezvous = Rendezvous.host_session(self.host, self.name, auth.load_token(self._token), self.timeout_s)
        return dict(msgspec.to_builtins(group.rendezvous.metadata))

    def init_process_group(self, rank: int, world_size: int, *, master_metadata: dict[str, Any]) -> None:
        group = self._group
        if group.rank is not None:
            raise EngineError(f"this engine is in a group already, as rank {group.rank}; call finalize() first")
        metadata = parse_metadata(master_metadata)
        self._check_role(rank, world_size, metadata)
        group.rank, group.world_size = rank, world_size
        if rank < 0:
            return
        try:
            self._submit(group, lambda: self._connect(group, rank, metadata)).result()
        except BaseException as error:
            self._poison(group, error)
            raise

    def _check_role(self, rank: int, world_size: int, metadata: Metadata) -> None:
        if metadata.engine != self.name:
            raise ConfigError(f"the master uses engine {metadata.engine!r}, this side {self.name!r}; use the same")
        if not -1 <= rank < world_size or (rank == 0) != self.is_master:
            raise ConfigError(
                f"rank={rank}, world_size={world_size}, is_master={self.is_master}: the master has rank 0, receivers "
                f"1 to world_size - 1, and trainer ranks that do not send -1"
            )
        if rank == 0 and self._group.rendezvous is None:
            raise EngineError("call prepare() on the master before init_process_group()")

    def _connect(self, group: _Group, rank: int, metadata: Metadata) -> None:
        if rank == 0:
            assert group.rendezvous is not None
            group.rendezvous.admit(group.world_size, self.bucket_size)
        else:
            group.rendezvous = Rendezvous.join_session(metadata, auth.load_token(self._token), self.timeout_s)
            group.rendezvous.enter(rank, group.world_size, self.bucket_size)
        host = metadata.host if rank == 0 else group.rendezvous.own_address()
        group.backend = self.backend_cls()
        store = group.rendezvous.group_store()
        group.backend.connect(store, rank, group.world_size, host=host, timeout_s=self.timeout_s)
        self._prove_links(group)
        logger.info("engine %s: rank %d of %d joined session %s", self.name, rank, group.world_size, metadata.session)

    def _prove_links(self, group: _Group) -> None:
        """Sends fresh bytes over the new links, which receivers send back by the rendezvous, signed with the token.

        A link could lead to a stranger that was faster. This is also the first collective, which sets up what NCCL and
        HCCL set up then.
        """
        assert group.backend is not None
        assert group.rendezvous is not None
        proof = secrets.token_bytes(LINK_PROOF_BYTES)
        buffer = group.backend.allocate(LINK_PROOF_BYTES)
        if group.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(proof), dtype=torch.uint8))
        group.backend.broadcast(buffer).wait()
        if group.rank != 0:
            group.rendezvous.post("linked", bytes(buffer.cpu().numpy()))
            return
        answers = group.rendezvous.collect("linked", range(1, group.world_size), "answer over its new link")
        for rank, answer in answers.items():
            if answer != proof:
                raise EngineError(f"rank {rank} is linked to somebody else than the master at {self.host}")

    def begin_stream(self, *, repeats: bool) -> None:
        group = self._group
        if group.sender is not None and not group.poison:
            self._submit(group, partial(group.sender.begin, repeats=repeats))  # if it fails, the stream is drawn

    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        group = self._usable()
        send = (lambda: _exhaust(weights)) if group.rank == -1 else (lambda: self._send(group, weights))
        try:
            await asyncio.wrap_future(self._submit(group, send))
        except BaseException as error:
            self._poison(group, error)
            raise

    def _send(self, group: _Group, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        assert group.backend is not None
        assert group.rendezvous is not None
        if not self.is_master:
            raise EngineError(f"rank {group.rank} is a receiver; only the master sends")
        group.streams += 1
        ranks, topic = range(1, group.world_size), f"ack/{group.streams}"
        iterator = iter(weights)
        try:
            if group.sender is None:
                group.sender = FrameSender(group.backend, self.bucket_size, verify=self.verify)
            stats = group.sender.send(iterator, self.lasts)
            acks = group.rendezvous.collect(topic, ranks, "acknowledge the stream")
        except EngineError as error:
            if group.sender is not None and group.sender.source_failed:
                raise
            raise _explain(error, group.rendezvous.posted(topic, ranks)) from error
        finally:
            _exhaust(iterator)  # every trainer rank takes part in each gather, also after a failure
        for rank, data in acks.items():
            ack = msgspec.msgpack.decode(data, type=Ack)
            if ack.failure is not None:
                raise from_wire(ack.failure.type, f"rank {rank}: {ack.failure.message}")
            if ack.digest and stats.digest and ack.digest != stats.digest:
                raise DigestMismatchError(
                    f"rank {rank} received a stream of digest {ack.digest}, sent was {stats.digest}"
                )
        self.stats = stats

    async def receive_weights(self) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        group = self._usable()
        backend, rendezvous = group.backend, group.rendezvous
        if backend is None or rendezvous is None or self.is_master:
            raise EngineError("receive_weights() is for receivers, after init_process_group()")
        group.streams += 1
        topic = f"ack/{group.streams}"
        try:
            receiver = await self._receiver(group, backend)
            bucket = await self._next_bucket(group, receiver)
            while bucket is not None:
                # the next bucket comes in while this one is used
                following = self._next_bucket(group, receiver) if receiver.may_read_ahead else None
                for item in bucket:
                    yield item
                backend.consumed()
                bucket = await (following or self._next_bucket(group, receiver))
            digest = receiver.digest.hexdigest() if self.verify else ""
            rendezvous.post(topic, msgspec.msgpack.encode(Ack(digest)))
        except BaseException as error:
            left = EngineError("the consumer left receive_weights() before the stream's end")
            cause = error if isinstance(error, Exception) else left
            self._poison(group, cause)
            self._complain(rendezvous, topic, cause)
            if group.thread is not None:
                group.thread.submit(group.hang_up)  # or the master would wait for its deadline
            raise

    async def _receiver(self, group: _Group, backend: CollectiveBackend) -> FrameReceiver:
        if group.receiver is None:
            make = self._submit(group, lambda: FrameReceiver(backend, self.bucket_size, verify=self.verify))
            group.receiver = await asyncio.wrap_future(make)
        return group.receiver

    def _next_bucket(self, group: _Group, receiver: FrameReceiver) -> asyncio.Future[NamedTensors | None]:
        return asyncio.wrap_future(self._submit(group, receiver.next_bucket))

    def _complain(self, rendezvous: Rendezvous, topic: str, error: BaseException) -> None:
        try:
            rendezvous.post(topic, msgspec.msgpack.encode(Ack("", Failure.of(error))))
        except EngineError as unreachable:
            logger.warning("engine %s: could not tell the master why: %s", self.name, unreachable)

    def stays(self, tensor: torch.Tensor) -> bool:
        receiver = self._group.receiver
        return receiver is not None and receiver.stays(tensor)

    @property
    def sent_digests(self) -> bytes:
        receiver = self._group.receiver
        return b"" if receiver is None or receiver.end is None else receiver.end.digests

    def post_receipt(self, topic: str, payload: bytes) -> None:
        self._session().post(topic, payload)

    def is_master_there(self) -> bool:
        return self._group.rendezvous is not None and self._group.rendezvous.is_master_there()

    def collect_receipts(self, topic: str, ranks: Iterable[int]) -> dict[int, bytes]:
        return self._session().collect(topic, ranks, f"send its {topic}")

    def _session(self) -> Rendezvous:
        if self._group.rendezvous is None:
            raise EngineError("this engine is in no group; call init_process_group() first")
        return self._group.rendezvous

    def finalize(self) -> None:
        group, self._group = self._group, _Group()
        if group.thread is None:
            group.leave()
        else:
            if (backend := group.backend) is not None:
                backend.interrupt()
            ended = EngineError(f"finalize() ended a call of engine {self.name} that was under way")
            group.thread.abandon(ended, group.leave, LEAVE_S)

    def __del__(self) -> None:
        if hasattr(self, "_group") and self._group.thread is not None:  # dropped without finalize()
            self._group.thread.abandon(EngineError("the engine is gone"), self._group.leave, 0.0)

    def _usable(self) -> _Group:
        if self._group.poison:
            raise PoisonedError(
                f"this engine failed before ({self._group.poison}); call finalize() and set it up again"
            )
        if self._group.rank is None:
            raise EngineError("this engine is in no group; call init_process_group() first")
        return self._group

    def _submit(self, group: _Group, call: Callable[[], T]) -> Future[T]:
        if group.thread is None:
            group.thread = EngineThread(f"twinkle-{self.name}", self._device)
        return group.thread.submit(call)

    def _poison(self, group: _Group, error: BaseException) -> None:
        if not group.poison:
            group.poison = text_of(error)
            logger.warning("engine %s: poisoned by %s: %s", self.name, type(error).__name__, group.poison)


def _explain(error: EngineError, posted: dict[int, bytes]) -> EngineError:
    """Prefers a receiver's own account of why it left over the broken connection that this side saw."""
    for rank, data in posted.items():
        ack = msgspec.msgpack.decode(data, type=Ack)
        if ack.failure is not None:
            cause = from_wire(ack.failure.type, f"rank {rank} gave up: {ack.failure.message}")
            return cause if isinstance(cause, EngineError) else EngineError(str(cause))
    return error


def _exhaust(weights: Iterable[Any]) -> None:
    for _ in weights:
        pass
