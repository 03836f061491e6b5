"""Triton kernels; import this where a GPU is known to be there."""

import triton
import triton.language as tl


@triton.jit
def mixed(word, key):  # type: ignore[no-untyped-def]
    """NH of one 8-byte word: its halves, each with a key added, multiplied. All uint64, but for `key`, uint32."""
    key = key ^ (key >> 15)
    low = word.to(tl.uint32) + key
    high = (word >> 32).to(tl.uint32) + key * 0xC2B2AE3D
    return low.to(tl.uint64) * high.to(tl.uint64)


@triton.jit  # type: ignore[untyped-decorator]
def word_sums_kernel(table, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Adds the mixed words of row r of `table` (address, bytes, index of its first word; int64) to `sums[r]`."""
    row = tl.program_id(0)
    address = tl.load(table + 3 * row)
    nbytes = tl.load(table + 3 * row + 1)
    start = tl.load(table + 3 * row + 2)
    whole = nbytes // 8
    words = address.to(tl.pointer_type(tl.uint64))
    lanes = tl.arange(0, BLOCK)
    lane_keys = lanes.to(tl.uint32) * 0x9E3779B1
    nothing = tl.zeros((BLOCK,), dtype=tl.uint64)
    total = nothing
    first = tl.program_id(1).to(tl.int64)
    for begin in range(first * BLOCK, whole, tl.num_programs(1).to(tl.int64) * BLOCK):
        there = lanes < tl.minimum(whole - begin, BLOCK).to(tl.int32)
        word = tl.load(words + begin + lanes, mask=there, other=0)
        key = lane_keys + ((start + begin).to(tl.uint32) * 0x9E3779B1 + 0x85EBCA77)
        total += tl.where(there, mixed(word, key), nothing)
    if first == 0:  # the bytes after the last whole word
        lane = tl.arange(0, 8).to(tl.int64)
        rest = nbytes - whole * 8
        tail = tl.load(address.to(tl.pointer_type(tl.uint8)) + whole * 8 + lane, mask=lane < rest, other=0)
        word = tl.sum(tail.to(tl.int64) << (8 * lane), 0).to(tl.uint64, bitcast=True)
        alone = (lanes == 0) & (rest > 0)
        key = (start + whole).to(tl.uint32) * 0x9E3779B1 + 0x85EBCA77
        total += tl.where(alone, mixed(word, key), nothing)
    tl.atomic_add(sums + row, tl.sum(total, 0).to(tl.int64, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def copy_chunks_kernel(table, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Copies chunk r of `table` (source, target, bytes; int64, all multiples of 16), each in a program of its own."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.multiple_of(tl.load(table + 3 * row), 16).to(tl.pointer_type(tl.uint64))
    target = tl.multiple_of(tl.load(table + 3 * row + 1), 16).to(tl.pointer_type(tl.uint64))
    words = tl.multiple_of((tl.load(table + 3 * row + 2) // 8).to(tl.int32), 2)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, words, BLOCK):
        there = begin + lanes < words
        tl.store(target + begin + lanes, tl.load(source + begin + lanes, mask=there), mask=there)
