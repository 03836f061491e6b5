"""Resume, exceptions and metrics of the Trainer callback, and TRL on top of it."""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import Trainer, TrainerCallback

from tests.unit import transformers_cases as cases
from tests.unit.accelerate_cases import reset_accelerate
from tests.unit.recording_sync import RecordingSynchronizer, SquaredOutput, recorder, same, weights_of
from twinkle_callbacks.config import SyncSettings
from twinkle_callbacks.errors import ConfigError, MissingExtraError, SourceError, SyncError
from twinkle_callbacks.transformers import WeightSyncCallback

DATA = torch.linspace(-1, 1, 24).reshape(6, 4)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RecordingSynchronizer]]:
    fake = recorder()
    monkeypatch.setattr("twinkle_callbacks.transformers.WeightSynchronizer", fake)
    hooks = len(_global_optimizer_post_hooks)
    yield fake
    assert len(_global_optimizer_post_hooks) == hooks, "a hook stayed behind"
    reset_accelerate()


def train(
    folder: Path,
    *callbacks: TrainerCallback,
    model: cases.Model | None = None,
    resume: str | None = None,
    **options: Any,
) -> Any:
    trainer = cases.make_trainer(
        folder, model or cases.Model(SquaredOutput()), cases.adam, DATA, list(callbacks), **options
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_resume_continues_the_versions_and_pushes_the_restored_weights(
    fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    # The skipped step makes the Trainer's global_step differ from the number of real steps.
    skipping = cases.Model(SquaredOutput(), inf_at=1)
    train(tmp_path, WeightSyncCallback(), model=skipping, amp=True, save_strategy="steps", save_steps=2)
    assert fake.made[0].versions == [0, 1, 2]
    train(tmp_path, WeightSyncCallback(), amp=True, resume=str(tmp_path / "checkpoint-2"))
    assert fake.made[1].versions == [1, 2]
    assert same(fake.made[0].pushes[1][1], fake.made[1].pushes[0][1])


def test_resume_from_a_checkpoint_without_our_state_starts_at_its_global_step(
    fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    train(tmp_path, save_strategy="steps", save_steps=2)
    train(tmp_path, WeightSyncCallback(), resume=str(tmp_path / "checkpoint-2"))
    assert fake.made[0].versions == [2, 3]


def test_resume_with_callback_states_restored_keeps_this_callback(
    fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    train(tmp_path, WeightSyncCallback(), save_strategy="steps", save_steps=2)
    callback = WeightSyncCallback(every_n_steps=3)
    train(tmp_path, callback, resume=str(tmp_path / "checkpoint-2"), restore_callback_states_from_checkpoint=True)
    assert fake.made[1].versions == [2, 3]
    assert callback.report is not None


def test_a_second_train_continues_the_versions(fake: type[RecordingSynchronizer], tmp_path: Path) -> None:
    trainer = train(tmp_path, WeightSyncCallback())
    trainer.train()
    assert [made.versions for made in fake.made] == [[0, 1, 2, 3], [3, 4, 5, 6]]


def failing() -> cases.Model:
    return cases.Model(SquaredOutput(), fail_at=1)


def test_the_best_model_that_is_loaded_at_the_end_is_pushed_under_a_version_of_its_own(
    fake: type[RecordingSynchronizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = itertools.count(1.0)
    monkeypatch.setattr(Trainer, "evaluate", lambda *_, **__: {"eval_loss": next(losses)})
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = train(tmp_path, WeightSyncCallback(), eval_dataset=DATA, load_best_model_at_end=True, **every_step)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    (made,) = fake.made
    assert made.versions == [0, 1, 2, 3, 4]
    assert same(made.pushes[4][1], made.pushes[1][1])
    assert same(made.pushes[4][1], weights_of(trainer.model))


def test_a_with_block_closes_after_an_exception(fake: type[RecordingSynchronizer], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), WeightSyncCallback() as callback:
        train(tmp_path, callback, model=failing())
    assert fake.made[0].versions == [0, 1]
    assert fake.made[0].closed == 1


def test_the_next_train_closes_what_an_exception_left_open(fake: type[RecordingSynchronizer], tmp_path: Path) -> None:
    trainer = cases.make_trainer(tmp_path, failing(), cases.adam, DATA, [WeightSyncCallback()])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not fake.made[0].closed
    trainer.train()
    assert [(made.versions, made.closed) for made in fake.made] == [([0, 1], 1), ([1, 2, 3, 4], 1)]


def test_collecting_the_callback_closes_what_an_exception_left_open(
    fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    def run() -> None:
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, WeightSyncCallback(), model=failing())

    run()
    gc.collect()
    assert fake.made[0].closed == 1


@pytest.mark.parametrize("version", [0, 2])
def test_a_failed_push_ends_training(fake: type[RecordingSynchronizer], tmp_path: Path, version: int) -> None:
    fake.fail_at = version
    with pytest.raises(SyncError, match=f"version {version}"), WeightSyncCallback() as callback:
        train(tmp_path, callback)
    assert fake.made[0].closed == 1


class Reporter(TrainerCallback):
    """Stands where the Trainer puts those of `report_to`: before the callbacks that the user gives."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("added", ["to the constructor", "later"])
def test_metrics_of_each_push_reach_the_reporters(tmp_path: Path, added: str) -> None:
    reporter, callback = Reporter(), WeightSyncCallback()
    early = [reporter, callback] if added == "to the constructor" else [reporter]
    trainer = cases.make_trainer(
        tmp_path, cases.Model(SquaredOutput()), cases.adam, DATA, early,
        logging_strategy="steps", logging_steps=1, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    if added == "later":
        trainer.add_callback(callback)
    trainer.train()
    reported = [(step, row["weight_sync/version"]) for step, row in reporter.rows if "weight_sync/version" in row]
    assert reported == [(1, 1), (2, 2), (3, 3)]
    assert reporter.rows[0][1]["weight_sync/seconds"] == 0.5
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [row["weight_sync/version"] for row in saved] == [1, 2, 3]
    assert [type(each) for each in trainer.callback_handler.callbacks].count(WeightSyncCallback) == 1


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'engin'.*engine"):
        WeightSyncCallback(engin="gloo")  # type: ignore[call-arg]
    with pytest.raises(SourceError, match="module='nett'"), WeightSyncCallback(module="nett") as callback:
        train(tmp_path, callback)


def test_takes_every_setting(fake: type[RecordingSynchronizer], tmp_path: Path) -> None:
    settings = {"rollouts": ["http://a:1", "http://b:1"], "engine": "gloo", "every_n_steps": 3, "module": "net.a"}
    callback = WeightSyncCallback(**settings)
    train(tmp_path, callback)
    assert callback.settings == fake.made[0].settings == SyncSettings.parse(settings)
    assert fake.made[0].versions == [0, 3]


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "twinkle_callbacks.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"twinkle_callbacks\[transformers\]"):
        __import__("twinkle_callbacks.transformers")
