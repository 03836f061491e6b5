"""Resume, exceptions, metrics and everything else around the steps of the Lightning callback."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.data import DataLoader, TensorDataset

from tests.unit import lightning_cases as cases
from tests.unit.recording_sync import RecordingSynchronizer, SquaredOutput, recorder, same, weights_of
from twinkle_callbacks.errors import MissingExtraError, SourceError, SyncError
from twinkle_callbacks.lightning import WeightSyncCallback

pytestmark = cases.IGNORE_WARNINGS


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[RecordingSynchronizer]:
    fake = recorder()
    monkeypatch.setattr("twinkle_callbacks.lightning.WeightSynchronizer", fake)
    return fake


@pytest.fixture(autouse=True)
def no_hook_stays_behind() -> Any:
    before = len(_global_optimizer_post_hooks)
    yield
    assert len(_global_optimizer_post_hooks) == before


def data(batches: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(2 * batches, 4)), batch_size=2)


def module() -> cases.Auto:
    return cases.Auto(SquaredOutput(), cases.adam)


class FailsAt(cases.Auto):
    def __init__(self, index: int) -> None:
        super().__init__(SquaredOutput(), cases.adam)
        self.index = index

    def training_step(self, batch: Any, index: int) -> torch.Tensor | None:
        if index == self.index:
            raise ZeroDivisionError("from the training step")
        return super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_continues_the_versions_and_pushes_the_restored_weights(
    fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    # The skipped step makes Lightning's own global_step differ from the number of real steps.
    first = cases.trainer(
        WeightSyncCallback(), ModelCheckpoint(tmp_path, filename="end"), enable_checkpointing=True, **cases.amp()
    )
    first.fit(cases.InfOnce(SquaredOutput(), cases.adam), data(4))
    assert fake.made[0].versions == [0, 1, 2, 3]

    second = cases.trainer(
        WeightSyncCallback(rollouts="http://moved:8000"),
        ModelCheckpoint(tmp_path, filename="end"),
        enable_checkpointing=True,
        max_epochs=2,
        **cases.amp(),
    )
    second.fit(module(), data(2), ckpt_path=str(tmp_path / "end.ckpt"))
    assert fake.made[1].versions == [3, 4, 5]
    assert same(fake.made[0].pushes[3][1], fake.made[1].pushes[0][1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_from_a_checkpoint_without_our_state_starts_at_its_global_step(
    fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    cases.trainer(ModelCheckpoint(tmp_path, filename="end"), enable_checkpointing=True).fit(module(), data(4))
    again = ModelCheckpoint(tmp_path, filename="end")
    resumed = cases.trainer(WeightSyncCallback(), again, enable_checkpointing=True, max_epochs=2)
    resumed.fit(module(), data(2), ckpt_path=str(tmp_path / "end.ckpt"))
    assert fake.made[0].versions == [4, 5, 6]


def test_two_callbacks_for_two_modules_keep_their_state_apart(
    fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="at", save_last=True)
    pair = [WeightSyncCallback(module="net.a"), WeightSyncCallback(module="net.b", every_n_steps=3)]
    cases.trainer(*pair, checkpoint, enable_checkpointing=True).fit(module(), data(4))
    assert [made.versions for made in fake.made] == [[0, 1, 2, 3, 4], [0, 3]]
    states = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]
    assert [states[callback.state_key] for callback in pair] == [{"steps": 4}, {"steps": 4}]


@pytest.mark.parametrize("index", [0, 2])
def test_an_exception_in_training_closes_everything(fake: type[RecordingSynchronizer], index: int) -> None:
    with pytest.raises(ZeroDivisionError):
        cases.trainer(WeightSyncCallback()).fit(FailsAt(index), data(4))
    assert fake.made[0].versions == list(range(index + 1))
    assert not fake.made[0].is_open
    assert fake.made[0].closed


@pytest.mark.parametrize("version", [0, 2])
def test_a_failed_push_ends_training_and_closes_everything(fake: type[RecordingSynchronizer], version: int) -> None:
    fake.fail_at = version
    with pytest.raises(SyncError, match=f"version {version}"):
        cases.trainer(WeightSyncCallback()).fit(module(), data(4))
    assert fake.made[0].versions == list(range(version))
    assert fake.made[0].closed


def test_the_same_callback_serves_a_second_fit(fake: type[RecordingSynchronizer]) -> None:
    callback, policy = WeightSyncCallback(), module()
    with pytest.raises(ZeroDivisionError):
        cases.trainer(callback).fit(FailsAt(1), data(2))
    cases.trainer(callback).fit(policy, data(2))
    assert [made.versions for made in fake.made] == [[0, 1], [1, 2, 3]]
    assert same(fake.made[1].pushes[-1][1], weights_of(policy))


def test_metrics_of_each_push_reach_the_logger(fake: type[RecordingSynchronizer], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    cases.trainer(WeightSyncCallback(), logger=logger, log_every_n_steps=1).fit(module(), data(3))
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["weight_sync/version"]]
    assert [float(row["weight_sync/version"]) for row in rows] == [0, 1, 2, 3]
    assert [int(row["step"]) for row in rows] == [0, 0, 1, 2]
    assert {float(row["weight_sync/seconds"]) for row in rows} == {0.5}


def test_fast_dev_run_pushes_its_one_batch(fake: type[RecordingSynchronizer]) -> None:
    cases.trainer(WeightSyncCallback(), fast_dev_run=True).fit(module(), data(3))
    assert fake.made[0].versions == [0, 1]


def test_does_nothing_outside_fit(fake: type[RecordingSynchronizer]) -> None:
    class Validates(cases.Auto):
        def validation_step(self, batch: Any, index: int) -> None:
            self.net(batch[0])

    cases.trainer(WeightSyncCallback()).validate(Validates(SquaredOutput(), cases.adam), data(2), verbose=False)
    assert fake.made == []


def test_an_unknown_module_is_named_before_training(fake: type[RecordingSynchronizer]) -> None:
    with pytest.raises(SourceError, match=r"module='nett'.*net"):
        cases.trainer(WeightSyncCallback(module="nett")).fit(module(), data(2))


def test_works_with_the_other_name_of_lightning(fake: type[RecordingSynchronizer]) -> None:
    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = SquaredOutput()

        training_step, configure_optimizers = cases.Auto.training_step, cases.Auto.configure_optimizers
        make_optimizers = staticmethod(cases.adam)

    trainer = pytorch_lightning.Trainer(
        fast_dev_run=True, accelerator="cpu", logger=False, callbacks=[WeightSyncCallback()]
    )
    trainer.fit(Module(), data(1))
    assert fake.made[0].versions == [0, 1]
    assert fake.made[0].closed


def test_without_lightning_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "twinkle_callbacks.lightning")
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(MissingExtraError, match=r"twinkle_callbacks\[lightning\]"):
        __import__("twinkle_callbacks.lightning")
