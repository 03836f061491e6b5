"""The benchmark that needs vLLM runs, in small, and writes the format that all of them share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--hidden", "128", "--layers", "1", "--vocab", "256", "--requests", "2", "--tokens", "4", "--rounds", "1")


def test_bench_lora_pairs_an_adapter_alone_with_files_and_with_merging(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/bench_lora.py", *SMALL, "--json", str(target)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    result = json.loads(target.read_text())
    assert set(result) == {"machine", "command", "cases"}
    assert "bench_lora.py" in result["command"]
    file, merged, decoding = result["cases"]
    assert [case["name"] for case in result["cases"]] == [
        "adapter alone vs file",
        "adapter alone vs merged",
        "decoding vs merged",
    ]
    for case in result["cases"]:
        assert case["ratio"] == case["baseline_s"] / case["ours_s"]
        assert {"ours_spread_s", "baseline_spread_s", "baseline", "policy"} <= set(case)
    for case in (file, merged):
        assert case["bytes"] == case["adapter_bytes"]
        assert case["bytes"] < case["written_bytes"] <= case["allowed_bytes"]
        assert set(case["phases"]) == {"start_s", "gather_s", "transfer_s", "commit_s"}
    assert file["baseline_s"] == min(way["median"] for way in file["naive_s"].values())
    assert merged["baseline_bytes"] > merged["bytes"]
    assert decoding["tokens"] == 2 * 4
