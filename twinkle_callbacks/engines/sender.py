"""Master's end of the wire: packs tensors into two buckets in turn and broadcasts the one while filling the other.

Each byte is copied once (tensor to bucket) before the wire. The plan of a stream is kept: a stream like the one before
it is neither planned nor described again, and each of its buckets is announced before it is filled, so that receivers
are ready for its pieces as they come. Both ends forget a layout when a stream ends that did not use it. A
stream of which receivers see each tensor where they saw it before is not even drawn. Runs on the engine's thread.

What lay in host memory is packed and digested two MiB at a time, while the CPU still has it in its cache: that is three
times as fast as from memory, and leaves more of the cores to the wire and of the memory's speed to receivers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator

import torch

from twinkle_callbacks.buckets.device_digest import digest_for, digestible
from twinkle_callbacks.buckets.frames import (
    MAX_HEADER_BYTES,
    Control,
    End,
    Entry,
    Failure,
    Kind,
    blocks,
    encode,
    layout_hash,
    pieces,
)
from twinkle_callbacks.buckets.layout import BucketPlanner, Chunk
from twinkle_callbacks.buckets.packing import as_bytes, copyable, dtype_name, memory, view_at
from twinkle_callbacks.engines.backend import CollectiveBackend, Pending
from twinkle_callbacks.engines.base import SendStats
from twinkle_callbacks.engines.mapped_frames import Frame, LyingTensor, MappedFrames
from twinkle_callbacks.engines.plan import Bucket, Outline, Step
from twinkle_callbacks.errors import DeadlineError, EngineError, SourceError

_CACHED_BYTES = 2 << 20
_MAPPED_TOGETHER = 128  # tensors in one MAPPED frame: receivers look at them while the next are drawn


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
        self._buffers = [] if backend.shares else [backend.allocate_bucket(bucket_bytes) for _ in range(2)]
        self._device = backend.allocate_bucket(0).device
        self._lent = [False, False]  # buckets that receivers may be looking at
        self._on_the_wire: list[list[tuple[Pending, torch.Tensor]]] = [[], []]
        self._plan: list[Step] = []
        self._outlines: dict[int, Outline] = {}
        self._known_layouts: set[bytes] = set()
        self._used_layouts: set[bytes] = set()
        self._sequence = 0
        self._source_s = 0.0
        self._mapped: list[LyingTensor] = []  # to be told of in the next MAPPED frame
        self._kept: list[torch.Tensor] = []  # receivers may be looking at them
        self._mapped_frames = MappedFrames()
        self._again: list[Frame] = []  # the frames of this stream, where it is that before
        self._is_begun = False
        self.source_failed = False
        on_host = verify and self._device.type == "cpu"  # a GPU computes beside this thread anyway
        self._digest_at_once_bytes = _CACHED_BYTES if on_host else bucket_bytes

    def begin(self, *, repeats: bool) -> None:
        """Begins what of the next stream needs no receiver; `send` goes on from there.

        Args:
            repeats: whether it is the stream before once more, each tensor where it lay, with what it holds now.
        """
        self._digest = digest_for(self._device)
        self._bucket = Bucket(0)
        self._payload_bytes = 0
        self._source_s, self.source_failed = 0.0, False
        self._mapped = []
        same_places = self._backend.begin_stream()
        self._again = self._mapped_frames.begin_stream(repeats=repeats and same_places)
        if not self._again:
            self._kept = []
        if self._verify:
            for frame in self._again:
                self._digest.add_again(frame.again)
        self._is_begun = True

    @torch.no_grad()
    def send(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        lasts: Callable[[torch.Tensor], bool] = lambda _: False,
    ) -> SendStats:
        """Sends one stream and its END frame. If `weights` raises, sends that as an ERROR frame and raises it.

        Args:
            weights: named tensors; not drawn where `begin` found that it knows them.
            lasts: whether a tensor stays as it is until the next stream, so that receivers may look at it itself.
        """
        if not self._is_begun:
            self.begin(repeats=False)
        self._is_begun = False
        if self._again:
            if isinstance(weights, Generator):
                weights.close()
            return self._send_again()
        tensors = packed = 0
        try:
            for name, tensor in self._drawn(iter(weights)):
                if not isinstance(name, str):
                    raise SourceError(f"{name!r}: expected the name of a tensor, got {type(name).__name__}")
                if not isinstance(tensor, torch.Tensor):
                    raise SourceError(f"{name!r}: expected a tensor, got {type(tensor).__name__}")
                place = self._backend.place_of(tensor) if lasts(tensor) else None
                if place is None:
                    self._tell_mapped()
                    self._send_tensor(self._step(packed, name, tensor), tensor)
                    packed += 1
                else:
                    if self._bucket.entries:
                        self._flush(self._bucket.number + 1)
                    self._mapped.append((tensor, name, place))
                    if len(self._mapped) == _MAPPED_TOGETHER:
                        self._tell_mapped()
                tensors += 1
            self._forget(packed)
            self._flush(self._bucket.number + 1)
            self._tell_mapped()
        except Exception as error:
            if not self.source_failed and isinstance(error, (EngineError, DeadlineError)):
                raise  # the wire itself is broken, so nothing can be said on it
            self.source_failed = True
            self._send_failure(error)
            raise
        self._mapped_frames.end_stream(nothing_else=packed == 0)
        return self._end(tensors)

    def _send_again(self) -> SendStats:
        """Sends the stream before once more: the same tensors, with what they hold now."""
        for frame in self._again:
            self._tell(frame)
        return self._end(sum(len(frame.picture) for frame in self._again))

    def _end(self, tensors: int) -> SendStats:
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

    def _step(self, index: int, name: str, tensor: torch.Tensor) -> Step:
        """The plan's step for this tensor; plans anew from here on if the stream differs from the one before."""
        if index < len(self._plan):
            step = self._plan[index]
            same = step.name == name and step.dtype is tensor.dtype and step.shape == tensor.shape
            if same and step.chunks[0].bucket >= self._bucket.number:
                return step
            self._forget(index)
        step = self._plan_tensor(index, name, tensor)
        self._plan.append(step)
        return step

    def _forget(self, index: int) -> None:
        """Drops the plan from this tensor on, and the outlines of all buckets that are not begun."""
        del self._plan[index:]
        begun = self._bucket.number + bool(self._bucket.entries)
        self._outlines = {number: outline for number, outline in self._outlines.items() if number < begun}

    def _plan_tensor(self, index: int, name: str, tensor: torch.Tensor) -> Step:
        if not self._buffers:
            self._start_frame(Control(Kind.SHARE, self._sequence, 0, 0))
            self._buffers = self._backend.shared_buckets(self._bucket_bytes)
        dtype, shape, nbytes = dtype_name(tensor.dtype), tuple(tensor.shape), tensor.nbytes
        self._planner.resume(self._plan[index - 1].chunks[-1] if index else Chunk(0, 0, 0, 0))
        if self._bucket.announced is not None:  # whatever comes now is not what was announced
            self._planner.next_bucket()
        self._planner.go_to(self._bucket.number)
        chunks = self._planner.place(nbytes)
        entries = [Entry(name, dtype, shape, c.offset, c.start, c.nbytes) for c in chunks]
        view = data = None
        if len(chunks) == 1:
            buffer = self._buffers[chunks[0].bucket % 2]
            view = copyable(view_at(buffer, chunks[0].offset, tensor.dtype, shape))
            if self._verify:
                data = memory(buffer)[chunks[0].offset : chunks[0].offset + nbytes]
        return Step(name, tensor.dtype, tensor.shape, entries, chunks, view, data)

    def _tell_mapped(self) -> None:
        """Sends a MAPPED frame for the tensors that receivers shall see where they are."""
        mapped, self._mapped = self._mapped, []
        if not mapped:
            return
        frame = self._mapped_frames.next(mapped)
        self._kept += [tensor for tensor, _, _ in mapped if isinstance(tensor, torch.nn.Parameter)]
        self._backend.filled()
        self._tell(frame)
        if self._verify:
            names, data = [name for _, name, _ in mapped], [digestible(tensor) for tensor, _, _ in mapped]
            frame.again = self._digest.add_lasting(names, data)

    def _tell(self, frame: Frame) -> None:
        """Sends a MAPPED frame."""
        self._payload_bytes += frame.payload_bytes
        header = self._unless_known(frame.layout, frame.header)
        control = Control(Kind.MAPPED, self._sequence, len(header), frame.payload_bytes, frame.layout)
        self._start_frame(control, header)

    def _unless_known(self, layout: bytes, header: bytes) -> bytes:
        """The header of a frame that uses this layout, empty if receivers have it."""
        known = layout in self._known_layouts or layout in self._used_layouts
        self._used_layouts.add(layout)
        return b"" if known else header

    def _send_tensor(self, step: Step, tensor: torch.Tensor) -> None:
        if step.view is None or self._is_digested_in_parts(step, tensor):
            self._pack_chunks(step, as_bytes(tensor))
            return
        self._enter(step.chunks[0])
        step.view.copy_(copyable(tensor))
        self._bucket.steps.append(step)
        self._bucket.undigested_bytes += step.entries[0].nbytes
        self._add(step.entries[0])
        if self._bucket.undigested_bytes >= self._digest_at_once_bytes:
            self._digest_steps(self._bucket)

    def _is_digested_in_parts(self, step: Step, tensor: torch.Tensor) -> bool:
        large = step.entries[0].nbytes > self._digest_at_once_bytes
        return large and tensor.device.type == "cpu" and tensor.is_contiguous()

    def _pack_chunks(self, step: Step, source: torch.Tensor) -> None:
        for entry, chunk in zip(step.entries, step.chunks, strict=True):
            self._enter(chunk)
            self._digest_steps(self._bucket)
            part = self._digest_at_once_bytes if source.device.type == "cpu" else chunk.nbytes
            for start in range(0, chunk.nbytes, part):
                self._pack_part(entry, source, start, min(start + part, chunk.nbytes))
            self._add(entry)

    def _pack_part(self, entry: Entry, source: torch.Tensor, start: int, end: int) -> None:
        """Packs bytes `start` to `end` of an entry."""
        place = self._buffers[self._bucket.side][entry.offset + start : entry.offset + end]
        place.copy_(source[entry.start + start : entry.start + end])
        if self._verify:
            first, last = entry.start + start == 0, entry.start + end == source.numel()
            self._digest.add_chunk(entry.name, memory(place), first=first, last=last)

    def _enter(self, chunk: Chunk) -> None:
        """Makes the chunk's bucket the open one, once its buffer is free, and announces it if it is like the last."""
        if chunk.bucket != self._bucket.number:
            self._flush(chunk.bucket)
        if self._bucket.entries:
            return
        self._wait(self._bucket.side)
        if self._lent[self._bucket.side]:
            self._backend.reclaim(self._bucket.side)
            self._lent[self._bucket.side] = False
        outline = self._bucket.announced = self._outlines.get(self._bucket.number)
        if outline is not None:
            self._used_layouts.add(outline.layout)
            self._start_bucket(Kind.PROMISE, b"", outline.payload_bytes, outline.layout)

    def _add(self, entry: Entry) -> None:
        self._bucket.entries.append(entry)
        self._bucket.used = entry.offset + entry.nbytes
        if self._bucket.announced is not None:
            self._start_pieces(self._bucket, self._bucket.announced.payload_bytes, self._bucket.used)

    def _flush(self, following: int) -> None:
        """Sends what is left of the open bucket and opens number `following`, which is filled meanwhile."""
        bucket = self._bucket
        if bucket.announced is not None:
            self._keep_promise(bucket, bucket.announced)
        elif bucket.entries:
            self._describe(bucket)
            self._start_pieces(bucket, bucket.used, bucket.used)
        self._digest_steps(bucket)
        self._bucket = Bucket(following)

    def _keep_promise(self, bucket: Bucket, promised: Outline) -> None:
        """Completes an announced payload; if the stream went on otherwise, with leftovers that do not count."""
        self._start_pieces(bucket, promised.payload_bytes, promised.payload_bytes)
        if len(bucket.entries) != promised.entries:
            del self._outlines[bucket.number]
        self._start_frame(Control(Kind.CLOSE, self._sequence, 0, 0, entries=len(bucket.entries)))

    def _start_pieces(self, bucket: Bucket, payload_bytes: int, filled_bytes: int) -> None:
        """Puts those pieces of the payload on the wire that are filled."""
        for begin, end in pieces(payload_bytes, self._backend.piece_bytes)[bucket.pieces_sent :]:
            if end > filled_bytes:
                return
            self._start(self._buffers[bucket.side][begin:end])
            bucket.pieces_sent += 1
            self._payload_bytes += end - begin
            self._digest_steps(bucket)

    def _describe(self, bucket: Bucket) -> None:
        """Sends the control block of a bucket, and its header unless the receivers have seen this layout."""
        header = encode(bucket.entries)
        if len(header) > MAX_HEADER_BYTES:
            raise SourceError(
                f"{len(bucket.entries)} tensors in one bucket need a header of {len(header)} bytes, at most "
                f"{MAX_HEADER_BYTES} are allowed; make bucket_size smaller"
            )
        layout = layout_hash(header)
        self._outlines[bucket.number] = Outline(layout, bucket.used, len(bucket.entries))
        self._start_bucket(Kind.BUCKET, self._unless_known(layout, header), bucket.used, layout)

    def _digest_steps(self, bucket: Bucket) -> None:
        if self._verify and bucket.steps:
            names = [step.name for step in bucket.steps]
            data = [step.data for step in bucket.steps if step.data is not None]
            self._digest.add_tensors(names, data)
        bucket.steps, bucket.undigested_bytes = [], 0

    def _send_failure(self, error: BaseException) -> None:
        if self._bucket.announced is not None:
            self._keep_promise(self._bucket, self._bucket.announced)
        self._send_frame(Kind.ERROR, encode(Failure.of(error)))

    def _send_frame(self, kind: Kind, header: bytes) -> None:
        self._start_frame(Control(kind, self._sequence, len(header), 0), header)
        self._drain()

    def _start_bucket(self, kind: Kind, header: bytes, payload_bytes: int, layout: bytes) -> None:
        side = self._bucket.side
        self._start_frame(Control(kind, self._sequence, len(header), payload_bytes, layout, side=side), header)
        self._lent[side] = True

    def _start_frame(self, control: Control, header: bytes = b"") -> None:
        self._sequence += 1
        for data in blocks(control, header):
            buffer = self._backend.allocate(len(data))
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            self._start(buffer)

    def _start(self, buffer: torch.Tensor) -> None:
        """Puts a buffer on the wire; it must stay as it is until its side is waited for."""
        self._on_the_wire[self._bucket.side].append((self._backend.broadcast(buffer), buffer))

    def _wait(self, side: int) -> None:
        """Until the buffer may be filled again: it is sent."""
        under_way, self._on_the_wire[side] = self._on_the_wire[side], []
        for pending, _ in under_way:
            pending.wait()

    def _drain(self) -> None:
        self._wait(0)
        self._wait(1)
