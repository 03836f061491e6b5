"""Triton kernels; import this where a GPU is known to be there."""

import triton
import triton.language as tl


@triton.jit
def mixed(words, index):  # type: ignore[no-untyped-def]
    """SplitMix64 of words and their indices, all uint64."""
    z = words ^ ((index + 1) * 0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit  # type: ignore[untyped-decorator]
def word_sums_kernel(table, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Adds the mixed words of row r of `table` (address, bytes, index of its first word; int64) to `sums[r]`."""
    row = tl.program_id(0)
    address = tl.load(table + 3 * row)
    nbytes = tl.load(table + 3 * row + 1)
    start = tl.load(table + 3 * row + 2)
    whole = nbytes // 8
    words = address.to(tl.pointer_type(tl.int64))
    total = tl.zeros((BLOCK,), dtype=tl.uint64)
    first = tl.program_id(1).to(tl.int64)
    for begin in range(first * BLOCK, whole, tl.num_programs(1).to(tl.int64) * BLOCK):
        index = begin + tl.arange(0, BLOCK).to(tl.int64)
        mask = index < whole
        word = tl.load(words + index, mask=mask, other=0).to(tl.uint64, bitcast=True)
        total += tl.where(mask, mixed(word, (start + index).to(tl.uint64)), tl.zeros((BLOCK,), dtype=tl.uint64))
    if first == 0:  # the bytes after the last whole word
        lane = tl.arange(0, 8).to(tl.int64)
        rest = nbytes - whole * 8
        tail = tl.load(address.to(tl.pointer_type(tl.uint8)) + whole * 8 + lane, mask=lane < rest, other=0)
        word = tl.sum(tail.to(tl.int64) << (8 * lane), 0).to(tl.uint64, bitcast=True)
        alone = (tl.arange(0, BLOCK) == 0) & (rest > 0)
        total += tl.where(alone, mixed(word, (start + whole).to(tl.uint64)), tl.zeros((BLOCK,), dtype=tl.uint64))
    tl.atomic_add(sums + row, tl.sum(total, 0).to(tl.int64, bitcast=True))
