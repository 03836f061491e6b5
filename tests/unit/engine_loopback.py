"""A wire in memory at the engines' seam, as unforgiving as a real one, and engines that run over it in one process.

What is sent is read only when the sender waits for it, and a receiver's buffer is garbage until it waits, so a buffer
that is reused or read too early shows as damage.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from twinkle_callbacks.engines.backend import CollectiveBackend, Pending
from twinkle_callbacks.engines.collective import CollectiveCheckpointEngine
from twinkle_callbacks.errors import DeadlineError, EngineError

TOKEN = "a token of the tests"
TIMEOUT_S = 20.0
NamedTensors = list[tuple[str, torch.Tensor]]


class Sent:
    """One message: a slot on the wire whose bytes come when the sender waits."""

    def __init__(self, source: torch.Tensor) -> None:
        self.source = source
        self.data = b""
        self.ready = threading.Event()

    def wait(self) -> None:
        if not self.ready.is_set():
            self.data = self.source.numpy().tobytes()
            self.ready.set()


class Received:
    """The other end of it."""

    def __init__(self, wire: queue.SimpleQueue[Sent | bytes | None], place: torch.Tensor) -> None:
        self.wire, self.place = wire, place
        place.fill_(0xA5)

    def wait(self) -> None:
        try:
            message = self.wire.get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise DeadlineError(f"nothing came within {TIMEOUT_S:g} s") from None
        if isinstance(message, Sent):
            assert message.ready.wait(TIMEOUT_S), "the sender never waited for what it sent"
            message = message.data
        if message is None:
            raise EngineError("the sender closed the connection")
        if len(message) != self.place.numel():
            raise EngineError(f"{len(message)} bytes came where {self.place.numel()} were expected")
        self.place.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))


class LoopbackBackend(CollectiveBackend):
    """Rank 0 and one receiver, joined by a queue."""

    wires: ClassVar[dict[str, queue.SimpleQueue[Sent | bytes | None]]] = {}

    def __init__(
        self,
        rank: int = 0,
        wire: queue.SimpleQueue[Any] | None = None,
        piece_bytes: int = CollectiveBackend.piece_bytes,
    ) -> None:
        self.rank, self.wire = rank, wire or queue.SimpleQueue()
        self.piece_bytes = piece_bytes

    def connect(self, store: Any, rank: int, world_size: int, *, host: str, timeout_s: float) -> None:
        self.rank = rank
        if rank == 0:
            self.wires[str(id(self.wire))] = self.wire
            store.set("wire", str(id(self.wire)))
        else:
            self.wire = self.wires.pop(store.get("wire").decode())

    def allocate(self, nbytes: int) -> torch.Tensor:
        assert nbytes <= 1 << 26, f"{nbytes} bytes are asked for"
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def broadcast(self, buffer: torch.Tensor) -> Pending:
        assert buffer.dtype is torch.uint8
        assert buffer.dim() == 1
        assert buffer.numel() > 0
        if self.rank != 0:
            return Received(self.wire, buffer)
        sent = Sent(buffer)
        self.wire.put(sent)
        return sent

    def close(self) -> None:
        self.wire.put(None)


class LoopbackEngine(CollectiveCheckpointEngine):
    """The real engine over the wire in memory."""

    name: ClassVar[str] = "loopback"
    backend_cls: ClassVar[type[CollectiveBackend]] = LoopbackBackend


def messages(wire: queue.SimpleQueue[Any]) -> list[bytes]:
    """Everything that was sent, in order, taken off the wire."""
    taken = []
    while not wire.empty():
        sent = wire.get()
        assert sent.ready.is_set(), "the sender never waited for what it sent"
        taken.append(sent.data)
    return taken


@contextmanager
def joined(
    timeout_s: float = TIMEOUT_S,
    bucket_size: int = 4096,
    verify: bool = True,
    engine_cls: type[CollectiveCheckpointEngine] = LoopbackEngine,
) -> Iterator[tuple[Any, Any]]:
    """A master and a receiver in one group; `verify` is the receiver's."""
    master = engine_cls(bucket_size, timeout_s, token=TOKEN)
    receiver = engine_cls(bucket_size, timeout_s, token=TOKEN, verify=verify)
    master.is_master = True
    metadata = master.prepare()
    receiver.prepare()
    try:
        with ThreadPoolExecutor(1) as beside:
            entering = beside.submit(receiver.init_process_group, 1, 2, master_metadata=metadata)
            master.init_process_group(0, 2, master_metadata=metadata)
            entering.result()
        yield master, receiver
    finally:
        master.finalize()
        receiver.finalize()


async def transfer(
    master: CollectiveCheckpointEngine,
    receiver: CollectiveCheckpointEngine,
    weights: Iterable[tuple[str, torch.Tensor]],
) -> tuple[BaseException | None, NamedTensors | BaseException]:
    """Sends and receives at once; what either side returned, or the error that it raised."""

    async def receive() -> NamedTensors:
        return [(name, tensor.clone()) async for name, tensor in receiver.receive_weights()]

    sent, received = await asyncio.gather(master.send_weights(weights), receive(), return_exceptions=True)
    return sent, received
