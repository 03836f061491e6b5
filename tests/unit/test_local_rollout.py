"""Adapters of an engine in the trainer's process: their ids, and when it is told to forget them."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from twinkle_callbacks import adapter_versions
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.rollouts import LocalRollout


class Version:
    """In place of vLLM's `LoRARequest`."""

    def __init__(self, *, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


class Engine:
    """In place of vLLM's `LLMEngine`."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            weight_transfer_config=SimpleNamespace(backend="twinkle"),
            lora_config=SimpleNamespace(max_loras=4),
            model_config=SimpleNamespace(served_model_name="base"),
        )
        self.engine_core = SimpleNamespace()
        self.added: list[int] = []
        self.removed: list[int] = []
        self.threads: set[threading.Thread] = set()

    def add_lora(self, version: Any) -> bool:
        self.added.append(version.lora_int_id)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        self.threads.add(threading.current_thread())
        return True


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(adapter_versions, "_version_class", lambda: Version)
    return SimpleNamespace(llm_engine=Engine(), init_weight_transfer_engine=lambda _: None)


def load(rollout: LocalRollout, name: str = "math") -> None:
    rollout.load_adapter(name, str(AdapterPath.sent(0)))


def test_two_rollouts_of_one_engine_give_no_id_twice(llm: Any) -> None:
    one, two = LocalRollout(llm), LocalRollout(llm)
    for rollout in (one, two, one):
        load(rollout)
    added = llm.llm_engine.added
    assert len(set(added)) == len(added) == 3
    assert min(added) >= 1 << 20


def test_a_version_is_forgotten_by_the_call_that_replaces_or_takes_it_away(llm: Any) -> None:
    rollout, engine = LocalRollout(llm), llm.llm_engine
    load(rollout)
    load(rollout)
    assert engine.removed == engine.added[:1]
    rollout.unload_adapter("math")
    assert engine.removed == engine.added


def test_a_version_that_ends_on_another_thread_is_forgotten_by_the_next_call(llm: Any) -> None:
    rollout, engine = LocalRollout(llm), llm.llm_engine
    load(rollout)
    held = [rollout.lora_request("math")]
    load(rollout)
    ending = threading.Thread(target=lambda: (held.clear(), gc.collect()))
    ending.start()
    ending.join()
    assert engine.removed == []
    rollout.call({})
    assert engine.removed == engine.added[:1]
    assert engine.threads == {threading.current_thread()}
