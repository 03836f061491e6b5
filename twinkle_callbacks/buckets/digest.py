"""Digests of tensors: XXH3-64 over each tensor's bytes, positional, and one over the whole stream.

They detect corruption (a reused buffer, a wrong offset, a lost chunk), not an attacker. Method: xxhash.com, XXH3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import msgspec
import torch
import xxhash

from twinkle_callbacks.buckets.packing import as_bytes, dtype_name, memory

Digests = dict[str, tuple[str, str]]
"""Of each tensor, by its name: dtype as on the wire, and the XXH3-64 of its bytes in hexadecimal."""


class StreamDigest:
    """Collects the digest of every tensor of a stream, chunk by chunk, in stream order.

    Both ends build one from the bytes they hold, memoryviews here; equal streams give equal `values` and `hexdigest()`.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._values: list[int] = []
        self._open: xxhash.xxh3_64 | None = None

    @property
    def values(self) -> list[int]:
        """The digest of each tensor, in stream order."""
        return self._values

    def add_tensors(self, names: Iterable[str], data: Iterable[Any]) -> None:
        """Adds tensors whose bytes are all at hand."""
        self.names.extend(names)
        self._values.extend(map(xxhash.xxh3_64_intdigest, data))

    def add_lasting(self, names: Iterable[str], data: Iterable[Any]) -> Any:
        """As `add_tensors`, of tensors that stay as they are until the values are asked for.

        Returns:
            What `add_again` takes in a later stream, should they lie there then too; None if it must be told anew.
        """
        again = list(names), list(data)
        self.add_tensors(*again)
        return again

    def add_again(self, before: Any) -> None:
        """Adds the tensors of an earlier `add_lasting`, where they were, with what they hold now."""
        self.add_tensors(*before)

    def drop_last(self, count: int) -> None:
        """Takes the last `count` tensors back."""
        del self.names[-count:], self._values[-count:]

    def add_chunk(self, name: str, data: Any, *, first: bool, last: bool) -> None:
        """Adds the next chunk of a tensor that travels in several."""
        if first:
            self._open = xxhash.xxh3_64()
        assert self._open is not None
        self._open.update(data)
        if last:
            self.names.append(name)
            self._values.append(self._open.intdigest())
            self._open = None

    def pack(self) -> bytes:
        values = self.values
        return struct.pack(f"<{len(values)}Q", *values)

    def hexdigest(self) -> str:
        """Digest of the stream: over names and tensor digests, in order; 32 hexadecimal digits."""
        total = xxhash.xxh3_128()
        total.update(msgspec.msgpack.encode(self.names))  # with their lengths, so that no two lists are alike
        total.update(self.pack())
        return total.hexdigest()

    def differing(self, packed: bytes) -> list[str]:
        """Names of the tensors whose digest is not the one in `packed` (from the other end's `pack()`)."""
        mine, theirs = self.values, unpack(packed)
        if len(theirs) != len(mine):
            return [f"{len(mine)} tensors here, {len(theirs)} there"]
        return [name for name, ours, other in zip(self.names, mine, theirs, strict=True) if ours != other]


def unpack(packed: bytes) -> list[int]:
    """The tensor digests that `StreamDigest.pack` made, in stream order."""
    return list(struct.unpack(f"<{len(packed) // 8}Q", packed))


def digests_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> Digests:
    """Dtype and digest of each tensor, wherever it lives."""
    return {
        name: (dtype_name(tensor.dtype), xxhash.xxh3_64_hexdigest(memory(as_bytes(tensor.cpu()))))
        for name, tensor in tensors
    }


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """`a, b, c and 12 more`, for messages."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
