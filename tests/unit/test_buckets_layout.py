"""The plan of a stream: every byte in one place, in order, aligned, and never above the bucket's size."""

from __future__ import annotations

import math
from itertools import chain, pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_callbacks.buckets.layout import ALIGNMENT_BYTES, BucketPlanner, Chunk, TensorSpec, align

BUCKETS = st.sampled_from([1, 2, 3, 8, 64]).map(lambda units: units * ALIGNMENT_BYTES)
SIZES = st.one_of(
    st.integers(0, 3 * ALIGNMENT_BYTES),
    st.integers(0, 40).map(lambda units: units * ALIGNMENT_BYTES),
    st.integers(0, 200_000),
)
STREAMS = st.lists(SIZES, max_size=40)


def plan(bucket_bytes: int, sizes: list[int]) -> list[list[Chunk]]:
    planner = BucketPlanner(bucket_bytes)
    return [planner.place(size) for size in sizes]


@given(BUCKETS, STREAMS)
def test_every_byte_of_every_tensor_has_exactly_one_place(bucket: int, sizes: list[int]) -> None:
    for size, chunks in zip(sizes, plan(bucket, sizes), strict=True):
        assert chunks
        assert [chunk.start for chunk in chunks] == [sum(c.nbytes for c in chunks[:i]) for i in range(len(chunks))]
        assert sum(chunk.nbytes for chunk in chunks) == size


@given(BUCKETS, STREAMS)
def test_no_chunk_reaches_beyond_its_bucket_or_starts_unaligned(bucket: int, sizes: list[int]) -> None:
    for chunk in chain.from_iterable(plan(bucket, sizes)):
        assert 0 <= chunk.offset <= chunk.offset + chunk.nbytes <= bucket
        assert chunk.offset % ALIGNMENT_BYTES == 0
        assert chunk.start % ALIGNMENT_BYTES == 0


@given(BUCKETS, STREAMS)
def test_chunks_come_in_the_order_of_the_stream_and_never_overlap(bucket: int, sizes: list[int]) -> None:
    chunks = list(chain.from_iterable(plan(bucket, sizes)))
    for before, after in pairwise(chunks):
        assert (before.bucket, before.offset + before.nbytes) <= (after.bucket, after.offset) or (
            after.bucket == before.bucket + 1
        )
        assert after.bucket in (before.bucket, before.bucket + 1)
        if after.bucket == before.bucket:
            assert after.offset >= before.offset + before.nbytes


@given(BUCKETS, STREAMS)
def test_tensor_that_fits_into_a_bucket_is_never_split(bucket: int, sizes: list[int]) -> None:
    for size, chunks in zip(sizes, plan(bucket, sizes), strict=True):
        if size <= bucket:
            assert len(chunks) == 1
        else:
            assert len(chunks) <= math.ceil(size / bucket) + 1


@given(BUCKETS, STREAMS)
def test_first_bucket_is_number_zero_and_none_is_left_out(bucket: int, sizes: list[int]) -> None:
    numbers = [chunk.bucket for chunks in plan(bucket, sizes) for chunk in chunks]
    assert sorted(set(numbers)) == list(range(len(set(numbers))))


@given(BUCKETS, STREAMS, STREAMS)
def test_resumed_planner_goes_on_like_the_one_that_never_stopped(
    bucket: int, first: list[int], rest: list[int]
) -> None:
    whole = BucketPlanner(bucket)
    placed = [whole.place(size) for size in first]
    resumed = BucketPlanner(bucket)
    resumed.place(12345)  # what it did before does not matter
    resumed.resume(placed[-1][-1] if placed else Chunk(0, 0, 0, 0))
    assert [resumed.place(size) for size in rest] == [whole.place(size) for size in rest]


@given(BUCKETS, STREAMS, SIZES)
def test_next_bucket_leaves_the_rest_of_the_bucket_empty(bucket: int, first: list[int], size: int) -> None:
    planner = BucketPlanner(bucket)
    before = [planner.place(one)[-1] for one in first]
    planner.next_bucket()
    [place, *_] = planner.place(size)
    assert (place.bucket, place.offset) == (before[-1].bucket + 1 if before else 1, 0)


@pytest.mark.parametrize("bucket_bytes", [0, -512, 1, 511, 513, 1000])
def test_bucket_size_that_is_no_positive_multiple_of_the_alignment_is_refused(bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"bucket_bytes={bucket_bytes}.*multiple of 512"):
        BucketPlanner(bucket_bytes)


@given(st.integers(0, 1 << 50))
def test_align_rounds_up_by_less_than_one_unit(nbytes: int) -> None:
    assert align(nbytes) % ALIGNMENT_BYTES == 0
    assert 0 <= align(nbytes) - nbytes < ALIGNMENT_BYTES


@given(st.builds(TensorSpec, st.text(), st.text(), st.lists(st.integers(0, 1 << 40)).map(tuple)))
def test_tensor_spec_survives_the_wire(spec: TensorSpec) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=TensorSpec) == spec
