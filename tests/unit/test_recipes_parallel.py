"""The configurations of `configs/accelerate` and `configs/lightning` say what their names say, in keys that exist.

That they shard so is in `tests/distributed/test_configs_launch.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import peft
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from recipes import parallel
from recipes.config import RecipeConfig, TrainerConfig
from tests.tiny_models import build
from twinkle_callbacks.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
SMOKE = CONFIGS / "grpo_smoke.yaml"
STRATEGIES = sorted(set(get_args(TrainerConfig.model_fields["strategy"].annotation)) - {"auto"})


def trainer(strategy: str, *overrides: str) -> RecipeConfig:
    return RecipeConfig.load([SMOKE, CONFIGS / "lightning" / f"{strategy}.yaml"], overrides)


@pytest.mark.parametrize("folder", ["accelerate", "lightning"])
def test_there_is_a_config_for_each_strategy(folder: str) -> None:
    assert sorted(file.name for file in (CONFIGS / folder).iterdir()) == [f"{each}.yaml" for each in STRATEGIES]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_config_for_accelerate_parses(strategy: str) -> None:
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{strategy}.yaml"))
    kind = {"dd": "MULTI_GPU", "fs": "FSDP", "ze": "DEEPSPEED"}[strategy[:2]]
    assert config.distributed_type == DistributedType(kind)
    assert config.num_processes == (4 if strategy == "fsdp2_tp" else 2)
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(strategy[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == int(strategy[4])
    assert config.parallelism_config.get("parallelism_config_tp_size", 1) == (2 if strategy == "fsdp2_tp" else 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_nested_key_for_accelerate_is_an_option_of_its_launcher(strategy: str) -> None:
    """It takes unknown ones without a word."""
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{strategy}.yaml"))
    options = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config, *config.parallelism_config} <= options


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_config_for_lightning_parses_on_top_of_a_run(strategy: str) -> None:
    config = trainer(strategy)
    assert config.trainer.strategy == strategy
    assert config.trainer.devices == (4 if strategy == "fsdp2_tp" else 2)
    assert config.steps == RecipeConfig.load(SMOKE).steps


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ddp", {"strategy": "ddp", "precision": "bf16-mixed", "gradient_clip_val": 1.0}),
        ("fsdp1", {"strategy": FSDPStrategy, "precision": "bf16-mixed", "gradient_clip_val": None}),
        ("fsdp2", {"strategy": ModelParallelStrategy, "precision": "32-true", "gradient_clip_val": 1.0}),
        ("fsdp2_tp", {"strategy": ModelParallelStrategy, "precision": "32-true", "gradient_clip_val": 1.0}),
    ],
)
def test_options_of_the_trainer(strategy: str, expected: dict[str, Any]) -> None:
    options = parallel.trainer_options(trainer(strategy))
    found = {name: options[name] for name in expected}
    if not isinstance(found["strategy"], str):
        found["strategy"] = type(found["strategy"])
    assert found == expected


@pytest.mark.parametrize(
    ("strategy", "override", "message"),
    [
        ("ddp", "trainer.tensor_parallel_size=2", "strategy='ddp', tensor_parallel_size=2"),
        ("fsdp2_tp", "trainer.tensor_parallel_size=1", "strategy='fsdp2_tp', tensor_parallel_size=1"),
        ("fsdp2_tp", "trainer.devices=3", "tensor_parallel_size=2 does not divide devices=3"),
        ("ddp", "trainer.strategy=zero4", "trainer.strategy='zero4'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(strategy: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trainer(strategy, override)
    assert message in str(caught.value)


def test_a_policy_below_an_adapter_is_sharded_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    sharded: list[str] = []
    monkeypatch.setattr(parallel, "fully_shard", lambda module, **_: sharded.append(type(module).__name__))
    policy = peft.get_peft_model(build("qwen3"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    parallel.shard(policy, None, "32-true")
    assert sharded == ["Qwen3DecoderLayer", "Qwen3DecoderLayer", type(policy).__name__]


def test_a_policy_below_an_adapter_is_not_made_tensor_parallel_in_part() -> None:
    policy = peft.get_peft_model(build("qwen3"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="an adapter cannot be trained tensor parallel"):
        parallel.split_layers(policy, None)
