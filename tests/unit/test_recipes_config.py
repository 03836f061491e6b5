"""The recipes' YAML schema: what ships parses, what is wrong is named, and none of it needs torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from recipes.arithmetic import REWARDS, TASKS
from recipes.config import RecipeConfig, RewardConfig, TaskName
from twinkle_callbacks.config import SyncSettings
from twinkle_callbacks.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
COMMANDS = ("prepare", "grpo_lightning", "grpo_accelerate", "tenants", "demo")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_each_shipped_config_parses(path: Path) -> None:
    assert RecipeConfig.load(path).sync.engine == "gloo"


def test_the_shipped_configs_are_found() -> None:
    assert {path.name for path in SHIPPED} >= {"grpo_arithmetic.yaml", "grpo_smoke.yaml"}


def test_section_sync_holds_exactly_the_settings_of_the_callbacks() -> None:
    assert RecipeConfig.model_fields["sync"].annotation is SyncSettings
    assert set(RecipeConfig().sync_options()) == set(SyncSettings.model_fields)
    assert RecipeConfig().sync_options(module="policy")["module"] == "policy"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stpes": 3}, "unknown key 'stpes'; known here are seed, steps"),
        ({"optimizer": {"learning_rate": 1}}, "unknown key 'optimizer.learning_rate'; known here are lr"),
        ({"sync": {"bucket": 1}}, "unknown key 'sync.bucket'; known here are rollouts, engine"),
        ({"sync": {"overlap": True}}, "overlap=True: overlapping a push with training is not available"),
        ({"steps": 0}, "steps=0: Input should be greater than or equal to 1"),
        ({"rollouts": {"samples_per_prompt": 1}}, "rollouts.samples_per_prompt=1"),
        ({"data": {"max_operand": 50}}, "data.max_operand=50"),
        ({"reward": {"name": "vibes"}}, "reward.name='vibes'"),
        ({"adapter": {"rank": 8}}, "unknown key 'adapter.rank'; known here are r, alpha, target_modules"),
        ({"adapter": {}, "sync": {"merge_and_sync": False}}, "set rollouts.model to 'default'"),
        (
            {"adapter": {}, "sync": {"merge_and_sync": False, "adapter_name": "a"}, "rollouts": {"model": "b"}},
            "rollouts.model='b' would sample another model; set rollouts.model to 'a'",
        ),
        ({"tenants": {"add": "division"}}, "tenants.add='division'"),
        ({"tenants": {"a/b": "addition"}}, "tenants.a/b"),
    ],
)
def test_errors_name_the_key_the_value_and_the_choices(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RecipeConfig.parse(values)
    assert message in str(caught.value)


def test_errors_do_not_show_the_token() -> None:
    with pytest.raises(ConfigError) as caught:
        RecipeConfig.parse({"sync": {"token": ["a-secret-of-mine"]}})
    assert "a-secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="overlap") as caught:
        RecipeConfig.parse({"sync": {"token": "a-secret-of-mine", "overlap": True}})
    assert "a-secret-of-mine" not in str(caught.value)


def test_each_reward_that_can_be_named_exists() -> None:
    assert set(get_args(RewardConfig.model_fields["name"].annotation)) == set(REWARDS)


def test_each_task_that_can_be_named_exists() -> None:
    assert set(get_args(TaskName)) == set(TASKS)


def test_a_tenant_trains_its_own_adapter_on_its_own_task() -> None:
    config = RecipeConfig.load(ROOT / "configs" / "tenants.yaml")
    assert config.tasks == ["addition", "reversal"]
    mine = config.tenant("reverse", "http://a:1")
    assert (mine.data.task, mine.rollouts.model, mine.tenants) == ("reversal", "reverse", {})
    assert (mine.sync.merge_and_sync, mine.sync.adapter_name, mine.rollout_urls) == (False, "reverse", ["http://a:1"])
    assert (mine.model, mine.adapter) == (config.model, config.adapter)
    assert mine.output_dir == config.output_dir / "reverse"
    assert mine.tasks == ["reversal"]


def test_overrides_reach_any_depth_and_keep_yaml_types(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 5\noptimizer: {grad_clip: 2.0}\n")
    config = RecipeConfig.load(file, ["steps=10", "optimizer.lr=0.5", "sync.rollouts=[http://a:1, http://b:2]"])
    assert (config.steps, config.optimizer.lr, config.optimizer.grad_clip) == (10, 0.5, 2.0)
    assert config.rollout_urls == ["http://a:1", "http://b:2"]


def test_of_several_files_the_last_wins_key_by_key(tmp_path: Path) -> None:
    first, second = tmp_path / "run.yaml", tmp_path / "where.yaml"
    first.write_text("steps: 5\noptimizer: {lr: 0.5, grad_clip: 2.0}\n")
    second.write_text("optimizer: {lr: 0.25}\ntrainer: {devices: 2}\n")
    config = RecipeConfig.load([first, second], ["trainer.devices=4"])
    assert (config.steps, config.optimizer.lr, config.optimizer.grad_clip) == (5, 0.25, 2.0)
    assert config.trainer.devices == 4


@pytest.mark.parametrize(("override", "message"), [("steps", "not of the form key=value"), ("steps.x=1", "is a value")])
def test_malformed_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 5\n")
    with pytest.raises(ConfigError, match=message):
        RecipeConfig.load(file, [override])


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", None])
def test_files_that_are_no_config_are_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        RecipeConfig.load(file)


def test_the_control_pushes_at_the_start_only() -> None:
    control = RecipeConfig(steps=7).without_sync()
    assert control.sync.every_n_steps > control.steps
    assert control.changed(sync=RecipeConfig().sync_options()) == RecipeConfig(steps=7)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_complaints_come_before_torch(command: str) -> None:
    for arguments, code in ((["--help"], 0), (["--config", "nowhere.yaml"], {"demo": 1}.get(command, 2))):
        module = ["-X", "importtime", "-m", f"recipes.{command}"]
        done = subprocess.run(
            [sys.executable, *module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "import time" in line}
        assert "argparse" in imported
        assert not imported & {"torch", "transformers", "lightning", "accelerate", "vllm"}
        assert code == 0 or "cannot read nowhere.yaml" in done.stderr
