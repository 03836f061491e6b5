"""An engine in the trainer's process: its adapters' ids, when it forgets them, and how it sleeps and wakes."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from twinkle_callbacks import adapter_versions
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import ConfigError, DeadlineError, RolloutError, RolloutUnreachableError
from twinkle_callbacks.rollouts import LocalRollout
from twinkle_callbacks.worker.messages import ABORT, RECEIVE


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


@pytest.mark.parametrize("multimodal", [False, True])
def test_what_was_computed_from_old_weights_is_dropped_images_included(multimodal: bool, llm: Any) -> None:
    dropped: list[str] = []
    llm.llm_engine.vllm_config.model_config.is_multimodal_model = multimodal
    llm.reset_prefix_cache = lambda running, connector: dropped.append("prefixes") is None
    llm.reset_mm_cache = lambda: dropped.append("images")
    llm.llm_engine.reset_encoder_cache = lambda: dropped.append("their embeddings")
    LocalRollout(llm).reset_cache()
    assert dropped == ["prefixes", "images", "their embeddings"][: 3 if multimodal else 1]


class SleepyLLM:
    """In place of `vllm.LLM`: notes what it is asked, and refuses what `refuses` names."""

    def __init__(self, *, enable_sleep_mode: bool = True, with_lora: bool = False) -> None:
        self.llm_engine = Engine()
        self.llm_engine.vllm_config.model_config.enable_sleep_mode = enable_sleep_mode
        if not with_lora:
            self.llm_engine.vllm_config.lora_config = None
        self.asked: list[str] = []
        self.refuses = ""

    def _note(self, what: str) -> None:
        if what == self.refuses:
            raise RuntimeError("no")
        self.asked.append(what)

    def sleep(self, level: int) -> None:
        self._note(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self._note(f"wake {' '.join(tags)}")

    def start_weight_update(self) -> None:
        self._note("start")

    def update_weights(self, request: dict[str, Any]) -> None:
        info = request["update_info"]
        assert info["cache_may_sleep"]
        self._note(info["action"])

    def finish_weight_update(self) -> None:
        self._note("finish")


def receive(rollout: LocalRollout) -> None:
    rollout.start()
    rollout.update({"action": RECEIVE})


def push(rollout: LocalRollout) -> None:
    """What a push that succeeds asks of a rollout."""
    receive(rollout)
    rollout.pause("keep", clear_cache=True)
    rollout.finish()
    rollout.set_version(1)
    rollout.resume()


def give_up(rollout: LocalRollout) -> None:
    """What a synchronizer does after a failure that left the weights whole."""
    if rollout.held:
        rollout.resume()
    rollout.update({"action": ABORT})
    rollout.finish()


@pytest.mark.parametrize("level", [1, 2])
def test_a_push_wakes_the_weights_before_it_and_the_cache_after_it(level: int) -> None:
    llm = SleepyLLM()
    rollout = LocalRollout(llm)
    assert not rollout.held
    rollout.sleep(level)
    assert rollout.held
    push(rollout)
    assert llm.asked == [f"sleep {level}", "wake weights", "start", "receive", "finish", "wake kv_cache"]
    assert not rollout.held
    push(rollout)
    assert llm.asked[6:] == ["start", "receive", "finish"]


def test_an_engine_that_kept_its_weights_wakes_without_a_push() -> None:
    llm = SleepyLLM()
    rollout = LocalRollout(llm)
    rollout.sleep()
    rollout.wake_up()
    rollout.wake_up()
    assert llm.asked == ["sleep 1", "wake weights", "wake kv_cache"]


def test_a_push_that_fails_wakes_an_engine_that_kept_its_weights() -> None:
    llm = SleepyLLM()
    rollout = LocalRollout(llm)
    rollout.sleep(level=1)
    receive(rollout)
    give_up(rollout)
    assert llm.asked == ["sleep 1", "wake weights", "start", "receive", "wake kv_cache", "abort", "finish"]
    rollout.sleep(level=1)
    assert llm.asked[7:] == ["sleep 1"]


def test_an_engine_that_dropped_its_weights_stays_without_cache_until_a_push_succeeds() -> None:
    llm = SleepyLLM()
    rollout = LocalRollout(llm)
    rollout.sleep(level=2)
    receive(rollout)
    give_up(rollout)
    with pytest.raises(RolloutError, match="dropped its weights"):
        rollout.wake_up()
    assert "wake kv_cache" not in llm.asked
    rollout.sleep(level=1)  # for the next step; vLLM would not hear of it while a part of it sleeps
    assert llm.asked[-2:] == ["wake kv_cache", "sleep 1"]
    with pytest.raises(RolloutError, match="dropped its weights"):
        rollout.wake_up()
    push(rollout)
    assert llm.asked[-1] == "wake kv_cache"


def test_an_engine_whose_commit_broke_off_is_not_woken_before_a_push_succeeds() -> None:
    llm = SleepyLLM()
    rollout = LocalRollout(llm)
    rollout.sleep(level=1)
    receive(rollout)
    rollout.pause("keep", clear_cache=True)
    rollout.finish()  # and its workers tell that they are not whole
    with pytest.raises(RolloutError, match="a commit broke off"):
        rollout.wake_up()
    push(rollout)
    assert llm.asked[-1] == "wake kv_cache"


@pytest.mark.parametrize("refused", ["sleep 2", "finish"])
def test_what_vllm_refused_changes_nothing(refused: str) -> None:
    llm = SleepyLLM()
    rollout = LocalRollout(llm)
    llm.refuses = refused
    with pytest.raises(RolloutError, match="no"):
        rollout.sleep(level=2)
        receive(rollout)
        rollout.finish()
    llm.refuses = ""
    if refused == "sleep 2":
        assert not rollout.held
        rollout.wake_up()
        rollout.sleep(level=2)
    else:
        with pytest.raises(RolloutError, match="dropped its weights"):
            rollout.wake_up()


def test_an_adapter_wakes_the_engine_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_versions, "_version_class", lambda: Version)
    llm = SleepyLLM(with_lora=True)
    rollout = LocalRollout(llm)
    with pytest.raises(ConfigError, match="level=2 would drop the base"):
        rollout.sleep(level=2)
    rollout.sleep(level=1)
    load(rollout)
    assert llm.asked == ["sleep 1", "wake weights", "wake kv_cache"]
    assert len(llm.llm_engine.added) == 1


def test_sleep_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match="enable_sleep_mode=True"):
        LocalRollout(SleepyLLM(enable_sleep_mode=False)).sleep()
    rollout = LocalRollout(SleepyLLM())
    with pytest.raises(ConfigError, match="level=3"):
        rollout.sleep(level=3)
    rollout.sleep()
    with pytest.raises(RolloutError, match="sleeps already"):
        rollout.sleep()


class RemoteLLM(SleepyLLM):
    """In place of a `vllm.LLM` whose engine has a process of its own; its calls wait while `hangs` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.resources = SimpleNamespace(engine_dead=False)
        self.llm_engine.engine_core = SimpleNamespace(resources=self.resources)
        self.answers = threading.Event()
        self.answers.set()
        self.threads: list[str] = []

    def start_weight_update(self) -> None:
        self.threads.append(threading.current_thread().name)
        assert self.answers.wait(20)
        super().start_weight_update()


def llm_threads() -> int:
    return sum(thread.name == "twinkle-llm" for thread in threading.enumerate())


def test_calls_to_another_process_share_a_thread_that_ends_when_the_rollout_is_closed() -> None:
    llm = RemoteLLM()
    rollout = LocalRollout(llm)
    before = llm_threads()
    for _ in range(3):
        rollout.start()
    assert set(llm.threads) == {"twinkle-llm"}
    assert llm_threads() == before + 1
    rollout.close()
    rollout.close()
    assert llm_threads() == before
    rollout.start()
    assert llm.asked == ["start"] * 4
    [*_, thread] = [thread for thread in threading.enumerate() if thread.name == "twinkle-llm"]
    del rollout
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("died", [False, True])
def test_after_a_call_that_nobody_answers_the_next_does_not_wait_for_it(died: bool) -> None:
    llm = RemoteLLM()
    rollout = LocalRollout(llm)
    rollout.timeout_s = 0.3
    llm.answers.clear()
    llm.resources.engine_dead = died
    with pytest.raises(RolloutUnreachableError if died else DeadlineError, match="start_weight_update"):
        rollout.start()
    llm.resources.engine_dead = False
    rollout.finish()
    assert llm.asked == ["finish"]
    llm.answers.set()
    rollout.close()
