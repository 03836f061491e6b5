"""Each benchmark runs, in small, and writes the format that all of them share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_bench_engine_writes_paired_cases(tmp_path: Path) -> None:
    result = bench(tmp_path, "bench_engine.py", "--rounds", "1", "--cases", "small", "--receivers", "1")
    [case] = result["cases"]
    assert case["name"] == "small"
    assert case["bytes"] == 10_000 * 4096


def test_bench_gather_writes_paired_cases_of_equal_tensors(tmp_path: Path) -> None:
    options = ["--kinds", "fsdp2", "--policies", "moe", "--layers", "1", "--depths", "1", "--rounds", "1"]
    moe, depth = bench(tmp_path, "bench_gather.py", *options)["cases"]
    assert (moe["name"], depth["name"]) == ("fsdp2 moe", "fsdp2 1 layers")
    assert moe["baseline"] in moe["naive_s"]
    assert moe["baseline_s"] == min(moe["naive_s"].values())


@pytest.mark.parametrize("script", ["bench_engine.py", "bench_gather.py", "bench_gpu.py", "bench_lora.py"])
def test_help_comes_without_torch(script: str) -> None:
    imports = [sys.executable, "-X", "importtime", f"benchmarks/{script}", "--help"]
    run = subprocess.run(imports, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert "torch" not in run.stderr


def bench(folder: Path, script: str, *options: str) -> dict[str, Any]:
    """Runs a benchmark, checks what all of them have in common, and returns its result."""
    target = folder / "result.json"
    command = [sys.executable, f"benchmarks/{script}", *options, "--json", str(target)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(target.read_text())
    assert set(result) == {"machine", "command", "cases"}
    assert script in result["command"]
    for case in result["cases"]:
        assert case["ratio"] == case["baseline_s"] / case["ours_s"]
        assert case["peak_extra_mb"] <= case["allowed_extra_mb"]
        assert {"ours_spread_s", "baseline_spread_s", "baseline", "gb_per_s"} <= set(case)
    return result
