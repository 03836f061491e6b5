"""Receivers' end of the wire: reads frames into two buckets in turn and hands out views into them.

A tensor that came whole is not copied at all; one that came in chunks is put together in a tensor of its own. Views of
a layout that comes again are kept. Runs on the engine's thread; digests are computed on one more, while the next bucket
comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch

from twinkle_callbacks.buckets.digest import StreamDigest, first_few
from twinkle_callbacks.buckets.frames import CONTROL_BYTES, Control, End, Entry, Failure, Kind, decode, layout_hash
from twinkle_callbacks.buckets.packing import dtype_of, memory, nbytes_of, view_at
from twinkle_callbacks.engines.backend import CollectiveBackend
from twinkle_callbacks.errors import DigestMismatchError, ProtocolError, from_wire

NamedTensors = list[tuple[str, torch.Tensor]]


class _Layout(NamedTuple):
    """A bucket whose tensors are all whole, seen before: views into its buffer, kept for the next stream."""

    tensors: NamedTensors
    data: list[memoryview]


class FrameReceiver:
    """Receives streams of tensors, one stream after another, over a connected backend."""

    def __init__(self, backend: CollectiveBackend, bucket_bytes: int, *, verify: bool) -> None:
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._verify = verify
        self._buffers = [backend.allocate(0), backend.allocate(0)]
        self._entries_of: dict[bytes, list[Entry]] = {}
        self._layouts: list[dict[bytes, _Layout]] = [{}, {}]
        self._sequence = 0
        self._side = 0
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="twinkle-digest") if verify else None
        self._digesting: tuple[list[Future[None]], ...] = ([], [], [])  # of either buffer, and of chunked tensors
        self._start_stream()

    def close(self) -> None:
        """Ends the digest thread."""
        if self._digester is not None:
            self._digester.shutdown(wait=False, cancel_futures=True)

    def _start_stream(self) -> None:
        self.end: End | None = None
        self.digest = StreamDigest()
        self._tensors = 0
        self._payload_bytes = 0
        self._partial: tuple[str, torch.Tensor] | None = None

    def next_bucket(self) -> NamedTensors | None:
        """Receives one frame: the tensors that it completes, or None at the stream's end, which `end` then describes.

        The tensors of a bucket stay valid until the next call but one.
        """
        if self.end is not None:
            self._start_stream()
        control = Control.unpack(bytes(self._receive(CONTROL_BYTES).numpy()), self._sequence)
        self._sequence += 1
        header = bytes(self._receive(control.header_bytes).numpy()) if control.header_bytes else b""
        if control.kind is Kind.ERROR:
            failure = decode(header, Failure)
            raise from_wire(failure.type, f"the sender failed in the middle of the stream: {failure.message}")
        if control.kind is Kind.END:
            self._finish(decode(header, End))
            return None
        entries = self._entries(control, header)
        if control.payload_bytes > self._bucket_bytes:
            raise ProtocolError(f"a bucket of {control.payload_bytes} bytes exceeds bucket_size={self._bucket_bytes}")
        if len(entries) == 1 and not _is_whole(entries[0]):
            tensors = self._receive_chunk(entries[0])
        else:
            tensors = self._receive_bucket(entries, control)
        self._payload_bytes += control.payload_bytes
        self._tensors += len(tensors)
        return tensors

    def _entries(self, control: Control, header: bytes) -> list[Entry]:
        if not header:
            try:
                return self._entries_of[control.layout]
            except KeyError:
                raise ProtocolError(f"the sender refers to layout {control.layout.hex()}, never seen here") from None
        if layout_hash(header) != control.layout:
            raise ProtocolError("a bucket's header does not match its hash")
        entries = decode(header, list[Entry])
        for entry in entries:
            total = nbytes_of(dtype_of(entry.dtype), entry.shape)
            inside = 0 <= entry.offset <= entry.offset + entry.nbytes <= control.payload_bytes
            if not inside or not 0 <= entry.start <= entry.start + entry.nbytes <= total:
                raise ProtocolError(f"entry {entry} does not fit a bucket of {control.payload_bytes} bytes")
        self._entries_of[control.layout] = entries
        return entries

    def _receive_bucket(self, entries: list[Entry], control: Control) -> NamedTensors:
        self._side = side = 1 - self._side
        self._wait_digests(self._digesting[side])  # of the bucket that was in this buffer before
        if control.payload_bytes > self._buffers[side].numel():
            self._layouts[side].clear()
            self._buffers[side] = self._backend.allocate(control.payload_bytes)
        if control.payload_bytes:
            self._backend.broadcast(self._buffers[side][: control.payload_bytes]).wait()
        layout = self._layouts[side].get(control.layout)
        if layout is None and all(_is_whole(entry) for entry in entries):
            layout = self._layouts[side][control.layout] = self._view_all(self._buffers[side], entries)
        if layout is None:
            return [item for entry in entries for item in self._unpack(side, entry)]
        self._digest(side, self.digest.add_tensors, [name for name, _ in layout.tensors], layout.data)
        return layout.tensors

    def _view_all(self, buffer: torch.Tensor, entries: list[Entry]) -> _Layout:
        tensors = [(e.name, view_at(buffer, e.offset, dtype_of(e.dtype), e.shape)) for e in entries]
        data = [memory(buffer)[e.offset : e.offset + e.nbytes] for e in entries] if self._verify else []
        return _Layout(tensors, data)

    def _unpack(self, side: int, entry: Entry) -> NamedTensors:
        buffer = self._buffers[side]
        source = buffer[entry.offset : entry.offset + entry.nbytes]
        if _is_whole(entry):
            self._digest(side, self.digest.add_tensors, [entry.name], [memory(source)])
            return [(entry.name, view_at(buffer, entry.offset, dtype_of(entry.dtype), entry.shape))]
        place = self._place_of(entry)
        place.copy_(source)
        return self._complete(entry, place)

    def _receive_chunk(self, entry: Entry) -> NamedTensors:
        """A bucket that is one chunk goes straight to its place in the tensor."""
        place = self._place_of(entry)
        self._backend.broadcast(place).wait()
        return self._complete(entry, place)

    def _place_of(self, entry: Entry) -> torch.Tensor:
        if entry.start == 0:
            self._partial = (entry.name, self._backend.allocate(nbytes_of(dtype_of(entry.dtype), entry.shape)))
        if self._partial is None or self._partial[0] != entry.name:
            raise ProtocolError(f"a chunk of {entry.name!r} at byte {entry.start} came without the ones before it")
        return self._partial[1][entry.start : entry.start + entry.nbytes]

    def _complete(self, entry: Entry, chunk: torch.Tensor) -> NamedTensors:
        end = entry.start + entry.nbytes
        assert self._partial is not None
        flat = self._partial[1]
        first, last = entry.start == 0, end == flat.numel()
        self._digest(-1, partial(self.digest.add_chunk, first=first, last=last), entry.name, memory(chunk))
        if end < flat.numel():
            return []
        self._partial = None
        return [(entry.name, flat.view(dtype_of(entry.dtype)).view(entry.shape))]

    def _digest(self, side: int, add: Callable[[Any, Any], None], names: Any, data: Any) -> None:
        if self._digester is not None:
            self._digesting[side].append(self._digester.submit(add, names, data))

    def _wait_digests(self, pending: list[Future[None]]) -> None:
        for future in pending:
            future.result()
        pending.clear()

    def _finish(self, end: End) -> None:
        for pending in self._digesting:
            self._wait_digests(pending)
        if self._partial is not None or (end.tensors, end.payload_bytes) != (self._tensors, self._payload_bytes):
            raise ProtocolError(
                f"the stream ended after {self._tensors} tensors and {self._payload_bytes} bytes; "
                f"the sender counts {end.tensors} and {end.payload_bytes}"
            )
        if self._verify and end.digests:
            differing = self.digest.differing(end.digests)
            if differing:
                raise DigestMismatchError(f"{len(differing)} tensors arrived damaged: {first_few(differing)}")
        self.end = end

    def _receive(self, nbytes: int) -> torch.Tensor:
        buffer = self._backend.allocate(nbytes)
        self._backend.broadcast(buffer).wait()
        return buffer


def _is_whole(entry: Entry) -> bool:
    return entry.start == 0 and entry.nbytes == nbytes_of(dtype_of(entry.dtype), entry.shape)
