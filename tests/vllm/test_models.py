"""After a sync, an engine answers exactly like one that freshly loaded the same weights, for each kind of model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_models import build
from tests.vllm.engines import answers, fresh_answers, make_llm, release
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.rollouts import LocalRollout


@pytest.fixture(autouse=True)
def no_engine_outlives_its_test() -> Iterator[None]:
    yield
    release()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "qwen3_moe", "mixtral"])
def test_answers_equal_a_fresh_load_after_each_of_two_syncs(kind: str, tmp_path: Path) -> None:
    policies = [build(kind, seed=seed) for seed in range(3)]
    for number, policy in enumerate(policies):
        policy.save_pretrained(tmp_path / str(number))
    expected = [fresh_answers(tmp_path / str(number)) for number in range(3)]
    llm = make_llm(tmp_path / "0", synced=True)
    assert answers(llm) == expected[0]

    trained = build(kind, seed=1)
    with WeightSynchronizer(trained, rollouts=LocalRollout(llm), timeout_s=60) as sync:
        assert answers(llm) == expected[1]
        trained.load_state_dict(policies[2].state_dict())
        report = sync.push(version=1)
        assert answers(llm) == expected[2]
    assert llm.get_weight_version() == "1"
    assert [replica.digest for replica in report.replicas] == [report.digest]
    assert report.bytes >= sum(p.nbytes for p in trained.parameters())


def test_bfloat16_engine_gets_the_float32_policy_as_a_fresh_load_casts_it(tmp_path: Path) -> None:
    policy = build("qwen3", seed=1)
    policy.save_pretrained(tmp_path / "new")
    build("qwen3", seed=0).save_pretrained(tmp_path / "old")
    fresh = answers(make_llm(tmp_path / "new", synced=False, dtype="bfloat16"))
    llm = make_llm(tmp_path / "old", synced=True, dtype="bfloat16")
    with WeightSynchronizer(policy, rollouts=LocalRollout(llm), timeout_s=60) as sync:
        assert sync.report is not None
        assert sync.report.bytes < sum(p.nbytes for p in policy.parameters())  # cast before it travels
        assert answers(llm) == fresh
