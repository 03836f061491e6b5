"""The settings that every entry point shares, validated once.

All are scalars or lists of scalars, so YAML, `LightningCLI` and `TrlParser` can give each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from twinkle_callbacks.errors import ConfigError

BACKEND = "twinkle"  # our weight-transfer backend, as vLLM knows it
ADAPTER_NAME_PATTERN = r"^\S+$"  # what requests can name as their model
MAX_ADAPTER_NAME_CHARS = 256
DEFAULT_ROLLOUT = "http://127.0.0.1:8000"

PauseMode = Literal["keep", "wait", "abort"]
StaleKV = Literal["recompute", "keep"]
Verify = Literal["off", "digest", "canary"]
OnError = Literal["raise", "drop_replica", "skip"]

_NOT_YET = {
    ("overlap", True): "overlapping a push with training",
    ("verify", "canary"): "the logprob canary",
    ("on_error", "drop_replica"): "going on with the remaining replicas",
}


class SyncOptions(TypedDict, total=False):
    """Keyword settings as a type, for signatures that pass them on; `SyncSettings` describes each."""

    rollouts: Any
    engine: str
    merge_and_sync: bool
    adapter_name: str | None
    every_n_steps: int
    bucket_size_mb: int
    dtype: str | None
    pause_mode: PauseMode
    stale_kv: StaleKV
    overlap: bool
    verify: Verify
    on_error: OnError
    timeout_s: float
    token: str | None
    module: str


class SyncSettings(BaseModel):
    """Validated settings of a synchronizer. Build it with `SyncSettings.parse`, which words errors for people."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    rollouts: tuple[Any, ...] = (DEFAULT_ROLLOUT,)
    engine: str = "auto"
    merge_and_sync: bool = True
    adapter_name: str | None = Field(
        None, min_length=1, max_length=MAX_ADAPTER_NAME_CHARS, pattern=ADAPTER_NAME_PATTERN
    )
    every_n_steps: int = Field(1, ge=1)
    bucket_size_mb: int = Field(512, ge=1, le=65536)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    pause_mode: PauseMode = "keep"
    stale_kv: StaleKV = "recompute"
    overlap: bool = False
    verify: Verify = "digest"
    on_error: OnError = "raise"
    timeout_s: float = Field(300.0, gt=0)
    token: str | None = Field(None, repr=False)
    module: str = ""

    @field_validator("rollouts", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> tuple[Any, ...]:
        rollouts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not rollouts:
            raise ValueError("give at least one rollout: a URL such as http://127.0.0.1:8000, or a LocalRollout")
        urls = [r.rstrip("/") for r in rollouts if isinstance(r, str)]
        if len(set(urls)) < len(urls):
            raise ValueError(f"the same URL stands twice in {urls}")
        return rollouts

    @model_validator(mode="after")
    def _available(self) -> SyncSettings:
        for (name, value), what in _NOT_YET.items():
            if getattr(self, name) == value:
                raise ValueError(
                    f"{name}={value!r}: {what} is not available in this version; leave {name} at its default"
                )
        if self.adapter_name is not None and self.merge_and_sync:
            raise ValueError(
                f"adapter_name={self.adapter_name!r} names an adapter that travels alone, but merge_and_sync=True "
                f"merges it into the base; set merge_and_sync=False, or leave adapter_name out"
            )
        return self

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> SyncSettings:
        """Validates keyword settings.

        Raises:
            ConfigError: names each setting that is wrong, the value given, and for an unknown name the known ones.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            lines = [_explain(item) for item in error.errors(include_url=False)]
            raise ConfigError("; ".join(lines)) from None

    @property
    def bucket_size_bytes(self) -> int:
        return self.bucket_size_mb << 20


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown setting {name!r}; known are {', '.join(SyncSettings.model_fields)}"
    message = item["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    shown = "(hidden)" if name == "token" else repr(item["input"])
    return f"{name}={shown}: {message}"
