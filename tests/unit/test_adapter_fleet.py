"""A trainer of an adapter and the workers' ends of it, with everything real but vLLM: see `fake_adapter_rollout.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import peft
import pytest
import torch

from tests.peft_cases import quiet, randomize
from tests.tiny_models import build
from tests.unit.fake_adapter_rollout import AdapterRollout, Request, without_vllm
from tests.unit.fake_rollout import RUNS, FakeRollout
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.adapter_fleet import AdapterFleet
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import DeadlineError, RolloutError, SyncError
from twinkle_callbacks.worker import adapter_links
from twinkle_callbacks.worker.messages import LEAVE, RECEIVE, AdapterCall

pytestmark = pytest.mark.usefixtures(without_vllm.__name__)
CONNECT = ["world_size", "join", "compare"]
PUSH = ["receive", "load_adapter"]


def base(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in build("qwen3", seed, num_hidden_layers=1).state_dict().items()}


@pytest.fixture
def rollouts() -> Iterator[list[AdapterRollout]]:
    rollouts = [AdapterRollout("one", base()), AdapterRollout("two", base())]
    yield rollouts
    for rollout in rollouts:
        rollout.end()
        rollout.links.close()


@pytest.fixture
def policy() -> Any:
    model = build("qwen3", 0, num_hidden_layers=1)
    policy = quiet(lambda: peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])))
    randomize(policy)
    return policy


def synchronizer(policy: Any, rollouts: list[AdapterRollout], name: str = "math", **more: Any) -> WeightSynchronizer:
    settings = {"merge_and_sync": False, "adapter_name": name, "bucket_size_mb": 1, "timeout_s": 10, **more}
    return WeightSynchronizer(policy, rollouts=rollouts, **settings)


def served(rollout: AdapterRollout) -> int | None:
    path = AdapterPath.parse(rollout.adapters().get("math", ""))
    return None if path is None else path.version


def attach(rollout: AdapterRollout, name: str) -> None:
    path = AdapterPath.sent(0)
    rollout.store.put(name, path, {}, {})
    rollout.store.add(None, Request(name, 99, str(path)))  # type: ignore[arg-type]


def test_each_push_is_two_calls_and_every_rollout_gets_every_version(
    policy: Any, rollouts: list[AdapterRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        assert sync.push(version=3).version == 3
    for rollout in rollouts:
        assert served(rollout) == 3
        assert rollout.calls == [*CONNECT, *PUSH, *PUSH, "leave", "close"]


def test_the_base_is_sent_only_to_the_rollout_that_holds_another(policy: Any, rollouts: list[AdapterRollout]) -> None:
    two = rollouts[1]
    two.restart(base(seed=5))
    with synchronizer(policy, rollouts):
        assert "start" not in rollouts[0].calls
        assert two.calls[:4] == [*CONNECT, "world_size"]  # by whom sends the base
        assert {"start", "finish"} <= set(two.calls)
    assert all(torch.equal(two.weights[name], tensor) for name, tensor in base().items())
    assert [served(rollout) for rollout in rollouts] == [0, 0]


def test_the_base_stays_if_an_adapter_comes_while_it_is_compared(
    policy: Any, rollouts: list[AdapterRollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = rollouts[1]
    two.restart(base(seed=5))
    differing = two.base.differing

    def compare(digests: Any) -> Any:
        attach(two, "files")
        return differing(digests)

    monkeypatch.setattr(two.base, "differing", compare)
    with pytest.raises(RolloutError, match=r"two serves another base.*not replaced.*\(files\)"):
        synchronizer(policy, rollouts).open()


def test_a_worker_refuses_a_base_beneath_the_adapters_of_others_whatever_the_trainer_thinks(
    policy: Any, rollouts: list[AdapterRollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = rollouts[1]
    monkeypatch.setattr(AdapterFleet, "refuse_another_base", lambda self, differing: None)
    with synchronizer(policy, rollouts, "other"):
        two.store.remove(2)
        two.base.committed({})
        with pytest.raises(RolloutError, match=r"not replaced for adapter 'math'.*\(other\)"):
            synchronizer(policy, rollouts).open()
    assert "start" not in two.calls


def test_a_server_that_starts_again_on_another_checkpoint_gets_the_base_anew(
    policy: Any, rollouts: list[AdapterRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        rollouts[1].links.close()
        rollouts[1].restart(base(seed=5))
        with pytest.raises(SyncError, match="has not joined"):
            sync.push(version=1)
        rollouts[1].calls.clear()
        sync.push(version=2)
        assert "start" in rollouts[1].calls
    assert all(torch.equal(rollouts[1].weights[name], tensor) for name, tensor in base().items())


def test_a_trainer_that_comes_again_does_not_compare_a_base_that_it_knows(
    policy: Any, rollouts: list[AdapterRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        rollouts[0].fail["load_adapter"] = RolloutError("no")
        with pytest.raises(SyncError, match="no"):
            sync.push(version=1)
        sync.push(version=2)
        assert rollouts[0].calls.count("compare") == 1


def test_a_base_that_is_replaced_beneath_a_trainer_ends_its_pushes(policy: Any, rollouts: list[AdapterRollout]) -> None:
    with synchronizer(policy, rollouts) as sync:
        rollouts[1].base.begin_commit()
        with pytest.raises(SyncError, match="the base of two was replaced by another trainer"):
            sync.push(version=1)
        assert served(rollouts[1]) == 0
        assert all(rollout.store._waiting == {} for rollout in rollouts)


def test_after_a_failed_push_the_links_are_free_at_once_and_the_next_push_succeeds(
    policy: Any, rollouts: list[AdapterRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        rollouts[1].fail["load_adapter"] = RolloutError("no")
        with pytest.raises(SyncError, match="no"):
            sync.push(version=1)
        for rollout in rollouts:
            assert rollout.calls[-2:] == ["leave", "close"]
            assert rollout.links._links == {}
            assert rollout.store._waiting == {}
        with synchronizer(policy, rollouts, "other"):
            pass
        assert sync.push(version=2).version == 2


def test_a_rollout_that_did_not_answer_is_not_asked_to_leave(policy: Any, rollouts: list[AdapterRollout]) -> None:
    with synchronizer(policy, rollouts) as sync:
        rollouts[1].fail["load_adapter"] = DeadlineError("no answer")
        with pytest.raises(SyncError, match="no answer"):
            sync.push(version=1)
        assert [rollout.calls[-2] for rollout in rollouts] == ["leave", "load_adapter"]


def test_after_a_refused_handshake_the_links_are_free_at_once(policy: Any, rollouts: list[AdapterRollout]) -> None:
    rollouts[1].store.refusal = RolloutError("the adapter is too large")
    sync = synchronizer(policy, rollouts)
    with pytest.raises(RolloutError, match="the adapter is too large"):
        sync.open()
    assert not sync.is_open
    assert sync._fleet is None
    for rollout in rollouts:
        assert rollout.calls[-2:] == ["leave", "close"]
        assert rollout.links._links == {}


def test_a_rollout_that_refuses_to_be_joined_is_not_asked_to_leave(policy: Any, rollouts: list[AdapterRollout]) -> None:
    rollouts[1].fail["join"] = RolloutError("no")
    with pytest.raises(RolloutError, match="no"):
        synchronizer(policy, rollouts).open()
    assert [rollout.calls[-2] for rollout in rollouts] == ["leave", "join"]


def test_a_refused_trainer_leaves_the_update_of_another_open() -> None:
    rollout = FakeRollout("one", runs=msgspec.structs.replace(RUNS, quantization="fp8"))
    rollout.in_update = True
    with pytest.raises(RolloutError, match="quantized"):
        WeightSynchronizer(torch.nn.Linear(2, 2), rollouts=rollout, timeout_s=10).open()
    assert rollout.in_update
    rollout.end()


def test_what_an_earlier_trainer_says_late_leaves_the_link_of_the_next_alone(
    policy: Any, rollouts: list[AdapterRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        links = rollouts[0].links
        links.call(AdapterCall(action=LEAVE, adapter="math", client="earlier"))
        with pytest.raises(RolloutError, match="kept fresh by another trainer by now"):
            links.call(
                AdapterCall(action=RECEIVE, adapter="math", client="earlier", path=str(AdapterPath.sent(9)), number=9)
            )
        assert sync.push(version=1).version == 1


def test_a_trainer_that_comes_ends_the_links_of_all_that_are_gone(
    policy: Any, rollouts: list[AdapterRollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    with synchronizer(policy, rollouts, "gone"), synchronizer(policy, rollouts, "here"):
        links = rollouts[0].links
        gone = links._links["gone"]
        monkeypatch.setattr(adapter_links, "alive", lambda asked: [link for link in asked if link is not gone])
        with synchronizer(policy, rollouts):
            assert set(links._links) == {"here", "math"}
            assert gone.closed


def test_a_data_parallel_server_is_refused_in_the_handshake(policy: Any, rollouts: list[AdapterRollout]) -> None:
    two = rollouts[1]
    two.links = adapter_links.AdapterLinks(two.store, two.base, replicated=True)
    with pytest.raises(RolloutError, match=r"two \(rank 2\) cannot serve adapter 'math'.*data-parallel"):
        synchronizer(policy, rollouts).open()
