"""Triton kernels; import this where a GPU is known to be there."""

import triton
import triton.language as tl


@triton.jit
def mixed(word, index):  # type: ignore[no-untyped-def]
    """NH of one 8-byte word: its halves, each with a key added, multiplied. `index` is int64, the result uint64."""
    key = index.to(tl.uint32) * 0x9E3779B1 + 0x85EBCA77
    key = key ^ (key >> 15)
    other = key * 0xC2B2AE3D
    low = word.to(tl.uint32) + key
    high = (word >> 32).to(tl.uint32) + other
    return low.to(tl.uint64) * high.to(tl.uint64)


@triton.jit  # type: ignore[untyped-decorator]
def word_sums_kernel(table, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Adds the mixed words of row r of `table` (address, bytes, index of its first word; int64) to `sums[r]`."""
    row = tl.program_id(0)
    address = tl.load(table + 3 * row)
    nbytes = tl.load(table + 3 * row + 1)
    start = tl.load(table + 3 * row + 2)
    whole = nbytes // 8
    words = address.to(tl.pointer_type(tl.int64))
    nothing = tl.zeros((BLOCK,), dtype=tl.uint64)
    total = nothing
    first = tl.program_id(1).to(tl.int64)
    for begin in range(first * BLOCK, whole, tl.num_programs(1).to(tl.int64) * BLOCK):
        index = begin + tl.arange(0, BLOCK).to(tl.int64)
        mask = index < whole
        word = tl.load(words + index, mask=mask, other=0).to(tl.uint64, bitcast=True)
        total += tl.where(mask, mixed(word, start + index), nothing)
    if first == 0:  # the bytes after the last whole word
        lane = tl.arange(0, 8).to(tl.int64)
        rest = nbytes - whole * 8
        tail = tl.load(address.to(tl.pointer_type(tl.uint8)) + whole * 8 + lane, mask=lane < rest, other=0)
        word = tl.sum(tail.to(tl.int64) << (8 * lane), 0).to(tl.uint64, bitcast=True)
        alone = (tl.arange(0, BLOCK) == 0) & (rest > 0)
        total += tl.where(alone, mixed(word, start + whole), nothing)
    tl.atomic_add(sums + row, tl.sum(total, 0).to(tl.int64, bitcast=True))
