"""`report.png`: reward, logprob gap and seconds per sync of the demo's two runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from recipes.summary import Summary

_SYNCED, _CONTROL = "tab:blue", "tab:orange"


def draw(summary: Summary, path: Path) -> None:
    """Draws the three panels into a PNG file."""
    figure, (reward, gap, sync) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for records, label, color in (
        (summary.synced, "synced after each step", _SYNCED),
        (summary.control, "synced once, at the start", _CONTROL),
    ):
        steps = [record.step for record in records]
        reward.plot(steps, [record.reward for record in records], label=label, color=color)
        gap.plot(steps, [record.logprob_gap for record in records], label=label, color=color)
    syncs = [(record.step, record.sync_s) for record in summary.synced if record.sync_s is not None]
    sync.plot(*zip(*syncs, strict=True), ".", color=_SYNCED)
    sync.axhline(summary.sync_seconds_median, color=_SYNCED, linewidth=1, label="median")
    gap.set_yscale("log")
    sync.set_ylim(bottom=0)
    _label(reward, "Reward of the server's samples", "mean reward")
    _label(gap, "Logprobs, server against trainer", "mean |difference| per token")
    _label(sync, f"Time of a sync of {summary.bytes_per_sync / 1e6:.1f} MB", "seconds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    axes.legend()
