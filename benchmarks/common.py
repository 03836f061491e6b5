"""What the benchmarks share: the result format, the machine's description, and peak memory of a process."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class NotRunError(Exception):
    """A case cannot run on this machine; says why."""


def machine() -> dict[str, Any]:
    """Describes this machine without naming it."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **(gpu_details() if torch.cuda.is_available() else {}),
    }


def gpu_details() -> dict[str, Any]:
    return {
        "gpu_memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
        "cuda": torch.version.cuda,
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),
    }


def case(
    name: str, ours_s: Sequence[float], baseline: str, baseline_s: Sequence[float], nbytes: int, **extra: Any
) -> dict[str, Any]:
    """One entry of `cases`: medians and spread of paired runs; `ratio` is baseline_s / ours_s."""
    ours, base = statistics.median(ours_s), statistics.median(baseline_s)
    return {
        "name": name,
        "ours_s": ours,
        "ours_spread_s": [min(ours_s), max(ours_s)],
        "baseline": baseline,
        "baseline_s": base,
        "baseline_spread_s": [min(baseline_s), max(baseline_s)],
        "ratio": base / ours,
        "rounds": len(ours_s),
        "bytes": nbytes,
        "gb_per_s": nbytes / ours / 1e9,
        **extra,
    }


def median_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Of something measured beside the cases, such as a phase."""
    return {"median": statistics.median(values), "spread": [min(values), max(values)]}


def write(path: Path | None, cases: list[dict[str, Any]], **beside: Any) -> None:
    """Prints the cases as a table, and saves them."""
    show(cases)
    save(path, cases, **beside)


def show(cases: list[dict[str, Any]]) -> None:
    """Prints the cases as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "ours s", "baseline s", "ratio", "GB/s", "peak extra MB", "baseline")
    for entry in cases:
        peak = entry.get("peak_extra_mb")
        table.add_row(
            entry["name"],
            f"{entry['ours_s']:.4f}",
            f"{entry['baseline_s']:.4f}",
            f"{entry['ratio']:.2f}",
            f"{entry['gb_per_s']:.2f}",
            "" if peak is None else f"{peak:.0f}",
            entry["baseline"],
        )
    Console(width=140).print(table)


def save(path: Path | None, cases: list[dict[str, Any]], **beside: Any) -> None:
    """Writes the cases, and what stands beside them, in the format of the project to `path`."""
    if path is not None:
        command = shlex.join(["python", *sys.orig_argv[1:]])
        result = {"machine": machine(), "command": command, "cases": cases, **beside}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


def written_bytes() -> int:
    """Bytes that this process has written so far, to files and to the sockets of an engine (Linux)."""
    return _proc_value("io", "wchar")


def reset_peak_memory() -> int:
    """Starts a new measurement of this process's peak resident memory; returns the resident bytes now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _proc_value("status", "VmRSS") << 10


def peak_memory() -> int:
    """Peak resident bytes since `reset_peak_memory` (Linux)."""
    return _proc_value("status", "VmHWM") << 10


def _proc_value(file: str, field: str) -> int:
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/{file} has no {field}")
