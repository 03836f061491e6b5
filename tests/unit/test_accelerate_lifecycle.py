"""Enter, exit, errors, checkpoints and metrics of the Accelerate context manager."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch.optim.optimizer import _global_optimizer_post_hooks

from tests.unit import accelerate_cases as cases
from tests.unit.recording_sync import RecordingSynchronizer, SquaredOutput, recorder, same, weights_of
from twinkle_callbacks.accelerate import WeightSync
from twinkle_callbacks.config import SyncSettings
from twinkle_callbacks.errors import ConfigError, MissingExtraError, SourceError, SyncError

DATA = torch.ones(6, 4)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RecordingSynchronizer]]:
    fake = recorder()
    monkeypatch.setattr("twinkle_callbacks.accelerate.WeightSynchronizer", fake)
    hooks = len(_global_optimizer_post_hooks)
    yield fake
    assert len(_global_optimizer_post_hooks) == hooks, "a hook stayed behind"
    cases.reset_accelerate()


def make_loop(accelerator: Accelerator | None = None) -> cases.Loop:
    return cases.Loop(SquaredOutput(), cases.adam, accelerator or Accelerator(cpu=True))


def enter(loop: cases.Loop, **settings: Any) -> WeightSync:
    return WeightSync(loop.accelerator, loop.model, *loop.prepared, **settings)


def test_leaving_restores_step_and_closes(fake: type[RecordingSynchronizer]) -> None:
    loop = make_loop()
    with enter(loop):
        assert "step" in vars(loop.prepared[0])
    assert "step" not in vars(loop.prepared[0])
    list(loop.run(DATA))
    assert fake.made[0].versions == [0]
    assert fake.made[0].closed == 1


def test_leaving_keeps_what_others_wrapped_around_step_since(fake: type[RecordingSynchronizer]) -> None:
    loop, calls = make_loop(), []
    (optimizer,) = loop.prepared
    with enter(loop):
        inner = optimizer.step
        optimizer.step = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))
    list(loop.run(DATA))
    assert len(calls) == 3
    assert fake.made[0].versions == [0]


def test_an_exception_in_the_loop_closes_everything(fake: type[RecordingSynchronizer]) -> None:
    loop = make_loop()
    with pytest.raises(ZeroDivisionError), enter(loop):
        next(loop.run(DATA))
        raise ZeroDivisionError
    assert fake.made[0].versions == [0, 1]
    assert fake.made[0].closed == 1
    assert "step" not in vars(loop.prepared[0])


@pytest.mark.parametrize("version", [0, 2])
def test_a_failed_push_leaves_the_loop_and_closes_everything(fake: type[RecordingSynchronizer], version: int) -> None:
    fake.fail_at, loop = version, make_loop()
    with pytest.raises(SyncError, match=f"version {version}"), enter(loop):
        list(loop.run(DATA))
    assert fake.made[0].closed == 1
    assert "step" not in vars(loop.prepared[0])


def test_entering_again_continues_the_versions(fake: type[RecordingSynchronizer]) -> None:
    loop = make_loop()
    sync = enter(loop)
    for _ in range(2):
        with sync:
            next(loop.run(DATA))
    assert [made.versions for made in fake.made] == [[0, 1], [1, 2]]


def test_entering_twice_at_once_is_refused() -> None:
    with enter(make_loop()) as sync, pytest.raises(ConfigError, match="already entered"), sync:
        pass


def test_push_outside_the_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="inside the `with` block"):
        enter(make_loop()).push()


@pytest.mark.parametrize("load", ["before entering", "inside"])
def test_versions_continue_from_a_checkpoint(fake: type[RecordingSynchronizer], tmp_path: Path, load: str) -> None:
    first = make_loop()
    with enter(first):
        list(first.run(DATA))
        first.accelerator.save_state(str(tmp_path / "state"))
    cases.reset_accelerate()

    second = make_loop()
    with torch.no_grad():
        for parameter in second.net.parameters():
            parameter.zero_()
    sync = enter(second)
    if load == "before entering":
        second.accelerator.load_state(str(tmp_path / "state"))
    with sync:
        if load == "inside":
            second.accelerator.load_state(str(tmp_path / "state"))
        restored = fake.made[1].pushes[-1]
        next(second.run(DATA))
    assert restored[0] == 3
    assert same(restored[1], weights_of(first.net))
    assert fake.made[1].versions == ([3, 4] if load == "before entering" else [0, 3, 4])


class RecordingTracker(GeneralTracker):
    name = "recording"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, float], step: int | None, **kwargs: Any) -> None:
        self.rows.append((step, values))


def test_metrics_of_each_push_reach_the_trackers() -> None:
    tracker = RecordingTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("test")
    loop = make_loop(accelerator)
    with enter(loop) as sync:
        list(loop.run(DATA))
        assert sync.report is not None
    assert [step for step, _ in tracker.rows] == [0, 1, 2, 3]
    assert tracker.rows[-1][1] == sync.report.metrics()
    assert tracker.rows[-1][1]["weight_sync/seconds"] == 0.5


def test_an_unprepared_optimizer_is_refused() -> None:
    net = SquaredOutput()
    with pytest.raises(ConfigError, match=r"plain Adam; call accelerator.prepare"):
        WeightSync(Accelerator(cpu=True), net, torch.optim.Adam(net.parameters()))
    with pytest.raises(ConfigError, match="no optimizer"):
        WeightSync(Accelerator(cpu=True), net, [])


def test_wrong_settings_are_named_before_anything_is_opened(fake: type[RecordingSynchronizer]) -> None:
    loop = make_loop()
    with pytest.raises(ConfigError, match=r"unknown setting 'engin'.*engine"):
        enter(loop, engin="gloo")  # type: ignore[call-arg]
    with pytest.raises(SourceError, match="module='nett'"), enter(loop, module="nett"):
        pass
    assert fake.made[0].closed == 1
    assert "step" not in vars(loop.prepared[0])


def test_takes_every_setting(fake: type[RecordingSynchronizer]) -> None:
    settings = {"rollouts": ["http://a:1", "http://b:1"], "engine": "gloo", "every_n_steps": 3, "module": "a"}
    loop = make_loop()
    with enter(loop, **settings) as sync:
        assert sync.settings == fake.made[0].settings == SyncSettings.parse(settings)


def test_without_accelerate_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "twinkle_callbacks.accelerate")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"twinkle_callbacks\[accelerate\]"):
        __import__("twinkle_callbacks.accelerate")
