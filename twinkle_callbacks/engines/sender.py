"""Master's end of the wire: packs tensors into two buckets in turn and broadcasts the one while filling the other.

Each byte is copied once (tensor to bucket) before the wire, or not at all where the backend sends large tensors from
where they are. The plan of a stream is kept: a stream like the one before it is neither planned nor described again.
Both ends forget a layout when a stream ends that did not use it. Runs on the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from twinkle_callbacks.buckets.digest import StreamDigest
from twinkle_callbacks.buckets.frames import MAX_HEADER_BYTES, Control, End, Entry, Failure, Kind, encode, layout_hash
from twinkle_callbacks.buckets.layout import BucketPlanner, Chunk
from twinkle_callbacks.buckets.packing import as_bytes, copyable, dtype_name, memory, view_at
from twinkle_callbacks.engines.backend import CollectiveBackend, Pending
from twinkle_callbacks.engines.base import SendStats
from twinkle_callbacks.errors import DeadlineError, EngineError, SourceError


class _Step(NamedTuple):
    """One tensor of the plan: what it looks like, and where in the buckets it goes.

    `chunks` is empty for a tensor that is sent from where it is. `view` is its place, if it goes there in one piece.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    entries: list[Entry]
    chunks: list[Chunk]
    view: torch.Tensor | None
    data: memoryview | None


class _Bucket:
    """The bucket being filled."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.side = number % 2
        self.steps: list[_Step] = []
        self.entries: list[Entry] = []
        self.used = 0


class FrameSender:
    """Sends streams of tensors as frames, one stream after another, over a connected backend.

    Attributes:
        source_failed: whether the last error came from the tensors to be sent rather than from the wire.
    """

    def __init__(self, backend: CollectiveBackend, bucket_bytes: int, *, verify: bool) -> None:
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._verify = verify
        self._planner = BucketPlanner(bucket_bytes)
        self._buffers = [backend.allocate(bucket_bytes) for _ in range(2)]
        self._pending: list[Pending | None] = [None, None]
        self._plan: list[_Step] = []
        self._headers: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        self._known_layouts: set[bytes] = set()
        self._used_layouts: set[bytes] = set()
        self._sequence = 0
        self._source_s = 0.0
        self.source_failed = False

    @torch.no_grad()
    def send(self, weights: Iterable[tuple[str, torch.Tensor]]) -> SendStats:
        """Sends one stream and its END frame. If `weights` raises, sends that as an ERROR frame and raises it."""
        self._digest = StreamDigest()
        self._bucket = _Bucket(0)
        self._payload_bytes = 0
        self._source_s, self.source_failed = 0.0, False
        tensors = 0
        try:
            for name, tensor in self._drawn(iter(weights)):
                if not isinstance(name, str):
                    raise SourceError(f"{name!r}: expected the name of a tensor, got {type(name).__name__}")
                if not isinstance(tensor, torch.Tensor):
                    raise SourceError(f"{name!r}: expected a tensor, got {type(tensor).__name__}")
                self._send_tensor(self._step(tensors, name, tensor), tensor)
                tensors += 1
            self._flush(0)
        except Exception as error:
            if not self.source_failed and isinstance(error, (EngineError, DeadlineError)):
                raise  # the wire itself is broken, so nothing can be said on it
            self.source_failed = True
            self._send_failure(error)
            raise
        self._drain()
        digest = self._digest.hexdigest() if self._verify else ""
        end = End(tensors, self._payload_bytes, self._digest.pack(), digest)
        self._send_frame(Kind.END, encode(end))
        self._known_layouts, self._used_layouts = self._used_layouts, set()
        return SendStats(tensors, self._payload_bytes, self._source_s, digest, end.digests)

    def _drawn(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as they are asked for; keeps the time that this takes, and whether it fails."""
        while True:
            began = time.perf_counter()
            try:
                item = next(weights)
            except StopIteration:
                return
            except BaseException:
                self.source_failed = True
                raise
            finally:
                self._source_s += time.perf_counter() - began
            yield item

    def _step(self, index: int, name: str, tensor: torch.Tensor) -> _Step:
        """The plan's step for this tensor; plans anew from here on if the stream differs from the one before."""
        if index < len(self._plan):
            step = self._plan[index]
            same = step.name == name and step.dtype is tensor.dtype and step.shape == tensor.shape
            if same and self._is_direct(tensor) is not bool(step.chunks):
                return step
            del self._plan[index:]
            self._headers.clear()
        step = self._plan_tensor(index, name, tensor)
        self._plan.append(step)
        return step

    def _plan_tensor(self, index: int, name: str, tensor: torch.Tensor) -> _Step:
        dtype, shape, nbytes = dtype_name(tensor.dtype), tuple(tensor.shape), tensor.nbytes
        if self._is_direct(tensor):
            starts = range(0, nbytes, self._bucket_bytes)
            entries = [Entry(name, dtype, shape, 0, s, min(self._bucket_bytes, nbytes - s)) for s in starts]
            return _Step(name, tensor.dtype, tensor.shape, entries, [], None, None)
        self._resume_planner(index)
        chunks = self._planner.place(nbytes)
        entries = [Entry(name, dtype, shape, c.offset, c.start, c.nbytes) for c in chunks]
        view = data = None
        if len(chunks) == 1:
            buffer = self._buffers[chunks[0].bucket % 2]
            view = copyable(view_at(buffer, chunks[0].offset, tensor.dtype, shape))
            if self._verify:
                data = memory(buffer)[chunks[0].offset : chunks[0].offset + nbytes]
        return _Step(name, tensor.dtype, tensor.shape, entries, chunks, view, data)

    def _resume_planner(self, index: int) -> None:
        packed = next((step for step in reversed(self._plan[:index]) if step.chunks), None)
        self._planner.resume(packed.chunks[-1] if packed else Chunk(0, 0, 0, 0))
        if packed is not None and packed is not self._plan[index - 1]:
            self._planner.next_bucket()  # a tensor sent from where it is ended the bucket

    def _is_direct(self, tensor: torch.Tensor) -> bool:
        least = self._backend.direct_bytes
        return (
            least is not None
            and tensor.nbytes >= least
            and tensor.is_contiguous()
            and tensor.device == self._buffers[0].device
        )

    def _send_tensor(self, step: _Step, tensor: torch.Tensor) -> None:
        if not step.chunks:
            self._send_direct(step, tensor)
        elif step.view is not None:
            self._enter(step.chunks[0])
            step.view.copy_(copyable(tensor))
            self._bucket.steps.append(step)
            self._add(step.entries[0])
        else:
            self._pack_chunks(step, as_bytes(tensor))

    def _pack_chunks(self, step: _Step, source: torch.Tensor) -> None:
        for entry, chunk in zip(step.entries, step.chunks, strict=True):
            self._enter(chunk)
            self._digest_bucket()  # the order of digests is the order of tensors
            place = self._buffers[self._bucket.side][chunk.offset : chunk.offset + chunk.nbytes]
            place.copy_(source[chunk.start : chunk.start + chunk.nbytes])
            self._digest_chunk(entry, place, source.numel())
            self._add(entry)

    def _send_direct(self, step: _Step, tensor: torch.Tensor) -> None:
        self._flush(self._bucket.number + 1)
        source = as_bytes(tensor)
        for entry in step.entries:
            self._drain()
            chunk = source[entry.start : entry.start + entry.nbytes]
            self._describe([entry], entry.nbytes)
            on_the_wire = self._backend.broadcast(chunk)
            self._digest_chunk(entry, chunk, source.numel())
            on_the_wire.wait()
            self._payload_bytes += entry.nbytes

    def _enter(self, chunk: Chunk) -> None:
        """Makes the chunk's bucket the open one, once its buffer is free."""
        if chunk.bucket != self._bucket.number:
            self._flush(chunk.bucket)
        if not self._bucket.entries:
            self._wait(self._bucket.side)

    def _add(self, entry: Entry) -> None:
        self._bucket.entries.append(entry)
        self._bucket.used = entry.offset + entry.nbytes

    def _flush(self, following: int) -> None:
        """Sends the open bucket and opens number `following`; the payload is on the wire while that one is filled."""
        bucket, self._bucket = self._bucket, _Bucket(following)
        if not bucket.entries:
            return
        self._wait(1 - bucket.side)
        self._describe(bucket.entries, bucket.used)
        if bucket.used:
            self._pending[bucket.side] = self._backend.broadcast(self._buffers[bucket.side][: bucket.used])
        self._digest_steps(bucket)
        self._payload_bytes += bucket.used

    def _describe(self, entries: list[Entry], payload_bytes: int) -> None:
        """Sends the control block of a bucket, and its header unless the receivers have seen this layout."""
        key = (id(entries[0]), len(entries))  # entries are the plan's own objects, alive as long as the cache
        header, layout = self._headers.get(key, (b"", b""))
        if not layout:
            header = encode(entries)
            if len(header) > MAX_HEADER_BYTES:
                raise SourceError(
                    f"{len(entries)} tensors in one bucket need a header of {len(header)} bytes, at most "
                    f"{MAX_HEADER_BYTES} are allowed; make bucket_size smaller"
                )
            layout = layout_hash(header)
            self._headers[key] = (header, layout)
        known = layout in self._known_layouts or layout in self._used_layouts
        self._used_layouts.add(layout)
        self._send_frame(Kind.BUCKET, b"" if known else header, payload_bytes, layout)

    def _digest_bucket(self) -> None:
        self._digest_steps(self._bucket)
        self._bucket.steps = []

    def _digest_steps(self, bucket: _Bucket) -> None:
        if self._verify:
            self._digest.add_tensors(
                (step.name for step in bucket.steps), (step.data for step in bucket.steps if step.data is not None)
            )

    def _digest_chunk(self, entry: Entry, chunk: torch.Tensor, total: int) -> None:
        if self._verify:
            last = entry.start + entry.nbytes == total
            self._digest.add_chunk(entry.name, memory(chunk), first=entry.start == 0, last=last)

    def _send_failure(self, error: BaseException) -> None:
        self._drain()
        self._send_frame(Kind.ERROR, encode(Failure.of(error)))

    def _send_frame(self, kind: Kind, header: bytes, payload_bytes: int = 0, layout: bytes = b"\0" * 16) -> None:
        control = Control(kind, self._sequence, len(header), payload_bytes, layout)
        self._sequence += 1
        self._broadcast_bytes(control.pack())
        if header:
            self._broadcast_bytes(header)

    def _broadcast_bytes(self, data: bytes) -> None:
        buffer = self._backend.allocate(len(data))
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self._backend.broadcast(buffer).wait()

    def _wait(self, side: int) -> None:
        pending, self._pending[side] = self._pending[side], None
        if pending is not None:
            pending.wait()

    def _drain(self) -> None:
        self._wait(0)
        self._wait(1)
