"""Which part of a DTensor each rank holds, told from placements alone and compared with sharding it step by step."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from twinkle_callbacks.sources.dtensor import _block

SIZES = st.integers(0, 40)
PARTS = st.integers(1, 5)


def held(full: torch.Tensor, mesh: tuple[int, ...], placements: tuple, at: tuple[int, ...]) -> torch.Tensor:  # type: ignore[type-arg]
    """What `_block` says that the rank at `at` holds, taken out of the full tensor."""
    block = _block(tuple(full.shape), mesh, placements, at)
    taken = full.new_full(block.shape, -1)
    for box in block.boxes:
        taken[box.held] = full[box.full]
    return taken


def chunk(full: torch.Tensor, parts: int, at: int, dim: int = 0) -> torch.Tensor:
    chunks = full.chunk(parts, dim)
    return chunks[at] if at < len(chunks) else full.narrow(dim, 0, 0)


@given(SIZES, PARTS, PARTS)
def test_fsdp2_over_tensor_parallelism_of_the_same_dimension(size: int, dp: int, tp: int) -> None:
    full = torch.arange(size)
    for i in range(dp):
        for j in range(tp):
            want = chunk(chunk(full, tp, j), dp, i)
            got = held(full, (dp, tp), (_StridedShard(0, split_factor=tp), Shard(0)), (i, j))
            assert torch.equal(got, want)


@given(SIZES, SIZES, PARTS, PARTS)
def test_two_dimensions_of_the_mesh_cut_two_of_the_tensor(rows: int, columns: int, first: int, second: int) -> None:
    full = torch.arange(rows * columns).reshape(rows, columns)
    for i in range(first):
        for j in range(second):
            got = held(full, (first, second), (Shard(0), Shard(1)), (i, j))
            assert torch.equal(got, chunk(chunk(full, first, i), second, j, dim=1))


@given(st.integers(1, 6), PARTS, st.integers(2, 3))
def test_packed_tensor_parallelism_leaves_a_rank_a_part_of_each_of_the_packed(size: int, tp: int, packed: int) -> None:
    full = torch.arange(3 * packed * tp * size).reshape(3, packed * tp * size)
    for at in range(tp):
        want = torch.cat([chunk(each, tp, at, dim=1) for each in full.chunk(packed, 1)], 1)
        assert torch.equal(held(full, (tp,), (_StridedShard(1, split_factor=packed),), (at,)), want)


def test_copies_and_scalars() -> None:
    scalar = torch.tensor(7)
    assert torch.equal(held(scalar, (2,), (Replicate(),), (1,)), scalar)
    assert torch.equal(held(torch.arange(4), (2, 2), (Replicate(), Shard(0)), (1, 0)), torch.arange(2))
