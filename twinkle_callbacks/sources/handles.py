"""Who holds which part of a tensor: one description for every way of sharding.

A full tensor is cut into blocks, one for each rank that sends. FSDP2 and tensor parallelism (`DTensor`) cut boxes out
of the tensor; FSDP1 and ZeRO-3 cut ranges out of its flattened elements, which are boxes in one dimension.
`holdings.py` finds the handles of a module's tensors, locally; `gather.py` brings the blocks together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch

from twinkle_callbacks.errors import SourceError

LEADER = 0
"""The global rank on which gathered tensors arrive: the one that sends them on."""


class Box(NamedTuple):
    """A box of a tensor that a rank holds: which part of what it holds, and where in the full tensor that lies."""

    held: tuple[slice, ...]
    full: tuple[slice, ...]


class Block(NamedTuple):
    """What one rank holds of a tensor: a tensor of `shape`, made of boxes: of one, but for packed parallelism."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def box(offset: tuple[int, ...], shape: tuple[int, ...]) -> Block:
    """The block of one box that begins at `offset`."""
    held = tuple(slice(0, size) for size in shape)
    full = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return Block(shape, (Box(held, full),))


@dataclass(frozen=True, eq=False)
class Handle:
    """A tensor of the module, wherever its elements are. Two handles are equal only if they are the same object.

    Attributes:
        dtype: as it is held.
        shape: of the full tensor.
        local: returns what this rank holds of it now, detached: its block, or the full tensor where nothing is sharded.
            Called only on ranks that send something.
        blocks: what each global rank sends, seen in a tensor of shape `grid`; empty where rank 0 has the full tensor.
            A rank that holds a copy of what another sends is not in it. On ranks that take no part, it may lack the
            others' blocks.
        grid: shape in which the blocks are boxes: that of the tensor, or its number of elements.
        is_sharded: whether the ranks need one another for this tensor. The same on all of them.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    local: Callable[[], torch.Tensor]
    blocks: Mapping[int, Block] = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    is_sharded: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `to`, which takes as long as everything else about a tensor that is sent as it is."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def whole(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Handle:
    """The handle of a tensor that every rank has in full, seen in another dtype if one is given."""
    dtype = tensor.dtype if dtype is None else dtype
    return Handle(dtype, tuple(tensor.shape), lambda: cast(tensor.detach(), dtype))


def sharded(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    local: Callable[[], torch.Tensor],
    blocks: Mapping[int, Block],
    grid: tuple[int, ...],
) -> Handle:
    """The handle of a tensor that is cut into `blocks`.

    Raises:
        SourceError: the blocks are not all of the tensor, so some part of it is on no rank that could send it.
    """
    held = sum(block.numel for block in blocks.values())
    if held != math.prod(shape):
        raise SourceError(
            f"{name!r}: ranks {sorted(blocks)} hold {held} of its {math.prod(shape)} elements, so no rank owns the "
            f"rest; shard it over ranks that include rank {LEADER}, and see that no rank freed its part"
        )
    return Handle(dtype, shape, local, blocks, grid, is_sharded=True)


def of_other_ranks(dtype: torch.dtype, shape: tuple[int, ...]) -> Handle:
    """The handle of a tensor that other ranks gather among themselves: this one holds a copy that nobody asks for."""
    return Handle(dtype, shape, lambda: torch.empty(0, dtype=dtype), {}, shape, is_sharded=True)


@lru_cache(maxsize=65536)
def ranges(ranks: tuple[int, ...], chunk: int, start: int, stop: int) -> Mapping[int, Block]:
    """Blocks of the elements `start` to `stop` of a flat buffer, of which each of `ranks` holds `chunk` in turn.

    Offsets are counted from `start`.
    """
    blocks = {}
    for position, rank in enumerate(ranks):
        low, high = max(start, position * chunk), min(stop, (position + 1) * chunk)
        if low < high:
            blocks[rank] = box((low - start,), (high - low,))
    return blocks
