"""Receivers' end of the wire: reads frames into two buckets in turn and hands out views into them.

A tensor that came whole is not copied at all; those that come in chunks are put together in a further buffer, as large
as the largest of them. Where the backend shares the sender's buckets, they are the two. Views of a layout that comes
again are kept, until a stream ends that did not use it. Runs on the engine's thread; digests are computed on one more,
while the next bucket comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch

from twinkle_callbacks.buckets.device_digest import digest_for
from twinkle_callbacks.buckets.digest import first_few
from twinkle_callbacks.buckets.frames import (
    BLOCK_BYTES,
    CONTROL_BYTES,
    MAX_HEADER_BYTES,
    Control,
    End,
    Entry,
    Failure,
    Kind,
    Mapped,
    decode,
    header_in,
    layout_hash,
    pieces,
)
from twinkle_callbacks.buckets.layout import ALIGNMENT_BYTES
from twinkle_callbacks.buckets.packing import dtype_of, memory, nbytes_of, view_at
from twinkle_callbacks.engines.backend import CollectiveBackend, Place
from twinkle_callbacks.errors import DigestMismatchError, ProtocolError, from_wire

NamedTensors = list[tuple[str, torch.Tensor]]


class _Layout(NamedTuple):
    """What a header says of a bucket, checked: its entries, and the bytes of its payload."""

    entries: list[Entry]
    payload_bytes: int


class _Views(NamedTuple):
    """The tensors of a bucket that are all whole, as views into its buffer, kept for the next stream."""

    tensors: NamedTensors
    data: list[memoryview]


class _InPlace(NamedTuple):
    """The tensors of a MAPPED frame, as views into the sender's memory, and the allocations that they are in."""

    tensors: NamedTensors
    data: list[Any]
    tickets: list[bytes]
    addresses: frozenset[int]


class _Joining(NamedTuple):
    """A tensor that comes in chunks, and how many of its bytes are there."""

    entry: Entry
    flat: torch.Tensor
    filled: int


class FrameReceiver:
    """Receives streams of tensors, one stream after another, over a connected backend."""

    def __init__(self, backend: CollectiveBackend, bucket_bytes: int, *, verify: bool) -> None:
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._verify = verify
        self._buffers = [backend.allocate_bucket(0), backend.allocate_bucket(0)]
        self._handed_out: list[int | None] = []  # by the last two buckets: the buffer that their tensors are in
        self._joined = backend.allocate_bucket(0)
        self._layouts: dict[bytes, _Layout] = {}
        self._views: list[dict[bytes, _Views]] = [{}, {}]
        self._in_place: dict[bytes, _InPlace] = {}
        self._shown: set[int] = set()  # addresses of this stream's tensors that are the sender's own
        self._sequence = 0
        self._side = 0
        apart = verify and not self._joined.is_cuda  # a GPU computes beside this thread anyway
        self._digester = ThreadPoolExecutor(1, thread_name_prefix="twinkle-digest") if apart else None
        self._digesting: tuple[list[Future[None]], ...] = ([], [], [])  # of either buffer, and of chunked tensors
        self._start_stream()

    def close(self) -> None:
        """Ends the digest thread."""
        if self._digester is not None:
            self._digester.shutdown(wait=False, cancel_futures=True)

    def _start_stream(self) -> None:
        self.end: End | None = None
        self.digest = digest_for(self._joined.device)
        self._tensors = 0
        self._payload_bytes = 0
        self._used_layouts: set[bytes] = set()
        self._joining: _Joining | None = None
        self._shown = set()
        self.may_read_ahead = True

    def next_bucket(self) -> NamedTensors | None:
        """Receives one frame: the tensors that it completes, or None at the stream's end, which `end` then describes.

        The tensors stay valid until the next call but one, or until the next call if `may_read_ahead` is false: then
        one of them is in the buffer for tensors that come in chunks.
        """
        if self.end is not None:
            self._take_back(0)
            self._start_stream()
        self._take_back(1)
        control, header = self._receive_control()
        if control.kind is Kind.SHARE:
            self._buffers = self._backend.shared_buckets(self._bucket_bytes)
            control, header = self._receive_control()
        if control.kind is Kind.ERROR:
            failure = decode(header, Failure)
            raise from_wire(failure.type, f"the sender failed in the middle of the stream: {failure.message}")
        if control.kind is Kind.END:
            self._finish(decode(header, End))
            return None
        if control.kind in (Kind.CLOSE, Kind.SHARE):
            raise ProtocolError(f"a {control.kind.name} frame came where none can be")
        self.may_read_ahead = True
        if control.kind is Kind.MAPPED:
            self._handed_out.append(None)
            return self._look(control, header)
        layout = self._layout(control, header)
        if not self._backend.shares and len(layout.entries) == 1 and not _is_whole(layout.entries[0]):
            tensors = self._receive_chunk(layout, control.kind)
            self._handed_out.append(None)
        else:
            side = control.side if self._backend.shares else 1 - self._side
            tensors = self._receive_bucket(side, layout, control)
            self._handed_out.append(side)
        self._payload_bytes += layout.payload_bytes
        self._tensors += len(tensors)
        return tensors

    def _take_back(self, keep: int) -> None:
        """Lets the sender fill buffers again, but for those of the last `keep` buckets."""
        while len(self._handed_out) > keep:
            side = self._handed_out.pop(0)
            if side is not None:
                self._wait_digests(self._digesting[side])
                self._backend.release(side)

    def _receive_control(self) -> tuple[Control, bytes]:
        return self._read_control(self._receive(BLOCK_BYTES))

    def _read_control(self, received: torch.Tensor) -> tuple[Control, bytes]:
        block = _bytes_of(received)
        control = Control.unpack(block, self._sequence)
        self._sequence += 1
        if control.header_bytes > MAX_HEADER_BYTES:
            raise ProtocolError(
                f"a header of {control.header_bytes} bytes comes, at most {MAX_HEADER_BYTES} are allowed"
            )
        header = header_in(block, control)
        return control, _bytes_of(self._receive(control.header_bytes)) if header is None else header

    def _receive_payload(
        self, place: torch.Tensor, layout: _Layout, kind: Kind, arrived: Callable[[int], None]
    ) -> list[Entry]:
        """Receives a payload, and the CLOSE frame after it if it was promised. Returns the entries that count.

        Args:
            place: where the payload goes.
            layout: its layout.
            kind: of its frame.
            arrived: called with the number of bytes that are there, after each piece.
        """
        cuts = pieces(layout.payload_bytes, self._backend.piece_bytes)
        under_way = [(end, self._backend.broadcast(place[begin:end])) for begin, end in cuts]
        block = self._backend.allocate(CONTROL_BYTES)
        closing = self._backend.broadcast(block) if kind is Kind.PROMISE else None
        for end, piece in under_way:
            piece.wait()
            arrived(end)
        if closing is None:
            return layout.entries
        closing.wait()
        control, _ = self._read_control(block)
        if control.kind is not Kind.CLOSE or control.entries > len(layout.entries):
            raise ProtocolError(
                f"a promised bucket of {len(layout.entries)} entries is closed by a {control.kind.name} frame of "
                f"{control.entries}"
            )
        return layout.entries[: control.entries]

    def _look(self, control: Control, header: bytes) -> NamedTensors:
        """The tensors of a MAPPED frame."""
        if header:
            if layout_hash(header) != control.layout:
                raise ProtocolError("the header of a MAPPED frame does not match its hash")
            self._in_place[control.layout] = self._mapped(decode(header, Mapped))
        mapped = self._in_place.get(control.layout)
        if mapped is None:
            raise ProtocolError(f"the sender refers to mapped tensors {control.layout.hex()}, unknown here")
        self._used_layouts.add(control.layout)
        self._payload_bytes += control.payload_bytes
        self._tensors += len(mapped.tensors)
        self._shown.update(mapped.addresses)
        self._digest(-1, self.digest.add_tensors, [name for name, _ in mapped.tensors], mapped.data)
        return mapped.tensors

    def _mapped(self, header: Mapped) -> _InPlace:
        tensors, data = [], []
        for entry in header.entries:
            if not 0 <= entry.allocation < len(header.allocations) or any(side < 0 for side in entry.shape):
                raise ProtocolError(f"{entry} describes no tensor that can be mapped")
            dtype = dtype_of(entry.dtype)
            place = Place(header.allocations[entry.allocation], entry.offset)
            flat = self._backend.view(place, nbytes_of(dtype, entry.shape))
            tensors.append((entry.name, flat.view(dtype).view(entry.shape)))
            if self._verify:
                data.append(memory(flat))
        return _InPlace(tensors, data, header.allocations, frozenset(each.data_ptr() for _, each in tensors))

    def stays(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that was handed out is the sender's own, which lasts until its next stream."""
        return tensor.data_ptr() in self._shown

    def _layout(self, control: Control, header: bytes) -> _Layout:
        if header:
            self._layouts[control.layout] = self._checked(control, header)
        layout = self._layouts.get(control.layout)
        if layout is None:
            raise ProtocolError(f"the sender refers to layout {control.layout.hex()}, unknown here")
        if control.payload_bytes != layout.payload_bytes:
            raise ProtocolError(
                f"a bucket of {control.payload_bytes} bytes came with a layout of {layout.payload_bytes} bytes"
            )
        self._used_layouts.add(control.layout)
        return layout

    def _checked(self, control: Control, header: bytes) -> _Layout:
        if layout_hash(header) != control.layout:
            raise ProtocolError("a bucket's header does not match its hash")
        entries = decode(header, list[Entry])
        for entry in entries:
            total = nbytes_of(dtype_of(entry.dtype), entry.shape)
            inside = 0 <= entry.start <= entry.start + entry.nbytes <= total
            placed = entry.offset >= 0 and entry.offset % ALIGNMENT_BYTES == 0
            if not inside or not placed or any(side < 0 for side in entry.shape):
                raise ProtocolError(f"{entry} describes no tensor or chunk that can be in a bucket")
        layout = _Layout(entries, max(map(_end, entries), default=0))
        if layout.payload_bytes > self._bucket_bytes:
            raise ProtocolError(f"a bucket of {layout.payload_bytes} bytes exceeds bucket_size={self._bucket_bytes}")
        if sum(not _is_whole(entry) for entry in entries) > 1:
            raise ProtocolError("a bucket holds chunks of more than one tensor")
        return layout

    def _receive_bucket(self, side: int, layout: _Layout, control: Control) -> NamedTensors:
        self._side, key = side, control.layout
        self._wait_digests(self._digesting[side])  # of the bucket that was in this buffer before
        if layout.payload_bytes > self._buffers[side].numel():
            self._views[side].clear()
            self._buffers[side] = self._backend.allocate_bucket(layout.payload_bytes)
        views = self._views[side].get(key)
        if views is None and all(_is_whole(entry) for entry in layout.entries):
            views = self._views[side][key] = self._view_all(self._buffers[side], layout.entries)
        if views is None:
            entries = self._receive_payload(self._buffers[side], layout, control.kind, lambda _: None)
            return [item for entry in entries for item in self._unpack(side, entry)]
        return self._receive_views(side, layout, control.kind, views)

    def _receive_views(self, side: int, layout: _Layout, kind: Kind, views: _Views) -> NamedTensors:
        """A bucket of whole tensors; their digests are computed as they arrive."""
        digested = 0

        def digest(filled_bytes: int) -> None:
            nonlocal digested
            first = digested
            while digested < len(layout.entries) and _end(layout.entries[digested]) <= filled_bytes:
                digested += 1
            names = [entry.name for entry in layout.entries[first:digested]]
            self._digest(side, self.digest.add_tensors, names, views.data[first:digested])

        digest(0)  # of a bucket of empty tensors, which has no pieces
        counting = len(self._receive_payload(self._buffers[side], layout, kind, digest))
        if counting < digested:
            self._digest(side, self.digest.drop_last, digested - counting)
        return views.tensors[:counting]

    def _view_all(self, buffer: torch.Tensor, entries: list[Entry]) -> _Views:
        tensors = [(e.name, view_at(buffer, e.offset, dtype_of(e.dtype), e.shape)) for e in entries]
        data = [memory(buffer)[e.offset : e.offset + e.nbytes] for e in entries] if self._verify else []
        return _Views(tensors, data)

    def _unpack(self, side: int, entry: Entry) -> NamedTensors:
        buffer = self._buffers[side]
        source = buffer[entry.offset : entry.offset + entry.nbytes]
        if _is_whole(entry):
            self._digest(side, self.digest.add_tensors, [entry.name], [memory(source)])
            return [(entry.name, view_at(buffer, entry.offset, dtype_of(entry.dtype), entry.shape))]
        place = self._place_of(entry)
        place.copy_(source)
        return self._complete(entry, place)

    def _receive_chunk(self, layout: _Layout, kind: Kind) -> NamedTensors:
        """A bucket that is one chunk goes straight to its place in the tensor."""
        [entry] = layout.entries
        if entry.nbytes != layout.payload_bytes:
            raise ProtocolError(f"{entry} is alone in a bucket of {layout.payload_bytes} bytes")
        place = self._place_of(entry)
        counts = self._receive_payload(place, layout, kind, lambda _: None)
        return self._complete(entry, place) if counts else []

    def _place_of(self, entry: Entry) -> torch.Tensor:
        if entry.start == 0 and self._joining is None:
            self._joining = _Joining(entry, self._room_for(nbytes_of(dtype_of(entry.dtype), entry.shape)), 0)
        known = self._joining
        if known is None or (entry.name, entry.dtype, entry.shape) != (
            known.entry.name,
            known.entry.dtype,
            known.entry.shape,
        ):
            raise ProtocolError(f"a chunk of {entry.name!r} at byte {entry.start} came without the ones before it")
        if entry.start != known.filled:
            raise ProtocolError(
                f"a chunk of {entry.name!r} at byte {entry.start} came where byte {known.filled} is next"
            )
        return known.flat[entry.start : entry.start + entry.nbytes]

    def _room_for(self, nbytes: int) -> torch.Tensor:
        self._wait_digests(self._digesting[-1])  # of the tensor that was there before
        if nbytes > self._joined.numel():
            self._joined = self._backend.allocate_bucket(nbytes)
        return self._joined[:nbytes]

    def _complete(self, entry: Entry, chunk: torch.Tensor) -> NamedTensors:
        assert self._joining is not None
        flat, filled = self._joining.flat, entry.start + entry.nbytes
        self._joining = self._joining._replace(filled=filled)
        first, last = entry.start == 0, filled == flat.numel()
        self._digest(-1, partial(self.digest.add_chunk, first=first, last=last), entry.name, memory(chunk))
        if not last:
            return []
        self._joining, self.may_read_ahead = None, False
        return [(entry.name, flat.view(dtype_of(entry.dtype)).view(entry.shape))]

    def _digest(self, side: int, call: Callable[..., None], *args: Any) -> None:
        if self._digester is not None:
            self._digesting[side].append(self._digester.submit(call, *args))
        elif self._verify:
            call(*args)

    def _wait_digests(self, pending: list[Future[None]]) -> None:
        for future in pending:
            future.result()
        pending.clear()

    def _finish(self, end: End) -> None:
        for pending in self._digesting:
            self._wait_digests(pending)
        if self._joining is not None or (end.tensors, end.payload_bytes) != (self._tensors, self._payload_bytes):
            raise ProtocolError(
                f"the stream ended after {self._tensors} tensors and {self._payload_bytes} bytes; "
                f"the sender counts {end.tensors} and {end.payload_bytes}"
            )
        if self._verify and end.digests:
            differing = self.digest.differing(end.digests)
            if differing:
                raise DigestMismatchError(f"{len(differing)} tensors arrived damaged: {first_few(differing)}")
        self._layouts = {key: layout for key, layout in self._layouts.items() if key in self._used_layouts}
        for side, views in enumerate(self._views):
            self._views[side] = {key: kept for key, kept in views.items() if key in self._used_layouts}
        self._in_place = {key: kept for key, kept in self._in_place.items() if key in self._used_layouts}
        self._backend.unmap_all_but({ticket for kept in self._in_place.values() for ticket in kept.tickets})
        self.end = end

    def _receive(self, nbytes: int) -> torch.Tensor:
        buffer = self._backend.allocate(nbytes)
        self._backend.broadcast(buffer).wait()
        return buffer


def _bytes_of(buffer: torch.Tensor) -> bytes:
    return bytes(buffer.cpu().numpy())


def _end(entry: Entry) -> int:
    return entry.offset + entry.nbytes


def _is_whole(entry: Entry) -> bool:
    return entry.start == 0 and entry.nbytes == nbytes_of(dtype_of(entry.dtype), entry.shape)
