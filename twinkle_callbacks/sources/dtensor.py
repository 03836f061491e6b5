"""FSDP2, tensor parallelism, HSDP and their 2-D combinations: all hold `DTensor`s."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.handles import LEADER, Block, Handle, of_other_ranks, sharded


def handle(name: str, tensor: Any) -> Handle:
    """The handle of a `DTensor`. Local; the blocks follow from its mesh and placements alone.

    Of ranks that hold the same block, those send that are where rank 0 is in the replicated dimensions of the mesh. A
    mesh without rank 0 is a copy: under FSDP2 x TP a parameter that TP leaves alone is sharded over the ranks of each
    TP position for itself.

    Raises:
        SourceError: rank 0 is not in its own tensor's mesh, the tensor is a pending sum (`Partial`), this rank's part
            is not of the shape it should have, or the parts of some rank do not lie together.
    """
    dtype, shape = tensor.dtype, tuple(tensor.shape)
    mesh_shape, coordinates = _coordinates(tensor.device_mesh)
    ranks = [rank for rank, _ in coordinates]
    rank = torch.distributed.get_rank()
    if LEADER not in ranks:
        if rank == LEADER:
            raise SourceError(f"{name!r} is sharded over ranks {ranks}, so no rank that sends holds any part of it")
        return of_other_ranks(dtype, shape)
    try:
        blocks = _blocks(shape, mesh_shape, tuple(tensor.placements), coordinates)
    except ValueError as error:
        raise SourceError(f"{name!r} {error}") from error
    if rank not in blocks:
        return of_other_ranks(dtype, shape)
    local = tensor.to_local()
    if tuple(local.shape) != blocks[rank].shape:
        raise SourceError(
            f"{name!r}: rank {rank} holds {list(local.shape)} of {list(shape)}, but by its placements "
            f"{list(tensor.placements)} over ranks {ranks} it should hold {list(blocks[rank].shape)}"
        )
    return sharded(name, dtype, shape, lambda: tensor.to_local().detach(), blocks, shape)


@lru_cache(maxsize=256)
def _coordinates(mesh: Any) -> tuple[tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]]:
    """The shape of a mesh, and where each global rank is in it. Cached: `DeviceMesh.mesh` is computed each time."""
    shape, ranks = tuple(mesh.mesh.shape), mesh.mesh.flatten().tolist()
    return shape, tuple(zip(ranks, itertools.product(*map(range, shape)), strict=True))


@lru_cache(maxsize=4096)
def _blocks(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    coordinates: tuple[tuple[int, tuple[int, ...]], ...],
) -> dict[int, Block]:
    for placement in placements:
        if not (placement.is_replicate() or _is_shard(placement)):
            raise ValueError(
                f"has the placement {placement}, which is no part of a tensor but something to be reduced first; "
                f"redistribute it to Shard or Replicate"
            )
    leading = dict(coordinates)[LEADER]
    blocks = {}
    for rank, coordinate in coordinates:
        copies = [
            p.is_replicate() and at != first for p, at, first in zip(placements, coordinate, leading, strict=True)
        ]
        if not any(copies):
            blocks[rank] = _block(shape, mesh_shape, placements, coordinate)
    return blocks


def _block(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], coordinate: tuple[int, ...]
) -> Block:
    """Replays the sharding on the indices of each dimension, the dimensions of the mesh from left to right."""
    indices = [torch.arange(size) for size in shape]
    for placement, parts, at in zip(placements, mesh_shape, coordinate, strict=True):
        if placement.is_replicate():
            continue
        dimension: int = placement.dim  # type: ignore[attr-defined]
        # A strided shard is a part of each of the parts that the dimensions of the mesh to its right make later.
        outer = getattr(placement, "split_factor", 1)
        chunks = [_chunk(chunk, parts, at) for chunk in indices[dimension].chunk(outer)]
        indices[dimension] = torch.cat(chunks)
    for index in indices:
        if len(index) and int(index[-1]) - int(index[0]) + 1 != len(index):
            raise ValueError(
                f"has the placements {list(placements)}, by which the rank at {coordinate} holds parts of "
                f"{list(shape)} that do not lie together; make the sharded dimension a multiple of the mesh's size"
            )
    return Block(tuple(int(i[0]) if len(i) else 0 for i in indices), tuple(len(i) for i in indices))


def _chunk(indices: torch.Tensor, parts: int, at: int) -> torch.Tensor:
    chunks = indices.chunk(parts)
    return chunks[at] if at < len(chunks) else indices[:0]


def _is_shard(placement: Placement) -> bool:
    # A strided shard is a subclass in some versions of torch and a class of its own in others.
    return isinstance(placement, Shard) or hasattr(placement, "split_factor")
