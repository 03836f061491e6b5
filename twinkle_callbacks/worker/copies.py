"""Writes into a live model: whole stretches of GPU memory by one kernel, all else one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

Tensors = Mapping[str, torch.Tensor]

_WORD_BYTES = 16  # the widest load of a GPU
_CHUNK_BYTES = 128 << 10  # for one program of the kernel
_BLOCK_WORDS = 4096  # of 8 bytes, for one step of a program
_WARPS = 8


class Copy(NamedTuple):
    """A slice of the model and the slice of a given tensor that belongs there."""

    target: torch.Tensor
    source: str
    window: tuple[torch.Size, tuple[int, ...], int] | None  # shape, stride, offset in the source; None: all of it

    def replay(self, tensors: Tensors) -> None:
        self.target.copy_(self.of(tensors), non_blocking=True)

    def of(self, tensors: Tensors) -> torch.Tensor:
        """The slice that is copied."""
        source = tensors[self.source]
        if self.window is None:
            return source
        shape, stride, offset = self.window
        return source.as_strided(shape, stride, source.storage_offset() + offset)


class Fill(NamedTuple):
    """A slice of the model, such as the padding of an embedding, and the number that the loader fills it with."""

    target: torch.Tensor
    value: complex

    def replay(self, tensors: Tensors) -> None:
        self.target.fill_(self.value)


class Writes:
    """Writes in a given order, repeated from tensors of other values and addresses, but of the same layouts.

    Where no two overlap, their order does not matter. Then those that copy one stretch of GPU memory to another are
    done by one kernel: between copies that are started one by one the GPU rests.
    """

    def __init__(self, writes: Sequence[Copy | Fill], tensors: Tensors) -> None:
        self.targets = [write.target for write in writes]
        self._device = self.targets[0].device
        free = self._device.type == "cuda" and not _overlap(self.targets)
        fused = [free and isinstance(write, Copy) and _is_stretch(write, tensors) for write in writes]
        self._stretches = _Stretches([w for w, f in zip(writes, fused, strict=True) if f and isinstance(w, Copy)])
        self._single = [write for write, f in zip(writes, fused, strict=True) if not f]

    def replay(self, tensors: Tensors) -> None:
        """Writes everything, and waits until it is there. Keeps no view of a source, which would hold its memory."""
        with torch.no_grad():
            self._stretches.replay(tensors)
            for write in self._single:
                write.replay(tensors)
        wait_for(self._device)

    def __str__(self) -> str:
        nbytes = sum(target.nbytes for target in self.targets)
        return f"{len(self.targets)} writes, {nbytes / 1e9:.3f} GB, {len(self._stretches.copies)} of them in one kernel"


class _Stretches:
    """Copies of contiguous bytes within one GPU. The list of them stays there while the sources stay where they are."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self.copies = copies
        self._addresses: list[int] = []  # of the sources, at the last replay
        self._table = torch.empty(0)

    def replay(self, tensors: Tensors) -> None:
        addresses = [copy.of(tensors).data_ptr() for copy in self.copies]
        if any(address % _WORD_BYTES for address in addresses):  # as in a bucket of odd sizes
            for copy in self.copies:
                copy.replay(tensors)
            return
        if addresses != self._addresses:
            self._table = _chunks(addresses, [copy.target for copy in self.copies])
            self._addresses = addresses
        if addresses:
            copy_chunks(self._table)


def wait_for(device: torch.device) -> None:
    """Waits until what this thread started on the device is done, as the sender may change its tensors after it."""
    if device.type != "cpu":
        torch.get_device_module(device).current_stream(device).synchronize()


def copy_chunks(table: torch.Tensor) -> None:
    """Copies all chunks of a table (source, target, bytes; int64, on their GPU) by one kernel.

    All numbers are multiples of 16, and no chunk is larger than 128 KiB.
    """
    from twinkle_callbacks.buckets.device_kernels import copy_chunks_kernel

    with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        copy_chunks_kernel[(len(table),)](table, BLOCK=_BLOCK_WORDS, num_warps=_WARPS)


def _chunks(sources: Sequence[int], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """The table for `copy_chunks`, on the targets' GPU."""
    columns = sources, [target.data_ptr() for target in targets], [target.nbytes for target in targets]
    whole = torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64, device="cpu")
    counts = (whole[:, 2] + _CHUNK_BYTES - 1) // _CHUNK_BYTES
    table = whole.repeat_interleave(counts, dim=0)
    ordinals = torch.arange(len(table), device="cpu") - (counts.cumsum(0) - counts).repeat_interleave(counts)
    begin = ordinals * _CHUNK_BYTES
    table[:, :2] += begin[:, None]
    table[:, 2] = (table[:, 2] - begin).clamp(max=_CHUNK_BYTES)
    return table.to(targets[0].device)


def _is_stretch(copy: Copy, tensors: Tensors) -> bool:
    """Whether this is a copy of contiguous bytes of a whole number of words, as far as the layouts tell."""
    source, target = copy.of(tensors), copy.target
    alike = (source.shape, source.dtype, source.device) == (target.shape, target.dtype, target.device)
    plain = not (source.is_conj() or source.is_neg() or target.is_conj() or target.is_neg())
    contiguous = source.is_contiguous() and target.is_contiguous()
    return alike and plain and contiguous and target.nbytes % _WORD_BYTES == target.data_ptr() % _WORD_BYTES == 0


def _overlap(targets: Sequence[torch.Tensor]) -> bool:
    spans = sorted(span(target) for target in targets if target.numel())
    return any(start < end for (_, end), (start, _) in pairwise(spans))


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first byte of a tensor with elements, and that after its last."""
    elements = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
