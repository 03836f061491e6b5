"""What a run records, and how the demo judges two of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.config import RecipeConfig
from recipes.history import History, StepRecord, versions_seen
from recipes.policy import WarmUp
from recipes.summary import Runs, Summary, show, summarize, write
from twinkle_callbacks.report import SyncReport

STEPS = 30
PROMISED = {
    *("framework", "steps", "versions_committed", "reward_first", "reward_last", "reward_last_without_sync"),
    *("logprob_gap_max", "sync_seconds_median", "bytes_per_sync", "logprob_gap_without_sync", "command"),
}


def sync_report(version: int, error: str = "") -> SyncReport:
    return SyncReport(version, 1000, 0.25, 0.0, 0.0, 0.0, error=error)


def experience(version: str) -> Any:
    return SimpleNamespace(server_version=version, sample_s=0.5)


def test_history_writes_a_line_for_each_step_and_counts_each_sync_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = sync_report(1)
    reports = [sync_report(0), second, second, sync_report(1, error="unreachable")]
    history = History(tmp_path / "run", 3, lambda: reports[len(history.records)])
    for step, version in enumerate("0111"):
        history.add(step, 0.5, 1e-7, experience(version))
    assert [record.sync_s for record in history.records] == [0.25, 0.25, None, None]
    lines = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    assert [StepRecord.model_validate_json(line) for line in lines] == history.records
    assert versions_seen(history.records) == 2
    assert capsys.readouterr().out.splitlines()[2].startswith("step    2/3  reward 0.500  logprob gap 1.0e-07")


def test_only_rank_zero_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = History(tmp_path / "run", 1, lambda: sync_report(0), is_writer=False)
    history.add(0, 0.5, 0.0, experience("0"))
    history.conclude()
    assert (history.records, capsys.readouterr().out) == ([], "")
    assert not (tmp_path / "run").exists()


def record(step: int, reward: float, gap: float, *, version: int, synced: bool) -> StepRecord:
    return StepRecord(
        step=step,
        reward=reward,
        logprob_gap=gap,
        server_version=str(version),
        sample_s=0.5,
        sync_s=0.1 if synced else None,
        sync_bytes=1000 if synced else None,
    )


def runs(*, gain: float = 0.3, gap: float = 1e-6, control_gap: float = 1.0, missing: int = 0) -> Runs:
    synced = [
        record(step, 0.4 + gain * step / STEPS, gap, version=max(0, step - missing), synced=True)
        for step in range(STEPS + 1)
    ]
    control = [record(step, 0.4, control_gap * step / 10, version=0, synced=step == 0) for step in range(11)]
    return Runs(RecipeConfig(steps=STEPS), WarmUp(100, 0.38, 5.0), synced, control, "python -m recipes.demo", 60.0)


def test_report_holds_what_was_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarize(runs())
    assert summary.failures == []
    write(summary, tmp_path)
    show(summary, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() >= PROMISED
    assert (report["framework"], report["steps"], report["versions_committed"]) == ("lightning", STEPS, STEPS + 1)
    assert report["reward_first"] == pytest.approx(0.4 + 0.3 * 4.5 / STEPS)
    assert report["reward_last"] == pytest.approx(0.4 + 0.3 * 25.5 / STEPS)
    assert (report["reward_last_without_sync"], report["logprob_gap_max"]) == (pytest.approx(0.4), 1e-6)
    assert report["logprob_gap_without_sync"] == pytest.approx([step / 10 for step in range(11)])
    assert (report["sync_seconds_median"], report["bytes_per_sync"]) == (0.1, 1000)
    assert len(report["synced"]) == STEPS + 1
    assert Summary.model_validate(report) == summary
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "reward, last 10 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("made_wrong", "message"),
    [
        ({"gain": 0.1}, r"the reward rose by 0\.\d+, not by 0\.2"),
        ({"gap": 0.06}, r"logprobs of server and trainer were 0\.060 apart"),
        ({"missing": 2}, "the server reported 29 weight versions, expected were 31"),
        ({"control_gap": 0.01}, "the control shows nothing"),
    ],
)
def test_each_broken_promise_is_named(made_wrong: dict[str, Any], message: str) -> None:
    (failure,) = summarize(runs(**made_wrong)).failures
    assert re.search(message, failure)
