"""Digests: the same however the bytes are cut, different for every other stream, and they name what differs."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_callbacks.buckets.digest import StreamDigest, first_few, unpack

STREAMS = st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=300)), max_size=6)


def digest_of(stream: list[tuple[str, bytes]]) -> StreamDigest:
    digest = StreamDigest()
    digest.add_tensors([name for name, _ in stream], [memoryview(data) for _, data in stream])
    return digest


@given(STREAMS, st.data())
def test_tensors_in_chunks_have_the_digest_of_whole_ones(stream: list[tuple[str, bytes]], data: st.DataObject) -> None:
    chunked = StreamDigest()
    for name, content in stream:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=4)) | {0, len(content)})
        spans = list(pairwise(cuts)) or [(0, 0)]
        for begin, end in spans:
            chunk = memoryview(content)[begin:end]
            chunked.add_chunk(name, chunk, first=(begin, end) == spans[0], last=(begin, end) == spans[-1])
    whole = digest_of(stream)
    assert (chunked.names, chunked.values, chunked.hexdigest()) == (whole.names, whole.values, whole.hexdigest())


@given(STREAMS, st.integers(0, 255))
def test_lasting_tensors_that_are_added_again_count_with_what_they_hold_then(
    stream: list[tuple[str, bytes]], new: int
) -> None:
    held = [bytearray(data) for _, data in stream]
    names = [name for name, _ in stream]
    digest = StreamDigest()
    lasting = digest.add_lasting(names, held)
    assert digest.hexdigest() == digest_of(stream).hexdigest()
    for data in held:
        data[:] = bytes([new]) * len(data)
    again = StreamDigest()
    again.add_again(lasting)
    assert again.hexdigest() == digest_of(list(zip(names, map(bytes, held), strict=True))).hexdigest()


@given(STREAMS, STREAMS)
def test_streams_have_one_digest_exactly_when_they_are_the_same(
    first: list[tuple[str, bytes]], second: list[tuple[str, bytes]]
) -> None:
    assert (digest_of(first).hexdigest() == digest_of(second).hexdigest()) == (first == second)


@pytest.mark.parametrize(
    "other",
    [
        [("b", b"2"), ("a", b"1")],
        [("a", b"2"), ("b", b"1")],
        [("a", b"1")],
        [("a", b"1"), ("b", b"2"), ("c", b"")],
        [("a", b"12"), ("b", b"")],
        [("ab", b"1"), ("", b"2")],
        [("a\0b", b"1"), ("b", b"2")],
    ],
    ids=["swapped", "values swapped", "shorter", "longer", "moved byte", "moved letter", "separator in a name"],
)
def test_small_differences_change_the_digest(other: list[tuple[str, bytes]]) -> None:
    assert digest_of([("a", b"1"), ("b", b"2")]).hexdigest() != digest_of(other).hexdigest()


def test_names_cannot_be_joined_into_other_names() -> None:
    assert digest_of([("a\0b", b"1"), ("c", b"1")]).hexdigest() != digest_of([("a", b"1"), ("b\0c", b"1")]).hexdigest()


def test_rows_in_another_order_change_the_digest_of_a_tensor() -> None:
    assert digest_of([("a", b"row1row2")]).values != digest_of([("a", b"row2row1")]).values


def test_digest_is_32_hexadecimal_digits_also_of_an_empty_stream() -> None:
    assert len(bytes.fromhex(StreamDigest().hexdigest())) == 16


@given(STREAMS)
def test_packed_digests_come_back(stream: list[tuple[str, bytes]]) -> None:
    digest = digest_of(stream)
    assert unpack(digest.pack()) == digest.values
    assert digest.differing(digest.pack()) == []


def test_tensors_that_differ_are_named_in_order() -> None:
    ours = digest_of([("a", b"1"), ("b", b"2"), ("c", b"3")])
    theirs = digest_of([("a", b"x"), ("b", b"2"), ("c", b"y")])
    assert ours.differing(theirs.pack()) == ["a", "c"]


def test_stream_of_another_length_differs_and_both_lengths_are_named() -> None:
    [difference] = digest_of([("a", b"1")]).differing(digest_of([("a", b"1"), ("b", b"")]).pack())
    assert "1 tensors here" in difference
    assert "2 there" in difference


def test_first_few_names_are_shown_and_the_rest_counted() -> None:
    assert first_few(["a", "b"]) == "a, b"
    assert first_few(list("abcdefgh"), limit=3) == "a, b, c and 5 more"
    assert first_few([]) == ""
