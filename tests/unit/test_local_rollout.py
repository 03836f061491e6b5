"""An engine in the trainer's process: its adapters' ids, when it forgets them, and how it sleeps and wakes."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from twinkle_callbacks import adapter_versions
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import ConfigError, RolloutError
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
            model_config=SimpleNamespace(served_model_name="base", enable_sleep_mode=True, is_multimodal_model=False),
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


class SleepyLLM:
    """In place of `vllm.LLM`: notes what it is asked."""

    def __init__(self, *, enable_sleep_mode: bool = True) -> None:
        self.llm_engine = Engine()
        self.llm_engine.vllm_config.model_config.enable_sleep_mode = enable_sleep_mode
        self.asked: list[str] = []

    def sleep(self, level: int) -> None:
        self.asked.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.asked.append(f"wake {' '.join(tags)}")

    def start_weight_update(self) -> None:
        self.asked.append("start")

    def finish_weight_update(self) -> None:
        self.asked.append("finish")


def push(rollout: LocalRollout) -> None:
    """What a push that succeeds asks of a rollout."""
    rollout.start()
    rollout.pause("keep", clear_cache=True)
    rollout.finish()
    rollout.set_version(1)
    rollout.resume()


@pytest.mark.parametrize("level", [1, 2])
def test_a_push_wakes_the_weights_before_it_and_the_cache_after_it(level: int) -> None:
    llm = SleepyLLM()
    rollout = LocalRollout(llm)
    rollout.sleep(level)
    push(rollout)
    assert llm.asked == [f"sleep {level}", "wake weights", "start", "finish", "wake kv_cache"]
    push(rollout)
    assert llm.asked[5:] == ["start", "finish"]


def test_an_engine_that_kept_its_weights_wakes_without_a_push() -> None:
    llm = SleepyLLM()
    rollout = LocalRollout(llm)
    rollout.sleep()
    rollout.wake_up()
    rollout.wake_up()
    assert llm.asked == ["sleep 1", "wake weights", "wake kv_cache"]


def test_an_engine_that_dropped_its_weights_stays_without_cache_until_a_push_succeeds() -> None:
    llm = SleepyLLM()
    rollout = LocalRollout(llm)
    rollout.sleep(level=2)
    rollout.start()
    rollout.resume()  # as after a commit that did not happen
    with pytest.raises(RolloutError, match="dropped its weights"):
        rollout.wake_up()
    assert "wake kv_cache" not in llm.asked
    push(rollout)
    assert llm.asked[-1] == "wake kv_cache"


def test_sleep_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match="enable_sleep_mode=True"):
        LocalRollout(SleepyLLM(enable_sleep_mode=False)).sleep()
    rollout = LocalRollout(SleepyLLM())
    with pytest.raises(ConfigError, match="level=3"):
        rollout.sleep(level=3)
    rollout.sleep()
    with pytest.raises(RolloutError, match="sleeps already"):
        rollout.sleep()
