"""Draws the results of `bench_gpu.py` for the README.

    python benchmarks/plot.py benchmarks/results/bench_gpu.json benchmarks/results/bench_gpu.png

One panel for each model: milliseconds from a push to its commit, of this package with and without digests, of vLLM's
own `ipc` backend, and of a plain copy of the same bytes on that GPU, which nothing can beat. Lines are the spread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, NATIVE, COPY = "#2a9d8f", "#c8553d", "#9aa0a6"


class Bar(NamedTuple):
    """A way to bring weights into vLLM: its median and spread, in milliseconds."""

    label: str
    median: float
    low: float
    high: float
    color: str


def bars(off: dict[str, Any], digest: dict[str, Any]) -> list[Bar]:
    """Of one model, from its two entries in the results."""
    own = [("verify off", off), ("verify digest", digest)]
    found = [Bar(label, *_ms(entry["ours_s"], entry["ours_spread_s"]), OURS) for label, entry in own]
    for way, times in off["naive_s"].items():
        found.append(Bar(f"vLLM {way}", *_ms(times["median"], times["spread"]), NATIVE))
    return [*found, Bar("plain copy", *_ms(off["copy_s"]["median"], off["copy_s"]["spread"]), COPY)]


def _ms(median: float, spread: list[float]) -> tuple[float, float, float]:
    return 1e3 * median, 1e3 * spread[0], 1e3 * spread[1]


def draw(axes: Axes, title: str, found: list[Bar]) -> None:
    names = [bar.label for bar in found][::-1]
    medians = [bar.median for bar in found][::-1]
    errors = [[bar.median - bar.low for bar in found][::-1], [bar.high - bar.median for bar in found][::-1]]
    axes.barh(names, medians, xerr=errors, color=[bar.color for bar in found][::-1], ecolor="#444444", capsize=2)
    for row, bar in enumerate(found[::-1]):
        axes.annotate(f"{bar.median:.0f}", (bar.high, row), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_title(title, loc="left")
    axes.set_xlim(0, 1.12 * max(bar.high for bar in found))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what bench_gpu.py wrote")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    cases = {case["name"]: case for case in results["cases"]}
    models = sorted((name for name in cases if name.endswith(" ipc")), key=lambda name: cases[name]["bytes"])
    if not models:
        parser.error(f"{args.results} has no results of `ipc`; run bench_gpu.py with such a case")
    figure, panels = plt.subplots(len(models), 1, figsize=(8, 2.1 * len(models) + 0.4), squeeze=False)
    for axes, name in zip(panels[:, 0], models, strict=True):
        size = cases[name]["bytes"] / 1e9
        title = f"Qwen3-{name.removesuffix(' ipc')}, {size:.1f} GB in bfloat16"
        draw(axes, title, bars(cases[name], cases[f"{name}, digest"]))
    panels[-1, 0].set_xlabel(f"ms from push to commit on one {results['machine']['gpu']}; second and later syncs")
    figure.tight_layout()
    figure.savefig(args.picture, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
