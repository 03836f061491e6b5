"""What a CheckpointEngine is built with is checked before anything is opened; who gets which rank is arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_callbacks.engines import CheckpointEngine, GlooCheckpointEngine
from twinkle_callbacks.engines.base import TIMEOUT_ENV
from twinkle_callbacks.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_timeout_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TIMEOUT_ENV, raising=False)


def test_engine_is_built_without_arguments_and_is_no_master() -> None:
    engine = GlooCheckpointEngine()
    assert engine.is_master is False
    assert engine.bucket_size == 512 << 20
    assert engine.timeout_s == 300
    assert engine.stats is None


@pytest.mark.parametrize("bucket_size", [0, -512, 1, 511, 1000, 512 * 3 + 1])
def test_bucket_size_that_cannot_be_aligned_is_refused(bucket_size: int) -> None:
    with pytest.raises(ConfigError, match=f"bucket_size={bucket_size}.*multiple of 512"):
        GlooCheckpointEngine(bucket_size=bucket_size)


@pytest.mark.parametrize("bucket_size", [1024.0, math.inf, math.nan])
def test_bucket_size_that_is_no_whole_number_is_a_config_error(bucket_size: Any) -> None:
    with pytest.raises(ConfigError, match="bucket_size="):
        GlooCheckpointEngine(bucket_size=bucket_size)


@pytest.mark.parametrize("timeout", [0, -1, -0.5, math.inf, -math.inf, math.nan])
def test_timeout_that_is_no_positive_number_is_refused(timeout: float) -> None:
    with pytest.raises(ConfigError, match=f"timeout={timeout}.*above 0"):
        GlooCheckpointEngine(timeout=timeout)


@pytest.mark.parametrize("timeout", [0.25, 1, 7200.5])
def test_timeout_of_the_constructor_wins_over_the_environment(timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_ENV, "17")
    assert GlooCheckpointEngine(timeout=timeout).timeout_s == timeout


@pytest.mark.parametrize("text", ["0", "-1", "", "abc", "1.5", "00", " ", "1e3", "inf", "\u00b2", "5 minutes"])
def test_timeout_of_the_environment_that_is_no_whole_number_above_zero_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TIMEOUT_ENV, text)
    with pytest.raises(ConfigError, match=f"{TIMEOUT_ENV}={text!r}".replace(".", r"\.")):
        GlooCheckpointEngine()


@pytest.mark.parametrize(("text", "seconds"), [("1", 1.0), ("17", 17.0), ("086400", 86400.0)])
def test_timeout_of_the_environment_holds_for_every_engine(
    text: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TIMEOUT_ENV, text)
    assert GlooCheckpointEngine().timeout_s == seconds


def test_name_of_the_environment_variable_is_twinkles() -> None:
    assert TIMEOUT_ENV == "TWINKLE_CKPT_HCCL_META_TIMEOUT_S"


def test_base_class_cannot_be_used_itself() -> None:
    with pytest.raises(TypeError, match="abstract"):
        CheckpointEngine()


METADATA = {"host": "10.0.0.1", "port": 1}


@given(st.integers(1, 20), st.integers(1, 20))
def test_topology_gives_each_process_its_own_rank_and_all_the_same_group(trainers: int, rollouts: int) -> None:
    trainer, rollout = CheckpointEngine.build_topology(trainers, rollouts, [METADATA] + [{}] * (trainers - 1))
    assert trainer["rank"] == [0] + [-1] * (trainers - 1)
    assert rollout["rank"] == list(range(1, rollouts + 1))
    assert set(trainer["world_size"] + rollout["world_size"]) == {rollouts + 1}
    assert trainer["master_metadata"] + rollout["master_metadata"] == [METADATA] * (trainers + rollouts)
    assert all(len(values) == trainers for values in trainer.values())
    assert all(len(values) == rollouts for values in rollout.values())


def test_topology_is_what_init_process_group_takes() -> None:
    trainer, rollout = GlooCheckpointEngine.build_topology(2, 1, [METADATA, {}])
    assert set(trainer) == set(rollout) == {"rank", "world_size", "master_metadata"}
