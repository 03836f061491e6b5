"""The kernels of a GPU, run by Triton's interpreter on the CPU: they copy each byte, and no byte escapes a digest.

The interpreter is chosen when the kernels are imported, so each test is a process of its own. tests/gpu has the rest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")

COPY = """
    from twinkle_callbacks.worker.copies import _chunks, copy_chunks

    sizes = [0, 16, 48, 4096, 128 << 10, (128 << 10) + 16, 400_000]
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes]
    around = [torch.full((n + 64,), 7, dtype=torch.uint8) for n in sizes]
    targets = [tensor[16 : 16 + n] for tensor, n in zip(around, sizes)]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in [*sources, *targets] if tensor.numel())
    copy_chunks(_chunks([source.data_ptr() for source in sources], targets))
    for source, target, tensor in zip(sources, targets, around):
        assert torch.equal(source, target)
        assert set(tensor[:16].tolist()) | set(tensor[16 + len(target) :].tolist()) == {7}
"""

DIGEST = """
    from twinkle_callbacks.buckets.device_kernels import word_sums_kernel

    def mixed(index, word):
        key = (index * 0x9E3779B1 + 0x85EBCA77) % 2**32
        key ^= key >> 15
        low, high = word % 2**32, word >> 32
        return ((low + key) % 2**32) * ((high + key * 0xC2B2AE3D) % 2**32)

    def expected(data, start):  # NH as RFC 4418 has it, in whole numbers
        padded = data + bytes(-len(data) % 8)
        words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
        return sum(mixed(start + i, word) for i, word in enumerate(words)) % 2**64

    generator = torch.Generator().manual_seed(1)
    sizes, starts = [1, 7, 8, 9, 64, 1000, 8192, 20_001], [0, 0, 5, 0, 1 << 33, 0, 2, 0]
    parts = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes]
    rows = [(part.data_ptr(), n, start) for part, n, start in zip(parts, sizes, starts)]
    sums = torch.zeros(len(rows), dtype=torch.int64)
    word_sums_kernel[(len(rows), 3)](torch.tensor(rows), sums, BLOCK=256)
    found = [value % 2**64 for value in sums.tolist()]
    assert found == [expected(bytes(part.tolist()), start) for part, start in zip(parts, starts)]
"""


@pytest.mark.parametrize("program", [COPY, DIGEST], ids=["copy", "digest"])
def test_kernel(program: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import torch\n" + textwrap.dedent(program)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
