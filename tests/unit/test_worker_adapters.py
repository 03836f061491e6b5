"""A worker's store of adapters without vLLM: which version an id stands for, and what waits to be loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.fake_adapter_rollout import Request, Store, without_vllm
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import RolloutError
from twinkle_callbacks.worker.adapter_check import weights_mapper

pytestmark = pytest.mark.usefixtures(without_vllm.__name__)


def sent(store: Store, name: str, version: int = 0) -> AdapterPath:
    path = AdapterPath.sent(version)
    store.put(name, path, {}, {"a": torch.full((1,), float(version))})
    return path


def add(store: Store, name: str, lora_id: int, path: object) -> bool:
    request: Any = Request(name, lora_id, str(path))
    return store.add(None, request)


def test_an_id_that_has_another_path_loaded_is_refused_and_stands_for_what_it_stood_for() -> None:
    store = Store()
    first, second = sent(store, "math"), sent(store, "code")
    assert add(store, "math", 7, first)
    assert add(store, "math", 7, first)
    with pytest.raises(RolloutError, match=rf"id 7 is taken by 'math' \({first}\).*'code' \({second}\)"):
        add(store, "code", 7, second)
    assert store.names() == ["math"]
    assert add(store, "code", 8, second)
    assert store.names() == ["math", "code"]


def test_what_is_not_wanted_any_more_leaves_the_newer_version_that_waits() -> None:
    store = Store()
    waiting = sent(store, "math", version=2)
    with pytest.raises(RolloutError, match="has left"):
        store.put("math", AdapterPath.sent(1), {}, {}, wanted=lambda: False)
    assert add(store, "math", 1, waiting)


def test_what_is_not_wanted_after_it_was_built_is_not_kept() -> None:
    store = Store()
    answers = iter([True, False])
    with pytest.raises(RolloutError, match="has left"):
        store.put("math", AdapterPath.sent(1), {}, {}, wanted=lambda: next(answers))
    assert store._waiting == {}


def test_renames_of_a_models_checkpoint_are_read_in_vllm_0_26_too() -> None:
    now = SimpleNamespace(get_rename_mapper=lambda: "renames", get_unstacked_mapper=lambda: "renames and deletions")
    then = SimpleNamespace(get_unstacked_mapper=lambda: "renames and deletions")
    assert weights_mapper(SimpleNamespace(hf_to_vllm_mapper=now)) == "renames"
    assert weights_mapper(SimpleNamespace(hf_to_vllm_mapper=then)) == "renames and deletions"
    assert weights_mapper(SimpleNamespace()) is None
