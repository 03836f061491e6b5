"""Digests of tensors that live on a GPU, computed there: 64 bits for each tensor, positional, by one Triton kernel.

Method: NH, the universal hash of UMAC (RFC 4418, 5.2.2): the two halves of each 8-byte word, each plus a key, are
multiplied, and the products summed. Keys are made from the word's index, so a word in another place changes the digest,
which a plain checksum such as `torch.hash_tensor` does not notice. Sums may be taken in any order and in parts, so
chunks of a tensor add up. Both ends of a wire compute the same one; it is not the XXH3 of host memory. It detects
corruption, not an attacker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from twinkle_callbacks.buckets.digest import StreamDigest
from twinkle_callbacks.buckets.packing import as_bytes, memory

_WORD_BYTES = 8
_BLOCK_WORDS = 1024
_WARPS = 8
_MAX_PROGRAMS = 1024  # for one tensor
_MASK = (1 << 64) - 1


class _Table(NamedTuple):
    """Where parts of tensors lie, for one kernel; holds none of them."""

    rows: torch.Tensor  # address, bytes, index of the first word; int64, on the GPU
    programs: int  # for each part

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor], starts: Sequence[int], device: torch.device) -> _Table:
        rows = [(part.data_ptr(), part.nbytes, start // _WORD_BYTES) for part, start in zip(parts, starts, strict=True)]
        words = max(nbytes for _, nbytes, _ in rows) // _WORD_BYTES + 1
        on_host = torch.tensor(rows, dtype=torch.int64, device="cpu").pin_memory()
        return cls(on_host.to(device, non_blocking=True), min(_MAX_PROGRAMS, -(-words // _BLOCK_WORDS)))

    def sums(self) -> torch.Tensor:
        from twinkle_callbacks.buckets.device_kernels import word_sums_kernel

        sums = torch.zeros(len(self.rows), dtype=torch.int64, device=self.rows.device)
        with torch.cuda.device(self.rows.device):
            word_sums_kernel[(len(self.rows), self.programs)](self.rows, sums, BLOCK=_BLOCK_WORDS, num_warps=_WARPS)
        return sums


class _Lasting(NamedTuple):
    """Tensors of an `add_lasting`."""

    names: list[str]
    lengths: list[int]
    table: _Table


class DeviceStreamDigest(StreamDigest):
    """A `StreamDigest` of contiguous tensors on one GPU. Nothing waits for the GPU before `values` are asked for.

    Memory is read in the order of the current stream of the thread that adds it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._sums: list[tuple[torch.Tensor, list[int]]] = []  # of each call: on the GPU, and where each counts
        self._lengths: list[int] = []
        self._beside: torch.cuda.Stream | None = None  # for tensors that last
        self._values_now: list[int] | None = None

    def add_tensors(self, names: Iterable[str], data: Iterable[Any]) -> None:
        parts: list[torch.Tensor] = list(data)
        first = len(self._lengths)
        self.names.extend(names)
        self._lengths.extend(part.nbytes for part in parts)
        self._add(parts, [0] * len(parts), list(range(first, first + len(parts))))

    def add_lasting(self, names: Iterable[str], data: Iterable[Any]) -> _Lasting | None:
        """Computes them beside the current stream: what is started there later need not wait."""
        names, parts = list(names), list(data)
        with self._stream_beside():
            if not parts or any(part.data_ptr() % _WORD_BYTES for part in parts):
                self.add_tensors(names, parts)
                return None
            table = _Table.of(parts, [0] * len(parts), self._device)
        lasting = _Lasting(names, [part.nbytes for part in parts], table)
        self.add_again(lasting)
        return lasting

    def add_again(self, before: _Lasting) -> None:
        first = len(self._lengths)
        self.names.extend(before.names)
        self._lengths.extend(before.lengths)
        self._values_now = None
        with self._stream_beside():
            self._sums.append((before.table.sums(), list(range(first, len(self._lengths)))))

    @contextmanager
    def _stream_beside(self) -> Iterator[None]:
        """Makes a stream beside the current one current, which begins with what that has begun."""
        self._beside = _stream_beside(self._device)
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._beside):
            yield

    def add_chunk(self, name: str, data: Any, *, first: bool, last: bool) -> None:
        if first:
            self.names.append(name)
            self._lengths.append(0)
        self._add([data], [self._lengths[-1]], [len(self._lengths) - 1])
        self._lengths[-1] += data.nbytes

    def drop_last(self, count: int) -> None:
        if count:
            del self.names[-count:], self._lengths[-count:]
            kept, self._values_now = len(self._lengths), None
            self._sums = [(sums, [slot if slot < kept else -1 for slot in slots]) for sums, slots in self._sums]

    def _add(self, parts: Sequence[torch.Tensor], starts: Sequence[int], slots: list[int]) -> None:
        self._values_now = None
        if any(part.nbytes for part in parts):
            self._sums.append((word_sums(parts, starts, self._device), slots))

    @property
    def values(self) -> list[int]:
        """The digest of each tensor, in stream order; waits for the GPU."""
        if self._values_now is None:
            self._values_now = self._computed()
        return self._values_now

    def _computed(self) -> list[int]:
        totals = [length * 0x9E3779B97F4A7C15 for length in self._lengths]
        if self._sums:
            if self._beside is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._beside)
            slots = [slot for _, slots in self._sums for slot in slots]
            for slot, value in zip(slots, torch.cat([sums for sums, _ in self._sums]).tolist(), strict=True):
                if slot >= 0:
                    totals[slot] += value
        return [total & _MASK for total in totals]


@lru_cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """One for all digests: each stream that ever allocates keeps memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # as torch has it


def digest_for(device: torch.device) -> StreamDigest:
    """The digest that both ends compute of a stream whose tensors lie on this device."""
    return DeviceStreamDigest(device) if device.type == "cuda" else StreamDigest()


def tensor_digest(tensor: torch.Tensor) -> int:
    """The digest of one tensor, computed where it is."""
    digest = digest_for(tensor.device)
    digest.add_tensors([""], [digestible(tensor)])
    return digest.values[0]


def digestible(tensor: torch.Tensor) -> Any:
    """What the digest of a tensor is computed from: on a GPU a contiguous tensor itself, else its bytes."""
    if tensor.is_cuda and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        return tensor
    return memory(as_bytes(tensor))


def word_sums(parts: Sequence[torch.Tensor], starts: Sequence[int], device: torch.device) -> torch.Tensor:
    """The sum of the mixed words of each part, int64 on the GPU; one kernel for all.

    Args:
        parts: contiguous tensors on the device, of any length.
        starts: where in its tensor each part begins, in bytes, a multiple of 8.
        device: where they are.
    """
    kept = [part if part.data_ptr() % _WORD_BYTES == 0 else part.clone() for part in parts]
    return _Table.of(kept, starts, device).sums()
