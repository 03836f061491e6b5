"""The frames of the wire: what both ends read and write, without torch.

    frame = block (control, 64 bytes, and the header if it fits) + header (msgpack, if it does not) + payload

A BUCKET frame describes the tensors in its payload; a layout that was sent before travels as its hash alone. A PROMISE
is a bucket that is announced before it is filled; the CLOSE frame after its payload says how many of its tensors count,
fewer than announced where the stream went on otherwise. A MAPPED frame has no payload: it says where the next tensors
lie in the sender's own memory, for receivers that see it; SHARE, that it makes buckets there. An END frame carries the
digests; an ERROR frame the sender's error. Lengths come first, so only used bytes are sent; a payload goes in pieces,
several of which are on their way at a time.
"""

from __future__ import annotations

import enum
import struct
from typing import Any, TypeVar

import msgspec
import xxhash

from twinkle_callbacks.errors import ProtocolError, text_of

PROTOCOL_VERSION = 3
BLOCK_BYTES = 4 << 10  # each message costs a round trip, its size hardly anything
CONTROL_BYTES = 64
MAX_HEADER_BYTES = 64 << 20  # some 700,000 tensors in one bucket
_MAGIC = b"TWKL"
_CONTROL = struct.Struct("<4sBBBxIQQ16sI16x")
T = TypeVar("T")


class Kind(enum.IntEnum):
    """What a frame is."""

    BUCKET = 1
    END = 2
    ERROR = 3
    PROMISE = 4
    CLOSE = 5
    MAPPED = 6
    SHARE = 7


_KINDS = frozenset(Kind)


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor, or one chunk of a tensor, in a bucket's payload.

    `offset` counts bytes in the payload, `start` bytes in the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    start: int
    nbytes: int


class MappedEntry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in the sender's memory, contiguous; `offset` counts bytes in allocation number `allocation`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    allocation: int
    offset: int


class Mapped(msgspec.Struct, frozen=True):
    """Header of a MAPPED frame: tensors, and what a receiver needs to map each allocation that they lie in."""

    allocations: list[bytes]
    entries: list[MappedEntry]


class End(msgspec.Struct, frozen=True):
    """Header of the END frame.

    `digests` holds the 64-bit digest of each tensor in stream order, little-endian; empty if the sender computes none.
    """

    tensors: int
    payload_bytes: int
    digests: bytes
    digest: str


class Failure(msgspec.Struct, frozen=True):
    """An error as it travels: the name of its type and its text."""

    type: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(type(error).__name__, text_of(error))


class Control(msgspec.Struct, frozen=True):
    """What each frame begins with.

    Attributes:
        kind: what the frame is.
        sequence: number of the frame since the engine was set up.
        header_bytes: 0 when the receiver knows `layout` already.
        payload_bytes: of a bucket.
        layout: hash of a bucket's header.
        entries: of a CLOSE frame: how many tensors of the bucket count.
        side: which of the sender's two buffers holds the bucket, for receivers that see them.
    """

    kind: Kind
    sequence: int
    header_bytes: int
    payload_bytes: int
    layout: bytes = b"\0" * 16
    entries: int = 0
    side: int = 0

    def pack(self) -> bytes:
        return _CONTROL.pack(
            _MAGIC,
            PROTOCOL_VERSION,
            self.kind,
            self.side,
            self.sequence & 0xFFFFFFFF,
            self.header_bytes,
            self.payload_bytes,
            self.layout,
            self.entries,
        )

    @classmethod
    def unpack(cls, block: bytes, expected_sequence: int) -> Control:
        """Parses the control at the beginning of a block.

        Raises:
            ProtocolError: not a frame of this protocol and version, or not the frame that comes next.
        """
        magic, version, kind, side, sequence, header_bytes, payload_bytes, layout, entries = _CONTROL.unpack_from(block)
        if magic != _MAGIC:
            raise ProtocolError(f"received {magic!r} where a frame must begin; the sender is not twinkle_callbacks")
        if version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the sender speaks wire protocol {version}, this side {PROTOCOL_VERSION}; "
                f"install the same version of twinkle_callbacks on both"
            )
        if sequence != expected_sequence & 0xFFFFFFFF:
            raise ProtocolError(f"received frame {sequence} where frame {expected_sequence} comes next")
        if kind not in _KINDS:
            raise ProtocolError(f"received a frame of kind {kind}, which does not exist")
        if side > 1:
            raise ProtocolError(f"received a frame of buffer {side}, and there are two")
        return cls(Kind(kind), sequence, header_bytes, payload_bytes, layout, entries, side)


def blocks(control: Control, header: bytes) -> list[bytes]:
    """The messages that begin a frame: the block, and the header if it does not fit into it; CLOSE is its control."""
    if control.kind is Kind.CLOSE:
        return [control.pack()]
    if CONTROL_BYTES + len(header) > BLOCK_BYTES:
        return [control.pack().ljust(BLOCK_BYTES, b"\0"), header]
    return [(control.pack() + header).ljust(BLOCK_BYTES, b"\0")]


def header_in(block: bytes, control: Control) -> bytes | None:
    """The header, if the block holds it."""
    end = CONTROL_BYTES + control.header_bytes
    return block[CONTROL_BYTES:end] if end <= BLOCK_BYTES else None


def pieces(payload_bytes: int, piece_bytes: int) -> list[tuple[int, int]]:
    """First and last byte (exclusive) of each piece of a payload."""
    starts = range(0, payload_bytes, piece_bytes)
    return [(start, min(start + piece_bytes, payload_bytes)) for start in starts]


def encode(header: Any) -> bytes:
    """Encodes a header, or a list of `Entry`, as msgpack."""
    return msgspec.msgpack.encode(header)


def decode(data: bytes, kind: type[T]) -> T:
    """Decodes a header.

    Raises:
        ProtocolError: the bytes are not a header of this kind.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed {kind} header of {len(data)} bytes: {error}") from None


def layout_hash(header: bytes) -> bytes:
    """16 bytes that stand for a layout both ends have seen."""
    return xxhash.xxh3_128_digest(header)
