"""The Lightning callback pushes once for each batch that really changed the weights, with the final weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.unit import lightning_cases as cases
from tests.unit.recording_sync import RecordingSynchronizer, SquaredOutput, Truth, assert_pushed, recorder
from twinkle_callbacks.lightning import WeightSyncCallback

pytestmark = cases.IGNORE_WARNINGS


class Watcher(pl.Callback):
    """Keeps the truth about the module that the callback before it pushes."""

    def __init__(self, module: str = "") -> None:
        self.module = module
        self.stepped: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.truth = Truth(pl_module.get_submodule(self.module))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.truth.look()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.truth.look():
            self.stepped.append(index)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.truth.look()


def fit(
    monkeypatch: pytest.MonkeyPatch,
    module: pl.LightningModule,
    batches: int,
    callback: WeightSyncCallback,
    **options: Any,
) -> tuple[RecordingSynchronizer, Watcher]:
    fake, watcher = recorder(), Watcher(callback.settings.module)
    monkeypatch.setattr("twinkle_callbacks.lightning.WeightSynchronizer", fake)
    torch.manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(2 * batches, 4)), batch_size=2)
    cases.trainer(callback, watcher, **options).fit(module, data)
    (synchronizer,) = fake.made
    assert synchronizer.closed, "not closed after training"
    return synchronizer, watcher


@pytest.mark.parametrize("case", cases.TABLE, ids=str)
def test_pushes_the_final_weights_of_each_real_step(monkeypatch: pytest.MonkeyPatch, case: cases.Case) -> None:
    module = case.module(SquaredOutput(), case.optimizers)
    synchronizer, watcher = fit(monkeypatch, module, case.batches, WeightSyncCallback(), **case.options())
    assert tuple(watcher.stepped) == case.stepped
    assert_pushed(synchronizer, watcher.truth, steps=len(case.stepped))


def test_a_step_made_after_the_callbacks_is_pushed_before_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = cases.StepsInHook(SquaredOutput(), cases.two_sgd)
    synchronizer, watcher = fit(monkeypatch, module, 3, WeightSyncCallback())
    assert_pushed(synchronizer, watcher.truth, steps=3)


class CriticEachBatch(cases.Manual):
    """Steps the critic in each batch, the policy only in every other one."""

    def __init__(self) -> None:
        super().__init__(SquaredOutput(), cases.adam)
        self.policy = torch.nn.Linear(4, 4)

    def training_step(self, batch: Any, index: int) -> None:
        policy, critic = self.optimizers()
        for each in (policy, critic):
            each.zero_grad()
        self.manual_backward(self.net(self.policy(batch[0])))
        critic.step()
        if index % 2 == 1:
            policy.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.policy, self.net)]


def test_steps_of_another_module_push_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronizer, watcher = fit(monkeypatch, CriticEachBatch(), 4, WeightSyncCallback(module="policy"))
    assert watcher.stepped == [1, 3]
    assert_pushed(synchronizer, watcher.truth, steps=2)


def test_every_n_steps_pushes_every_nth_version(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = WeightSyncCallback(every_n_steps=2)
    synchronizer, _ = fit(monkeypatch, cases.Auto(SquaredOutput(), cases.adam), 5, callback)
    assert synchronizer.versions == [0, 2, 4]
    assert callback.report is not None
    assert callback.report.version == 4
