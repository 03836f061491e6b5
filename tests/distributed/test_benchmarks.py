"""Each benchmark runs, in small, and writes the format that all of them share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_bench_engine_writes_paired_cases(tmp_path: Path) -> None:
    target = tmp_path / "engine.json"
    command = ["benchmarks/bench_engine.py", "--rounds", "1", "--cases", "small", "--receivers", "1"]
    run = subprocess.run(
        [sys.executable, *command, "--json", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(target.read_text())
    assert set(result) == {"machine", "command", "cases"}
    assert "bench_engine.py" in result["command"]
    [case] = result["cases"]
    assert case["name"] == "small"
    assert case["ratio"] == case["baseline_s"] / case["ours_s"]
    assert case["bytes"] == 10_000 * 4096
    assert case["peak_extra_mb"] <= case["allowed_extra_mb"]
    assert {"ours_spread_s", "baseline_spread_s", "baseline", "gb_per_s"} <= set(case)
