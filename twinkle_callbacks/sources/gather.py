"""The gather: what the ranks hold comes together on rank 0, in bounded memory, the next bucket while this one is used.

    units  ->  buckets of about 32 MiB, the same on every rank
               rank r:  its blocks of a bucket, cast, the small ones packed into one message  -- isend -->
               rank 0:  receives into the full tensors where a block lies in one piece there, else beside them

Only rank 0 sends the policy on, so only it gets the tensors. Each element travels once, from the one rank that holds it
(an all-gather would bring it to every rank). All messages go point to point through the default group, which every
strategy has.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from twinkle_callbacks.buckets.packing import as_bytes, copyable, nbytes_of
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.handles import LEADER, Block, cast
from twinkle_callbacks.sources.units import Unit, Wanted

logger = logging.getLogger(__name__)

BUCKET_BYTES = 32 << 20
"""Full tensors gathered at a time; a larger tensor has a bucket of its own."""

PACKED_BYTES = 1 << 20
"""Blocks below this size share a message: waiting for each would cost more than copying it."""


def gathered(units: Sequence[Unit]) -> Generator[tuple[Unit, list[torch.Tensor]], None, None]:
    """Yields each unit with the full tensors that it needs. Collective wherever a needed tensor is sharded.

    Every rank must go through all of it with equivalent units; only rank 0 gets anything. Tensors that are not sharded
    are views of the module's memory where no cast is needed; none may be written to. At most two buckets, the current
    and the next one, are in memory, besides what the caller keeps.

    Ending early (`close()`, or an error on rank 0) still takes part to the end, so that no other rank waits for ever.
    For the same reason a rank that cannot read what it holds sends zeros, and raises when all is over.
    """
    buckets = _in_buckets([wanted for unit in units for wanted in unit.needs if wanted.handle.is_sharded])
    wire = wire_device() if buckets else torch.device("cpu")
    if _rank() != LEADER:
        _send(buckets, wire)
        return
    arriving = _Arriving(buckets, wire)
    try:
        arriving.begin()
        for unit in units:
            tensors = [arriving.take() if wanted.handle.is_sharded else _own(wanted) for wanted in unit.needs]
            yield unit, tensors
            del tensors
    finally:
        arriving.drain()


def _own(wanted: Wanted) -> torch.Tensor:
    return cast(wanted.handle.local(), wanted.dtype)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else LEADER


def _in_buckets(wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    buckets: list[list[Wanted]] = []
    room = 0
    for one in wanted:
        if not buckets or one.nbytes > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(one)
        room -= one.nbytes
    return buckets


class _Message(NamedTuple):
    """Blocks of a bucket that travel together, flattened and one after another.

    Attributes:
        dtype: of all of them.
        parts: position in the bucket, and block, of each.
    """

    dtype: torch.dtype
    parts: list[tuple[int, Block]]

    @property
    def numels(self) -> list[int]:
        return [block.numel for _, block in self.parts]

    @property
    def nbytes(self) -> int:
        return sum(self.numels) * self.dtype.itemsize


def _messages(bucket: Sequence[Wanted], rank: int) -> list[_Message]:
    """What `rank` sends for a bucket: each large block alone, then all small ones of a dtype together."""
    alone: list[_Message] = []
    packed: dict[torch.dtype, _Message] = {}
    for position, (handle, dtype) in enumerate(bucket):
        block = handle.blocks.get(rank)
        if block is None or not block.numel:
            continue
        if nbytes_of(dtype, block.shape) >= PACKED_BYTES:
            alone.append(_Message(dtype, [(position, block)]))
        else:
            packed.setdefault(dtype, _Message(dtype, [])).parts.append((position, block))
    return [*alone, *packed.values()]


# The ranks that hold


def _send(buckets: Sequence[Sequence[Wanted]], wire: torch.device) -> None:
    """Sends this rank's blocks of every bucket, at most two buckets at a time."""
    rank = _rank()
    failure: Exception | None = None
    under_way: list[tuple[list[torch.Tensor], list[dist.Work]]] = []
    for bucket in buckets:
        outgoing = []
        for message in _messages(bucket, rank):
            try:
                if failure is not None:
                    raise failure
                content = _content(message, bucket, wire)
            except Exception as error:  # whatever a module's own tensors raise; the others must not wait for it
                failure = error
                content = torch.zeros(message.nbytes, dtype=torch.uint8, device=wire)
            outgoing.append(content)
        under_way.append((outgoing, _start([dist.P2POp(dist.isend, content, LEADER) for content in outgoing])))
        if len(under_way) == 2:
            _wait(under_way.pop(0)[1])
    for _, works in under_way:
        _wait(works)
    if failure is not None:
        raise failure


def _content(message: _Message, bucket: Sequence[Wanted], wire: torch.device) -> torch.Tensor:
    """The bytes of a message; those of a block that is alone are sent from where they are, if they need no cast."""
    held = [_checked(bucket[position].handle.local(), block) for position, block in message.parts]
    flat = [copyable(tensor.to(wire, message.dtype)).reshape(-1) for tensor in held]
    return as_bytes(flat[0] if len(flat) == 1 else torch.cat(flat))


def _checked(local: torch.Tensor, block: Block) -> torch.Tensor:
    if tuple(local.shape) != block.shape:
        raise SourceError(
            f"this rank's part of a tensor has the shape {list(local.shape)}, where its sharding says "
            f"{list(block.shape)}; do not change the module while it is pushed"
        )
    return local


# The rank that gathers


class _Arriving:
    """The full tensors in the order of the buckets, two of which are under way or in use."""

    def __init__(self, buckets: Sequence[Sequence[Wanted]], wire: torch.device) -> None:
        self._wire = wire
        self._waiting = list(reversed(buckets))
        self._current: _Bucket | None = None
        self._next: _Bucket | None = None
        self._broken = False

    def begin(self) -> None:
        """Starts to receive the next bucket, if there is one."""
        if self._waiting:
            self._next = _Bucket(self._waiting[-1], self._wire)  # may find no memory, before it receives anything
            self._waiting.pop()

    def take(self) -> torch.Tensor:
        """Returns the next tensor."""
        if self._current is None or self._current.is_used_up:
            self._current = None  # before more memory is taken
            self._advance()
        assert self._current is not None
        return self._current.take()

    def _advance(self) -> None:
        assert self._next is not None
        self._broken = True  # unless this wait succeeds: with a link gone there is nothing to drain
        self._next.wait()
        self._broken = False
        self._current, self._next = self._next, None
        self.begin()

    def drain(self) -> None:
        """Receives what is still to come, and drops it. Takes no more memory than the largest message.

        Errors are logged: the reason for draining is another one, or there is nobody left to tell.
        """
        if self._broken or not (self._next or self._waiting):
            return
        try:
            if self._next is not None:
                self._next.wait()
            self._current = self._next = None
            coming = [each for bucket in reversed(self._waiting) for each in _incoming(bucket)]
            largest = max((message.nbytes for _, message in coming), default=0)
            scratch = torch.empty(largest, dtype=torch.uint8, device=self._wire)
            for rank, message in coming:
                _wait(_start([dist.P2POp(dist.irecv, scratch[: message.nbytes], rank)]))
        except RuntimeError as error:  # of torch: a link is gone, or there is no memory at all
            logger.error("cannot drain the gather, so other ranks wait until their deadline: %s", error)


class _Bucket:
    """One bucket on rank 0: receives are posted when it is made, tensors are put together when they are taken."""

    def __init__(self, bucket: Sequence[Wanted], wire: torch.device) -> None:
        self._bucket, self._wire = bucket, wire
        self._taken = 0
        self._full: dict[int, torch.Tensor] = {}
        self._beside: dict[int, list[tuple[Block, torch.Tensor]]] = {}
        self._works = _start(
            [dist.P2POp(dist.irecv, self._landing(message), rank) for rank, message in _incoming(bucket)]
        )

    def _landing(self, message: _Message) -> torch.Tensor:
        """Where a message goes: into the full tensor if it is one large block that lies in one piece there."""
        position, block = message.parts[0]
        if message.nbytes >= PACKED_BYTES and len(message.parts) == 1 and len(block.boxes) == 1:
            place = self._grid(position)[block.boxes[0].full]
            if place.is_contiguous():
                return as_bytes(place)
        beside = torch.empty(sum(message.numels), dtype=message.dtype, device=self._wire)
        for (position, block), piece in zip(message.parts, torch.split(beside, message.numels), strict=True):
            self._beside.setdefault(position, []).append((block, piece.view(block.shape)))
        return as_bytes(beside)

    def _grid(self, index: int) -> torch.Tensor:
        """A full tensor, in the shape that its blocks are seen in."""
        if index not in self._full:
            handle, dtype = self._bucket[index]
            self._full[index] = torch.empty(handle.grid, dtype=dtype, device=self._wire)
        return self._full[index]

    def wait(self) -> None:
        _wait(self._works)

    @property
    def is_used_up(self) -> bool:
        return self._taken == len(self._bucket)

    def take(self) -> torch.Tensor:
        index, handle = self._taken, self._bucket[self._taken].handle
        self._taken += 1
        grid = self._grid(index)
        if (own := handle.blocks.get(LEADER)) is not None:
            _put(grid, own, _checked(handle.local(), own))
        for block, piece in self._beside.pop(index, ()):
            _put(grid, block, piece)
        return self._full.pop(index).view(handle.shape)


# Both


def _incoming(bucket: Sequence[Wanted]) -> list[tuple[int, _Message]]:
    """The messages that rank 0 gets for a bucket, and the ranks they come from."""
    ranks = sorted({rank for handle, _ in bucket for rank in handle.blocks} - {LEADER})
    return [(rank, message) for rank in ranks for message in _messages(bucket, rank)]


def _put(grid: torch.Tensor, block: Block, held: torch.Tensor) -> None:
    """Copies what a rank holds to its place in a full tensor."""
    if len(block.boxes) == 1:
        _copy(grid[block.boxes[0].full], held)
    else:
        for each in block.boxes:
            _copy(grid[each.full], held[each.held])


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies into a view of the same shape, casting on the way."""
    if target.dtype == source.dtype:
        target, source = copyable(target), copyable(source)
    target.copy_(source)


def _start(operations: list[dist.P2POp]) -> list[dist.Work]:
    return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def wire_device() -> torch.device:
    """Where messages live: on this rank's accelerator if the default group sends from there, else in host memory."""
    accelerator = torch.accelerator.current_accelerator()
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    if accelerator is None or backends.get(accelerator.type, "gloo") == "gloo":  # which sends from host memory only
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
