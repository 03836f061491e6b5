"""Frames: what is packed comes back, and anything else is a ProtocolError that says what is wrong."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_callbacks.buckets.frames import (
    CONTROL_BYTES,
    PROTOCOL_VERSION,
    Control,
    End,
    Entry,
    Failure,
    Kind,
    decode,
    encode,
    layout_hash,
)
from twinkle_callbacks.errors import ProtocolError

LENGTHS = st.integers(0, (1 << 64) - 1)
SEQUENCES = st.integers(0, 1 << 40)
CONTROLS = st.builds(Control, st.sampled_from(Kind), SEQUENCES, LENGTHS, LENGTHS, st.binary(min_size=16, max_size=16))
ENTRIES = st.builds(
    Entry, st.text(), st.text(), st.lists(st.integers(0, 1 << 40)).map(tuple), LENGTHS, LENGTHS, LENGTHS
)
GOOD = Control(Kind.BUCKET, 7, 100, 4096, b"0123456789abcdef").pack()


@given(CONTROLS)
def test_control_block_has_a_fixed_size_and_comes_back(control: Control) -> None:
    block = control.pack()
    assert len(block) == CONTROL_BYTES == 64
    back = Control.unpack(block, control.sequence)
    assert (back.kind, back.header_bytes, back.payload_bytes, back.layout) == (
        control.kind,
        control.header_bytes,
        control.payload_bytes,
        control.layout,
    )


def test_sequence_goes_on_beyond_32_bits() -> None:
    Control.unpack(Control(Kind.END, (1 << 32) + 5, 0, 0).pack(), (1 << 32) + 5)


def test_block_of_another_program_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"HTTP.*not twinkle_callbacks"):
        Control.unpack(b"HTTP/1.1 200 OK".ljust(CONTROL_BYTES), 7)


def test_block_of_another_version_is_refused_and_both_versions_are_named() -> None:
    with pytest.raises(ProtocolError, match=rf"protocol 99, this side {PROTOCOL_VERSION}.*same version"):
        Control.unpack(GOOD[:4] + b"\x63" + GOOD[5:], 7)


@pytest.mark.parametrize("expected", [6, 8, 7 + (1 << 31)])
def test_frame_out_of_order_is_refused_and_both_numbers_are_named(expected: int) -> None:
    with pytest.raises(ProtocolError, match=f"frame 7 where frame {expected}"):
        Control.unpack(GOOD, expected)


@pytest.mark.parametrize("kind", [0, 8, 255])
def test_unknown_kind_of_frame_is_a_protocol_error(kind: int) -> None:
    with pytest.raises(ProtocolError, match=str(kind)):
        Control.unpack(GOOD[:5] + bytes([kind]) + GOOD[6:], 7)


@given(st.binary(min_size=CONTROL_BYTES, max_size=CONTROL_BYTES))
def test_random_block_raises_nothing_but_protocol_errors(block: bytes) -> None:
    for candidate in (block, GOOD[:4] + block[4:], GOOD[:5] + block[5:]):
        with contextlib.suppress(ProtocolError):
            Control.unpack(candidate, 7)


@given(st.lists(ENTRIES), st.builds(End, LENGTHS, LENGTHS, st.binary(), st.text()))
def test_headers_come_back(entries: list[Entry], end: End) -> None:
    assert decode(encode(entries), list[Entry]) == entries
    assert decode(encode(end), End) == end


def test_failure_carries_the_type_and_text_of_an_error() -> None:
    failure = decode(encode(Failure.of(ValueError("layer 3 is on fire"))), Failure)
    assert failure == Failure("ValueError", "layer 3 is on fire")


def test_failure_of_an_error_without_text_still_says_something() -> None:
    assert Failure.of(KeyError()).message


def test_failure_whose_text_is_not_unicode_can_be_sent() -> None:
    name = b"model-\xff.safetensors".decode(errors="surrogateescape")  # as os.listdir gives such a name
    failure = Failure.of(OSError(f"cannot read {name}"))
    assert "cannot read model-" in decode(encode(failure), Failure).message


@given(st.binary(max_size=200))
def test_random_header_raises_nothing_but_protocol_errors(data: bytes) -> None:
    for kind in (list[Entry], End, Failure):
        with contextlib.suppress(ProtocolError):
            decode(data, kind)


@given(st.lists(ENTRIES, min_size=1, max_size=3), st.data())
def test_cut_off_header_is_refused(entries: list[Entry], data: st.DataObject) -> None:
    header = encode(entries)
    with pytest.raises(ProtocolError, match="malformed"):
        decode(header[: data.draw(st.integers(0, len(header) - 1))], list[Entry])


def test_number_too_large_for_its_field_is_an_error_here_and_not_there() -> None:
    with pytest.raises(struct.error):
        Control(Kind.BUCKET, 0, 1 << 64, 0).pack()


@given(st.lists(ENTRIES, max_size=3), st.lists(ENTRIES, max_size=3))
def test_layout_hash_stands_for_the_layout(first: list[Entry], second: list[Entry]) -> None:
    assert len(layout_hash(encode(first))) == 16
    assert (layout_hash(encode(first)) == layout_hash(encode(second))) == (first == second)
