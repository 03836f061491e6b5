"""Tenants on one server: how they are started and watched, and how the run is judged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes import tenants
from recipes.config import RecipeConfig
from recipes.history import StepRecord
from recipes.rollout import Completion
from recipes.tenants import Trainer
from recipes.tenants_report import BaseAnswers, TenantsReport, show, summarize, write
from twinkle_callbacks import auth
from twinkle_callbacks.errors import TwinkleError

STEPS = 30
SERVER_TOKEN = "the-servers-own-token"
SHIPPED = Path(__file__).parents[2] / "configs" / "tenants.yaml"


def record(step: int, *, gain: float, gap: float, version: int) -> StepRecord:
    return StepRecord(
        step=step,
        reward=0.3 + gain * step / STEPS,
        logprob_gap=gap,
        server_version=str(version),
        sample_s=0.5,
        sync_s=0.05,
        sync_bytes=1000,
    )


def records(*, gain: float = 0.3, gap: float = 1e-6, missing: int = 0) -> list[StepRecord]:
    return [record(step, gain=gain, gap=gap, version=max(0, step - missing)) for step in range(STEPS + 1)]


def completion(*, token: int = 5, logprob: float = -0.5) -> Completion:
    return Completion([3], [token, 1], [-0.25, logprob], "2")


def base(*, during: int = 1, **last: Any) -> BaseAnswers:
    answers = BaseAnswers([completion(), completion()])
    for _ in range(during):
        answers.add_during([completion(), completion()])
    answers.add_after([completion(), completion(**last)])
    return answers


def config(tmp_path: Path) -> RecipeConfig:
    return RecipeConfig.load(SHIPPED, [f"steps={STEPS}", f"output_dir={tmp_path}"])


def test_report_holds_both_tenants_and_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"add": records(), "reverse": records(gain=0.2)}
    report = summarize(config(tmp_path), runs, base(logprob=-0.50001), 60.0)
    assert report.failures == []
    write(report, tmp_path)
    show(report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert TenantsReport.model_validate(written) == report
    assert {name: tenant["task"] for name, tenant in written["tenants"].items()} == {
        "add": "addition",
        "reverse": "reversal",
    }
    assert [tenant["versions_committed"] for tenant in written["tenants"].values()] == [STEPS + 1] * 2
    assert written["base_logprob_difference_max"] == pytest.approx(1e-5)
    assert (written["base_comparisons_during"], written["base_comparisons_after"]) == (1, 1)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "reverse: reversal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong_run", "wrong_base", "message"),
    [
        ({"gain": 0.05}, {}, r"^reverse: the reward rose by 0\.\d+, not by 0\.1"),
        ({"gap": 0.06}, {}, r"^reverse: .* 0\.060 apart"),
        ({"missing": 1}, {}, "^reverse: the server reported 30 weight versions, expected were 31"),
        ({}, {"token": 6}, "the base answers otherwise than before: same tokens False"),
        ({}, {"logprob": -0.501}, r"the base answers otherwise .* up to 1\.0e-03 apart"),
        ({}, {"during": 0}, "the base was not asked both while all tenants trained and after"),
    ],
)
def test_each_broken_promise_is_named(
    wrong_run: dict[str, Any], wrong_base: dict[str, Any], message: str, tmp_path: Path
) -> None:
    runs = {"add": records(), "reverse": records(**wrong_run)}
    (failure,) = summarize(config(tmp_path), runs, base(**wrong_base), 60.0).failures
    assert re.search(message, failure)


def test_a_trainer_gets_its_tenants_token_by_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auth.TOKEN_ENV, SERVER_TOKEN)
    started: dict[str, Any] = {}
    real = subprocess.Popen

    def popen(command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
        started.update(command=command, env=env)
        return real([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    trainer = Trainer(config(tmp_path), "reverse", "http://a:1")
    with trainer.running() as process:
        assert trainer.check(process)
        assert trainer.records() == []
    assert process.returncode is not None  # nothing outlives the block
    token = started["env"][auth.TOKEN_ENV]
    assert token == auth.tenant_token(SERVER_TOKEN, "reverse")
    written = tmp_path / "reverse" / "config.yaml"
    assert RecipeConfig.load(written) == config(tmp_path).tenant("reverse", "http://a:1")
    for text in (" ".join(started["command"]), written.read_text()):
        assert token not in text
        assert SERVER_TOKEN not in text


def test_a_trainer_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auth.TOKEN_ENV, SERVER_TOKEN)
    trainer = Trainer(config(tmp_path), "add", "http://127.0.0.1:9")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with trainer.running() as process:
        process.wait()
        (tmp_path / "add" / "trainer.log").write_text("the base differs")
        with pytest.raises(TwinkleError, match=r"(?s)trainer of 'add' ended with exit code 1.*the base differs"):
            trainer.check(process)


def test_records_are_read_while_they_are_written(tmp_path: Path) -> None:
    trainer, first = Trainer(config(tmp_path), "add", "http://a:1"), records()[0]
    (tmp_path / "add").mkdir()
    (tmp_path / "add" / "steps.jsonl").write_text(first.model_dump_json() + "\n" + '{"step": 1, "rew')
    assert trainer.records() == [first]


@pytest.mark.parametrize(
    ("override", "message"),
    [("tenants={}", "sections tenants and adapter"), ("sync.token=secret-token", "sync.token:")],
)
def test_what_it_cannot_run_is_refused(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tenants.main(["--config", str(SHIPPED), override]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "secret-token" not in error
