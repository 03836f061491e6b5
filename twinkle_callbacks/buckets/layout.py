"""Where each tensor lies in the stream of buckets: a pure plan, made one tensor at a time, without torch.

A bucket is a run of at most `bucket_bytes` bytes. Tensors start at multiples of `ALIGNMENT_BYTES`, so that its bytes
can be viewed in any dtype. A tensor that fits into an empty bucket is never split; a larger one travels in chunks, the
first of which begins a bucket, so that no bucket holds parts of two such tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

ALIGNMENT_BYTES = 512


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """Name, dtype and full shape of one tensor of the stream; `dtype` is torch's name, such as `bfloat16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Chunk(NamedTuple):
    """A run of a tensor's bytes inside a bucket.

    Attributes:
        bucket: number of the bucket in the stream, from 0.
        offset: first byte inside the bucket.
        start: first byte inside the tensor.
        nbytes: length in bytes.
    """

    bucket: int
    offset: int
    start: int
    nbytes: int


def align(nbytes: int) -> int:
    """Rounds up to the next multiple of `ALIGNMENT_BYTES`."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class BucketPlanner:
    """Places tensors into consecutive buckets in the order in which they come."""

    def __init__(self, bucket_bytes: int) -> None:
        if bucket_bytes < ALIGNMENT_BYTES or bucket_bytes % ALIGNMENT_BYTES:
            raise ValueError(f"bucket_bytes={bucket_bytes}: must be a positive multiple of {ALIGNMENT_BYTES}")
        self.bucket_bytes = bucket_bytes
        self._bucket = 0
        self._used = 0

    def place(self, nbytes: int) -> list[Chunk]:
        """Returns where the next tensor of `nbytes` bytes goes: one chunk, or several if it is larger than a bucket."""
        if nbytes <= self.bucket_bytes:
            if nbytes > self.bucket_bytes - self._used:
                self.next_bucket()
            return [self._take(0, nbytes)]
        if self._used:
            self.next_bucket()
        chunks = []
        start = 0
        while start < nbytes:
            if self._used == self.bucket_bytes:
                self.next_bucket()
            chunk = self._take(start, min(nbytes - start, self.bucket_bytes - self._used))
            chunks.append(chunk)
            start += chunk.nbytes
        return chunks

    def next_bucket(self) -> None:
        """Leaves the rest of the bucket empty."""
        self._bucket += 1
        self._used = 0

    def go_to(self, bucket: int) -> None:
        """Leaves all buckets before this one."""
        if self._bucket < bucket:
            self._bucket, self._used = bucket, 0

    def resume(self, last: Chunk) -> None:
        """Goes on as if `last` had been the last chunk placed."""
        self._bucket = last.bucket
        self._used = min(align(last.offset + last.nbytes), self.bucket_bytes)

    def _take(self, start: int, nbytes: int) -> Chunk:
        chunk = Chunk(self._bucket, self._used, start, nbytes)
        self.resume(chunk)
        return chunk
