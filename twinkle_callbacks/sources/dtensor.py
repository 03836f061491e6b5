"""FSDP2, tensor parallelism, HSDP and their 2-D combinations: all hold `DTensor`s."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.handles import LEADER, Block, Box, Handle, of_other_ranks, sharded


def handle(name: str, tensor: Any) -> Handle:
    """The handle of a `DTensor`. Local; the blocks follow from its mesh and placements alone.

    Of ranks that hold the same block, those send that are where rank 0 is in the replicated dimensions of the mesh. A
    mesh without rank 0 is a copy: under FSDP2 x TP a parameter that TP leaves alone is sharded over the ranks of each
    TP position for itself.

    Raises:
        SourceError: rank 0 is not in its own tensor's mesh, the tensor is a pending sum (`Partial`), this rank's part
            is not of the shape it should have.
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
    parts = [[torch.arange(size)] for size in shape]
    for placement, count, at in zip(placements, mesh_shape, coordinate, strict=True):
        if placement.is_replicate():
            continue
        dimension: int = placement.dim  # type: ignore[attr-defined]
        outer = getattr(placement, "split_factor", 0)
        if outer:
            # A part of each of the parts that the dimensions of the mesh to the right choose from; where none does,
            # as under packed tensor parallelism, the rank holds them all.
            parts[dimension] = [_chunk(part, count, at) for part in _chunks(torch.cat(parts[dimension]), outer)]
        elif len(parts[dimension]) == count:
            parts[dimension] = [parts[dimension][at]]
        else:
            parts[dimension] = [_chunk(torch.cat(parts[dimension]), count, at)]
    runs = [_runs(torch.cat(each)) for each in parts]
    boxes = (Box(*zip(*each, strict=True)) if each else Box((), ()) for each in itertools.product(*runs))
    return Block(tuple(sum(map(len, each)) for each in parts), tuple(boxes))


def _chunks(indices: torch.Tensor, count: int) -> list[torch.Tensor]:
    chunks = list(indices.chunk(count))
    return chunks + [indices[:0]] * (count - len(chunks))


def _chunk(indices: torch.Tensor, count: int, at: int) -> torch.Tensor:
    return _chunks(indices, count)[at]


def _runs(indices: torch.Tensor) -> list[tuple[slice, slice]]:
    """The runs of successive indices: where each lies in what is held, and where in the full dimension."""
    runs, held = [], 0
    for run in torch.tensor_split(indices, (indices.diff() != 1).nonzero().flatten() + 1):
        start = int(run[0]) if len(run) else 0
        runs.append((slice(held, held + len(run)), slice(start, start + len(run))))
        held += len(run)
    return runs


def _is_shard(placement: Placement) -> bool:
    # A strided shard is a subclass in some versions of torch and a class of its own in others.
    return isinstance(placement, Shard) or hasattr(placement, "split_factor")
