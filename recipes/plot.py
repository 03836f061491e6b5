"""`report.png`: reward, logprob gap and seconds per sync of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from recipes.history import StepRecord


def draw(runs: Mapping[str, Sequence[StepRecord]], path: Path) -> None:
    """Draws the three panels into a PNG file, each run under its name."""
    figure, (reward, gap, sync) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, records in runs.items():
        steps = [record.step for record in records]
        reward.plot(steps, [record.reward for record in records], label=name)
        gap.plot(steps, [record.logprob_gap for record in records], label=name)
        syncs = {record.step: record.sync_s for record in records if record.sync_s is not None}
        sync.plot(syncs.keys(), syncs.values(), ".", label=f"{name}: median {median(syncs.values()):.3f} s")
    gap.set_yscale("log")
    sync.set_ylim(bottom=0)
    size = max(record.sync_bytes or 0 for records in runs.values() for record in records)
    _label(reward, "Reward of the server's samples", "mean reward")
    _label(gap, "Logprobs, server against trainer", "mean |difference| per token")
    _label(sync, f"Time of a sync of {size / 1e6:.1f} MB", "seconds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    axes.legend()
