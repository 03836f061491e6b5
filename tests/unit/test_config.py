from __future__ import annotations

import subprocess
import sys
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_callbacks.config import DEFAULT_ROLLOUT, SyncOptions, SyncSettings
from twinkle_callbacks.errors import ConfigError

SECRET = "a secret that no message may hold"


def test_the_defaults_are_those_of_the_readme() -> None:
    assert SyncSettings.parse({}).model_dump() == {
        "rollouts": (DEFAULT_ROLLOUT,),
        "engine": "auto",
        "merge_and_sync": True,
        "adapter_name": None,
        "every_n_steps": 1,
        "bucket_size_mb": 512,
        "dtype": None,
        "pause_mode": "keep",
        "stale_kv": "recompute",
        "overlap": False,
        "verify": "digest",
        "on_error": "raise",
        "timeout_s": 300.0,
        "token": None,
        "module": "",
    }


def test_the_typed_keywords_are_exactly_the_settings() -> None:
    assert set(get_type_hints(SyncOptions)) == set(SyncSettings.model_fields)


@pytest.mark.parametrize("rollouts", ["http://a:1", ["http://a:1"], ("http://a:1",)])
def test_one_url_or_a_list_of_urls(rollouts: Any) -> None:
    assert SyncSettings.parse({"rollouts": rollouts}).rollouts == ("http://a:1",)


def test_a_rollout_may_be_an_object() -> None:
    rollout = object()
    assert SyncSettings.parse({"rollouts": rollout}).rollouts == (rollout,)


def test_an_unknown_setting_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown setting 'bucket_size'; known are rollouts, engine, .*bucket_size_mb"
    ):
        SyncSettings.parse({"bucket_size": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0: "),
        ({"bucket_size_mb": 0}, "bucket_size_mb=0: "),
        ({"timeout_s": 0}, "timeout_s=0: "),
        ({"timeout_s": -1}, "timeout_s=-1: "),
        ({"pause_mode": "stop"}, "pause_mode='stop': .*'keep', 'wait' or 'abort'"),
        ({"stale_kv": "drop"}, "stale_kv='drop': .*'recompute' or 'keep'"),
        ({"dtype": "int8"}, "dtype='int8': "),
        ({"rollouts": []}, "give at least one rollout"),
        ({"rollouts": ["http://a:1", "http://a:1/"]}, "the same URL stands twice"),
        ({"overlap": True}, "overlap=True: .*not available"),
        ({"verify": "canary"}, "verify='canary': .*not available"),
        ({"on_error": "drop_replica"}, "on_error='drop_replica': .*not available"),
        ({"adapter_name": "math"}, "adapter_name='math' names an adapter that travels alone.*merge_and_sync=False"),
        ({"merge_and_sync": False, "adapter_name": "my math"}, "adapter_name='my math'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_wrong_value_is_named_with_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyncSettings.parse(settings)


def test_every_wrong_setting_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SyncSettings.parse({"every_n_steps": 0, "engin": "gloo"})
    assert "every_n_steps=0" in str(caught.value)
    assert "unknown setting 'engin'" in str(caught.value)


@given(st.sampled_from(sorted(SyncSettings.model_fields)), st.sampled_from([[], {}, -1, "", None, 1.5, object()]))
def test_any_value_is_accepted_or_named_in_a_config_error(name: str, value: Any) -> None:
    message = name
    try:
        SyncSettings.parse({name: value})
    except ConfigError as error:
        message = str(error)
    assert name in message or "rollout" in message


def test_no_message_shows_the_token() -> None:
    with pytest.raises(ConfigError) as caught:
        SyncSettings.parse({"token": [SECRET]})
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(SyncSettings.parse({"token": SECRET}))


@given(st.integers(1, 65536))
def test_the_bucket_size_is_in_mebibytes(megabytes: int) -> None:
    assert SyncSettings.parse({"bucket_size_mb": megabytes}).bucket_size_bytes == megabytes * 1024 * 1024


def test_the_lowest_layer_loads_without_torch() -> None:
    modules = ", ".join(f"twinkle_callbacks.{name}" for name in ("config", "errors", "report", "schedule", "auth"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
