"""The Trainer callback pushes once for each step that really changed the weights, with the final weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.unit import transformers_cases as cases
from tests.unit.accelerate_cases import reset_accelerate
from tests.unit.recording_sync import RecordingSynchronizer, SquaredOutput, Truth, assert_pushed, recorder
from twinkle_callbacks.transformers import WeightSyncCallback


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RecordingSynchronizer]]:
    fake = recorder()
    monkeypatch.setattr("twinkle_callbacks.transformers.WeightSynchronizer", fake)
    yield fake
    reset_accelerate()


class Watcher(TrainerCallback):
    """Keeps the truth about the model, after the callback before it was called."""

    def __init__(self, model: cases.Model) -> None:
        self.truth, self.stepped = Truth(model), []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.truth.look():
            self.stepped.append(state.global_step - 1)


@pytest.mark.parametrize("case", cases.TABLE, ids=str)
def test_pushes_the_final_weights_of_each_real_step(
    case: cases.Case, fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model, data = cases.Model(SquaredOutput(), case.inf_at), torch.randn(2 * case.batches, 4)
    watcher = Watcher(model)
    callbacks = [WeightSyncCallback(), watcher]
    cases.make_trainer(tmp_path, model, case.optimizers, data, callbacks, case.amp, **case.arguments).train()
    assert tuple(watcher.stepped) == case.stepped
    assert_pushed(fake.made[0], watcher.truth, steps=len(case.stepped))
    assert fake.made[0].closed == 1


def test_every_n_steps_pushes_every_nth_version(fake: type[RecordingSynchronizer], tmp_path: Path) -> None:
    callback = WeightSyncCallback(every_n_steps=2)
    cases.make_trainer(tmp_path, cases.Model(SquaredOutput()), cases.adam, torch.ones(10, 4), [callback]).train()
    assert fake.made[0].versions == [0, 2, 4]
    assert callback.report is not None
    assert callback.report.version == 4
