"""One YAML schema for all recipes. Needs no torch, so that `--help` and every complaint come at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twinkle_callbacks.auth import TENANT_NAME
from twinkle_callbacks.config import SyncSettings
from twinkle_callbacks.errors import ConfigError

TaskName = Literal["addition", "reversal"]
TenantName = Annotated[str, Field(pattern=rf"^{TENANT_NAME.pattern}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(_Section):
    """The policy: its folder, and how to make it when there is none."""

    path: Path = Path("runs/policy")
    hidden_size: int = Field(128, ge=128, multiple_of=64)
    layers: int = Field(3, ge=1)
    warmup_accuracy: float = Field(0.35, gt=0, lt=1)
    warmup_lr: float = Field(2e-3, gt=0)
    warmup_max_steps: int = Field(1500, ge=1)


class AdapterConfig(_Section):
    """The LoRA adapter that is trained in place of the policy's own weights; without dropout, as the servers run it."""

    r: Literal[8, 16, 32, 64] = 16  # as vLLM rounds them up
    alpha: int = Field(32, ge=1)
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class DataConfig(_Section):
    """The generated prompts: two operands from 0 to `max_operand`."""

    task: TaskName = "addition"
    max_operand: int = Field(19, ge=1, le=49)
    prompts_per_step: int = Field(128, ge=1)


class RewardConfig(_Section):
    """What a completion is worth, from 0 to 1."""

    name: Literal["exact_match"] = "exact_match"


class RolloutConfig(_Section):
    """How the servers of `sync.rollouts` are sampled. The temperature is 1, as on-policy logprobs require."""

    model: str | None = Field(None, min_length=1)  # an adapter's name; None: what the servers started with
    samples_per_prompt: int = Field(8, ge=2)
    max_tokens: int = Field(3, ge=1)
    timeout_s: float = Field(120.0, gt=0)


class OptimizerConfig(_Section):
    """AdamW without weight decay, its learning rate rising from zero over the first steps."""

    lr: float = Field(6e-4, gt=0)
    beta2: float = Field(0.98, gt=0, lt=1)
    lr_warmup_steps: int = Field(10, ge=0)
    grad_clip: float = Field(1.0, gt=0)


class TrainerConfig(_Section):
    """Where the Lightning recipe runs and how it shards; for the Accelerate recipe, `accelerate launch` decides."""

    accelerator: str = "auto"
    devices: int = Field(1, ge=1)
    strategy: Literal["auto", "ddp", "fsdp1", "fsdp2", "fsdp2_tp", "zero1", "zero2", "zero3"] = "auto"
    tensor_parallel_size: int = Field(1, ge=1)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        size = self.tensor_parallel_size
        if (size > 1) != (self.strategy == "fsdp2_tp"):
            raise ValueError(f"strategy={self.strategy!r}, tensor_parallel_size={size}: above 1 for fsdp2_tp, else 1")
        if self.devices % size:
            raise ValueError(f"tensor_parallel_size={size} does not divide devices={self.devices}")
        return self


class RecipeConfig(_Section):
    """A whole run. `sync` takes exactly the settings of the callbacks."""

    seed: int = 0
    steps: int = Field(100, ge=1)
    output_dir: Path = Path("runs/grpo")
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig | None = None
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    rollouts: RolloutConfig = RolloutConfig()
    sync: SyncSettings = SyncSettings()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    tenants: dict[TenantName, TaskName] = {}

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        served, sampled = self.sync.adapter_name or "default", self.rollouts.model
        if not self.sync.merge_and_sync and sampled != served:
            raise ValueError(
                f"sync.merge_and_sync=False brings the adapter to the servers as {served!r}, and rollouts.model="
                f"{sampled!r} would sample another model; set rollouts.model to {served!r}"
            )
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RecipeConfig:
        """Validates nested plain values.

        Raises:
            ConfigError: names each key that is unknown or wrong, with its value.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explanations(error))) from None

    @classmethod
    def load(cls, paths: Path | str | Sequence[Path | str], overrides: Sequence[str] = ()) -> RecipeConfig:
        """Reads YAML files, the last one wins, then applies overrides such as `steps=10` or `optimizer.lr=1e-4`."""
        values: dict[str, Any] = {}
        for path in [paths] if isinstance(paths, Path | str) else paths:
            _merge(values, _read(path))
        for override in overrides:
            _apply(values, override)
        return cls.parse(values)

    def changed(self, **values: Any) -> RecipeConfig:
        """This configuration with some top-level values replaced, validated again."""
        return self.parse({**self.model_dump(), **values})

    def without_sync(self) -> RecipeConfig:
        """The control: the push at the start of training, which makes rollout and trainer equal, and none after it."""
        return self.changed(sync=self.sync_options(every_n_steps=self.steps + 1))

    def tenant(self, name: str, rollouts: str) -> RecipeConfig:
        """The run of one of the tenants: its own task, adapter and folder."""
        return self.changed(
            output_dir=self.output_dir / name,
            data={**self.data.model_dump(), "task": self.tenants[name]},
            rollouts={**self.rollouts.model_dump(), "model": name},
            sync=self.sync_options(rollouts=rollouts, merge_and_sync=False, adapter_name=name),
            tenants={},
        )

    @property
    def tasks(self) -> list[TaskName]:
        """What the policy is warmed up on."""
        return sorted(set(self.tenants.values())) or [self.data.task]

    def sync_options(self, **replaced: Any) -> dict[str, Any]:
        """The section `sync` as keyword arguments of a callback, some of them replaced."""
        return {**self.sync.model_dump(), **replaced}

    @property
    def rollout_urls(self) -> list[str]:
        return [str(url) for url in self.sync.rollouts]


def _read(path: Path | str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping of sections")
    return values


def _merge(values: dict[str, Any], later: Mapping[str, Any]) -> None:
    """Puts `later` into `values`, section by section: of a section, only the keys that `later` has are replaced."""
    for key, value in later.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} is not of the form key=value, such as steps=10")
    *sections, key = name.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    target[key] = yaml.safe_load(text)


def _explanations(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            yield f"unknown key {name!r}; known here are {', '.join(_fields(item['loc'][:-1]))}"
        else:
            is_shown = item["loc"][-1:] != ("token",) and not isinstance(
                item["input"], dict
            )  # which may hold the token
            shown = f"={item['input']!r}" if is_shown else ""
            yield f"{name}{shown}: {item['msg'].removeprefix('Value error, ')}"


def _fields(location: tuple[int | str, ...]) -> list[str]:
    section: Any = RecipeConfig
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        section = next(iter(get_args(annotation)), annotation)  # of an optional section, the section
    return list(section.model_fields)
