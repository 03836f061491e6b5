"""What a run leaves behind: a record for each step, in memory, in `steps.jsonl`, and as a line of progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from twinkle_callbacks.report import SyncReport

if TYPE_CHECKING:
    from recipes.experience import Experience

WINDOW = 10


class StepRecord(BaseModel):
    """One step, or the measurement after the last one.

    Attributes:
        step: optimizer steps that the trainer had made.
        reward: mean reward of the samples, 0 to 1.
        logprob_gap: mean absolute per-token difference of the logprobs that server and trainer give the samples, the
            trainer under its weights at that moment.
        server_version: weight version that the server itself reported just before it sampled.
        sample_s: seconds that sampling took.
        sync_s: seconds of the sync right before, None if there was none.
        sync_bytes: payload bytes of that sync to each rollout worker.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    reward: float
    logprob_gap: float
    server_version: str
    sample_s: float
    sync_s: float | None
    sync_bytes: int | None


class History:
    """The records of a run. Only trainer rank 0 prints and writes; the others keep an empty one.

    Args:
        folder: where `steps.jsonl` goes.
        steps: number of optimizer steps planned.
        last_report: returns the sync's last report.
        is_writer: whether this is rank 0.
    """

    def __init__(
        self, folder: Path, steps: int, last_report: Callable[[], SyncReport | None], *, is_writer: bool = True
    ) -> None:
        self.records: list[StepRecord] = []
        self._path, self._steps = folder / "steps.jsonl", steps
        self._last_report = last_report
        self._seen: SyncReport | None = None
        self._is_writer = is_writer
        if is_writer:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")

    def add(self, step: int, reward: float, logprob_gap: float, experience: Experience) -> None:
        """Adds the record of a step, with the sync since the record before. Reward and gap are means over all ranks."""
        if not self._is_writer:
            return
        report = self._last_report()
        synced = report if report is not self._seen and report and not report.error else None
        self._seen = report
        record = StepRecord(
            step=step,
            reward=reward,
            logprob_gap=logprob_gap,
            server_version=experience.server_version,
            sample_s=experience.sample_s,
            sync_s=synced.seconds if synced else None,
            sync_bytes=synced.bytes if synced else None,
        )
        self.records.append(record)
        with self._path.open("a") as file:
            file.write(record.model_dump_json() + "\n")
        print(self._progress(record), flush=True)

    def _progress(self, record: StepRecord) -> str:
        sync = "no sync     " if record.sync_s is None else f"sync {record.sync_s:5.2f} s"
        return (
            f"step {record.step:>4}/{self._steps}  reward {record.reward:.3f}  logprob gap {record.logprob_gap:.1e}  "
            f"server version {record.server_version:>4}  {sync}  sampling {record.sample_s:.2f} s"
        )

    def conclude(self) -> None:
        """Prints one line for the end of the run."""
        if self.records:
            gap = max(record.logprob_gap for record in self.records)
            first, last = reward_first(self.records), reward_last(self.records)
            print(
                f"reward {first:.3f} -> {last:.3f} (means of {WINDOW} steps), largest logprob "
                f"gap {gap:.1e}, {versions_seen(self.records)} weight versions seen on the server"
            )


def reward_first(records: Sequence[StepRecord]) -> float:
    """Mean reward of the first ten records."""
    return fmean(record.reward for record in records[:WINDOW])


def reward_last(records: Sequence[StepRecord]) -> float:
    """Mean reward of the last ten records."""
    return fmean(record.reward for record in records[-WINDOW:])


def versions_seen(records: Sequence[StepRecord]) -> int:
    """Number of different weight versions that the server itself reported."""
    return len({record.server_version for record in records})
