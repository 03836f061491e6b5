"""Settings of the Lightning callback: the same as everywhere, and all of them from a LightningCLI YAML."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

from tests.unit import lightning_cases as cases
from tests.unit.recording_sync import RecordingSynchronizer, SquaredOutput, recorder
from twinkle_callbacks.config import SyncOptions, SyncSettings
from twinkle_callbacks.errors import ConfigError
from twinkle_callbacks.lightning import WeightSyncCallback
from twinkle_callbacks.rollouts import HTTPRollout

MakeCLI = Callable[..., LightningCLI]

pytestmark = [
    *cases.IGNORE_WARNINGS,
    # Of how LightningCLI of 2.6 calls jsonargparse.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

URL, TOKEN = "http://a:8000", "0123456789abcdef"

# Each with another value than the default, as far as this version takes one.
OTHERS = {
    "rollouts": ["http://a:8000", "http://b:8000"],
    "engine": "gloo",
    "merge_and_sync": True,
    "adapter_name": None,
    "every_n_steps": 2,
    "bucket_size_mb": 64,
    "dtype": "bfloat16",
    "pause_mode": "wait",
    "stale_kv": "keep",
    "overlap": False,
    "verify": "off",
    "on_error": "skip",
    "timeout_s": 12.5,
    "token": TOKEN,
    "module": "net",
}


class Module(cases.Auto):
    def __init__(self) -> None:
        super().__init__(SquaredOutput(), cases.adam)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(4, 4)), batch_size=2)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> MakeCLI:
    def run(*arguments: str, run: bool = False) -> LightningCLI:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return LightningCLI(
            Module,
            run=run,
            save_config_callback=None,
            trainer_defaults={"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False},
            auto_configure_optimizers=False,
            seed_everything_default=0,
        )

    return run


def config_file(folder: Path, init_args: dict[str, Any]) -> str:
    callback = {"class_path": "twinkle_callbacks.lightning.WeightSyncCallback", "init_args": init_args}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return str(path)


def installed(cli: LightningCLI) -> WeightSyncCallback:
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, WeightSyncCallback)]
    return callback


def test_arguments_are_the_settings_with_their_defaults() -> None:
    parameters = dict(inspect.signature(WeightSyncCallback).parameters)
    assert list(parameters) == list(SyncSettings.model_fields) == list(SyncOptions.__annotations__) == list(OTHERS)
    given = {name: parameter.default for name, parameter in parameters.items()}
    assert SyncSettings.parse(given) == SyncSettings()
    assert WeightSyncCallback().settings == SyncSettings()


def test_arguments_have_the_types_of_the_settings() -> None:
    ours, theirs = get_type_hints(WeightSyncCallback.__init__), get_type_hints(SyncOptions)
    loose = {"rollouts", "dtype"}  # typed more loosely in SyncOptions
    assert {name: ours[name] for name in theirs if name not in loose} == {
        name: theirs[name] for name in theirs if name not in loose
    }


def test_a_yaml_file_sets_everything(cli: MakeCLI, tmp_path: Path) -> None:
    callback = installed(cli("--config", config_file(tmp_path, OTHERS)))
    assert callback.settings == SyncSettings.parse(OTHERS)


def test_one_url_in_a_yaml_file_is_one_rollout(cli: MakeCLI, tmp_path: Path) -> None:
    callback = installed(cli("--config", config_file(tmp_path, {"rollouts": "http://a:8000"})))
    assert callback.settings.rollouts == ("http://a:8000",)


def test_a_rollout_in_a_yaml_file_can_have_a_token_of_its_own(cli: MakeCLI, tmp_path: Path) -> None:
    rollout = {"class_path": "twinkle_callbacks.rollouts.HTTPRollout", "init_args": {"url": URL, "token": TOKEN}}
    callback = installed(cli("--config", config_file(tmp_path, {"rollouts": [URL.replace("a", "b"), rollout]})))
    assert callback.settings.rollouts[0] == URL.replace("a", "b")
    assert isinstance(callback.settings.rollouts[1], HTTPRollout)
    assert callback.settings.rollouts[1].name == URL


def test_command_line_arguments_override_the_file(cli: MakeCLI, tmp_path: Path) -> None:
    path = config_file(tmp_path, {"every_n_steps": 2, "bucket_size_mb": 64})
    callback = installed(cli("--config", path, "--trainer.callbacks.every_n_steps=3"))
    assert (callback.settings.every_n_steps, callback.settings.bucket_size_mb) == (3, 64)


def test_fit_from_a_yaml_file_pushes(cli: MakeCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: type[RecordingSynchronizer] = recorder()
    monkeypatch.setattr("twinkle_callbacks.lightning.WeightSynchronizer", fake)
    cli("fit", "--config", config_file(tmp_path, {"module": "net"}), run=True)
    assert fake.made[0].versions == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"pause_mode": "stop"}, "pause_mode"), ({"every_n_steps": "often"}, "every_n_steps"), ({"engin": "x"}, "engin")],
)
def test_a_wrong_setting_in_the_file_is_named(
    cli: MakeCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit):
        cli("--config", config_file(tmp_path, wrong))
    assert message in capsys.readouterr().err


def test_a_wrong_value_is_named_when_the_callback_is_made() -> None:
    with pytest.raises(ConfigError, match="every_n_steps=0"):
        WeightSyncCallback(every_n_steps=0)


def test_help_describes_each_setting(cli: MakeCLI, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("--trainer.callbacks.help=twinkle_callbacks.lightning.WeightSyncCallback")
    text = capsys.readouterr().out
    for name in OTHERS:
        assert f"--trainer.callbacks.{name}" in text or f"--trainer.callbacks.init_args.{name}" in text, text
    assert "size of a wire bucket in MiB" in " ".join(text.split())
