"""The one collective engine: everything but the transport, which a `CollectiveBackend` provides.

Reading order: `rendezvous.py` (who may join), this file (lifecycle, threads), `sender.py` and `receiver.py` (frames).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

import msgspec
import torch

from twinkle_callbacks import auth
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.engines.backend import CollectiveBackend
from twinkle_callbacks.engines.base import CheckpointEngine
from twinkle_callbacks.engines.receiver import FrameReceiver
from twinkle_callbacks.engines.rendezvous import Metadata, Rendezvous, parse_metadata
from twinkle_callbacks.engines.sender import FrameSender
from twinkle_callbacks.errors import ConfigError, DigestMismatchError, EngineError, PoisonedError, from_wire

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Ack(msgspec.Struct, frozen=True):
    """A receiver's answer to a stream: the digest of what it holds, empty when it computes none, or its error."""

    digest: str
    failure: Failure | None = None


class CollectiveCheckpointEngine(CheckpointEngine):
    """Broadcasts frames from rank 0 over a private group. Subclasses name the engine and its backend.

    All transport calls, and the iterable given to `send_weights`, run on one thread of the engine's own, so neither an
    event loop nor the caller's thread ever blocks in them.
    """

    backend_cls: ClassVar[type[CollectiveBackend]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rendezvous: Rendezvous | None = None
        self._backend: CollectiveBackend | None = None
        self._sender: FrameSender | None = None
        self._receiver: FrameReceiver | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._rank: int | None = None
        self._world_size = 0
        self._streams = 0
        self._poison: BaseException | None = None

    def prepare(self) -> dict[str, Any]:
        if self._rendezvous is not None or self._rank is not None:
            raise EngineError("prepare() was called already; call finalize() before preparing again")
        if not self.is_master:
            return {}
        self._rendezvous = Rendezvous.host_session(self.host, self.name, auth.load_token(self._token), self.timeout_s)
        return dict(msgspec.to_builtins(self._rendezvous.metadata))

    def init_process_group(self, rank: int, world_size: int, *, master_metadata: dict[str, Any]) -> None:
        if self._rank is not None:
            raise EngineError(f"this engine is in a group already, as rank {self._rank}; call finalize() first")
        metadata = parse_metadata(master_metadata)
        self._check_role(rank, world_size, metadata)
        self._rank, self._world_size = rank, world_size
        if rank >= 0:
            self._run(self._connect, metadata)

    def _check_role(self, rank: int, world_size: int, metadata: Metadata) -> None:
        if metadata.engine != self.name:
            raise ConfigError(f"the master uses engine {metadata.engine!r}, this side {self.name!r}; use the same")
        if not -1 <= rank < world_size or (rank == 0) != self.is_master:
            raise ConfigError(
                f"rank={rank}, world_size={world_size}, is_master={self.is_master}: the master has rank 0, receivers "
                f"1 to world_size - 1, and trainer ranks that do not send -1"
            )
        if rank == 0 and self._rendezvous is None:
            raise EngineError("call prepare() on the master before init_process_group()")

    def _connect(self, metadata: Metadata) -> None:
        assert self._rank is not None
        if self._rank == 0:
            assert self._rendezvous is not None
            self._rendezvous.admit(self._world_size, self.bucket_size)
        else:
            self._rendezvous = Rendezvous.join_session(metadata, auth.load_token(self._token), self.timeout_s)
            self._rendezvous.enter(self._rank, self._world_size, self.bucket_size)
        host = metadata.host if self._rank == 0 else self._rendezvous.own_address()
        self._backend = self.backend_cls()
        self._backend.connect(
            self._rendezvous.group_store(), self._rank, self._world_size, host=host, timeout_s=self.timeout_s
        )
        logger.info(
            "engine %s: rank %d of %d joined session %s", self.name, self._rank, self._world_size, metadata.session
        )

    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self._rank is None:
            raise EngineError("call init_process_group() before send_weights()")
        if self._rank < 0:
            await self._run_async(lambda: _exhaust(weights))
        else:
            await self._run_async(lambda: self._send(weights))

    def _send(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        assert self._backend is not None
        if not self.is_master:
            raise EngineError(f"rank {self._rank} is a receiver; only the master sends")
        if self._sender is None:
            self._sender = FrameSender(self._backend, self.bucket_size, verify=self.verify)
        self._streams += 1
        iterator = iter(weights)
        try:
            stats = self._sender.send(iterator)
            acks = self.collect_receipts(f"ack/{self._streams}", range(1, self._world_size))
        except EngineError as error:
            raise self._explain(error) from error
        finally:
            _exhaust(
                iterator
            )  # every trainer rank takes part in each gather, so the rest is drained even after a failure
        for rank, data in acks.items():
            ack = msgspec.msgpack.decode(data, type=Ack)
            if ack.failure is not None:
                raise from_wire(ack.failure.type, f"rank {rank}: {ack.failure.message}")
            if ack.digest and stats.digest and ack.digest != stats.digest:
                raise DigestMismatchError(
                    f"rank {rank} received a stream of digest {ack.digest}, sent was {stats.digest}"
                )
        self.stats = stats

    def _explain(self, error: EngineError) -> EngineError:
        """Prefers a receiver's own account of why it left over the broken connection that this side saw."""
        assert self._rendezvous is not None
        for rank, data in self._rendezvous.posted(f"ack/{self._streams}", range(1, self._world_size)).items():
            ack = msgspec.msgpack.decode(data, type=Ack)
            if ack.failure is not None:
                cause = from_wire(ack.failure.type, f"rank {rank} gave up: {ack.failure.message}")
                return cause if isinstance(cause, EngineError) else EngineError(str(cause))
        return error

    async def receive_weights(self) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        if self._backend is None or self.is_master:
            raise EngineError("receive_weights() is for receivers, after init_process_group()")
        self._streams += 1
        topic = f"ack/{self._streams}"
        finished = False
        try:
            bucket = await self._run_async(self._next_bucket)
            while bucket is not None:
                following = self._submit(self._next_bucket)  # the next bucket comes in while this one is used
                for item in bucket:
                    yield item
                bucket = await self._await(following)
            finished = True
            self._acknowledge(topic)
        except Exception as error:
            self._poisoned_by(error)
            self._complain(topic, error)
            raise
        finally:
            if not finished and self._poison is None:
                self._poisoned_by(EngineError("the consumer left receive_weights() before the stream's end"))

    def _next_bucket(self) -> list[tuple[str, torch.Tensor]] | None:
        assert self._backend is not None
        if self._receiver is None:
            self._receiver = FrameReceiver(self._backend, self.bucket_size, verify=self.verify)
        return self._receiver.next_bucket()

    def _acknowledge(self, topic: str) -> None:
        assert self._receiver is not None
        digest = self._receiver.digest.hexdigest() if self.verify else ""
        self.post_receipt(topic, msgspec.msgpack.encode(Ack(digest)))

    def _complain(self, topic: str, error: BaseException) -> None:
        try:
            self.post_receipt(topic, msgspec.msgpack.encode(Ack("", Failure.of(error))))
        except EngineError as unreachable:
            logger.warning("engine %s: could not tell the master why: %s", self.name, unreachable)

    @property
    def sent_digests(self) -> bytes:
        """On a receiver, after a stream: the master's digest of each tensor, packed; empty if it computed none."""
        if self._receiver is None or self._receiver.end is None:
            return b""
        return self._receiver.end.digests

    def post_receipt(self, topic: str, payload: bytes) -> None:
        self._joined().post(topic, payload)

    def collect_receipts(self, topic: str, ranks: Iterable[int]) -> dict[int, bytes]:
        return self._joined().collect(topic, ranks, f"send its {topic.split('/')[0]}")

    def _joined(self) -> Rendezvous:
        if self._rendezvous is None:
            raise EngineError("this engine is in no group; call init_process_group() first")
        return self._rendezvous

    def finalize(self) -> None:
        thread, self._thread = self._thread, None
        backend, self._backend = self._backend, None
        if self._receiver is not None:
            self._receiver.close()
        self._sender = self._receiver = None
        self._rendezvous = None
        self._rank, self._streams, self._poison = None, 0, None
        if backend is not None:
            backend.close()
        if thread is not None:
            thread.shutdown(wait=False, cancel_futures=True)  # a call that is stuck in there ends by its own deadline

    def _submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        if self._poison is not None:
            raise PoisonedError(f"this engine failed before ({self._poison}); call finalize() and set it up again")
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"twinkle-{self.name}")
        return self._thread.submit(call, *args)

    def _run(self, call: Callable[..., T], *args: Any) -> T:
        future = self._submit(call, *args)
        try:
            return future.result()
        except BaseException as error:
            self._poisoned_by(error)
            raise

    async def _run_async(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await self._await(self._submit(call, *args))
        except PoisonedError:
            raise
        except BaseException as error:
            self._poisoned_by(error)
            raise

    async def _await(self, future: Future[T]) -> T:
        return await asyncio.wrap_future(future)

    def _poisoned_by(self, error: BaseException) -> None:
        if self._poison is None:
            self._poison = error
            logger.warning("engine %s: poisoned by %s: %s", self.name, type(error).__name__, error)


def _exhaust(weights: Iterable[Any]) -> None:
    for _ in weights:
        pass
