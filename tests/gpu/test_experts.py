"""A real vLLM on the GPU whose experts go through its loader, and whose other layers are recorded copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.served import SEED, make_policy, serve, synchronizer, train
from tests.vllm.engines import answers, assert_same, release
from twinkle_callbacks.rollouts import LocalRollout

SYNCS = 6


@pytest.fixture(autouse=True)
def no_engine_outlives_its_test() -> Iterator[None]:
    yield
    release()


@pytest.mark.parametrize("sleeps", [False, True])
def test_answers_equal_a_fresh_load_after_each_partial_commit(sleeps: bool, tmp_path: Path) -> None:
    policy = make_policy(SEED, "qwen3_moe")
    wanted = []
    for step in range(SYNCS):
        policy.save_pretrained(tmp_path / str(step))
        wanted.append(answers(serve(tmp_path / str(step), synced=False).llm))
        release()
        train(policy, step)
    served = serve(tmp_path / str(SYNCS - 1), synced=True, enable_sleep_mode=sleeps)
    policy = make_policy(SEED, "qwen3_moe")
    rollout = LocalRollout(served.llm)
    with synchronizer(policy, rollout, "ipc") as sync:
        assert_same(answers(served.llm), wanted[0])
        for step in range(1, SYNCS):
            train(policy, step - 1)
            if sleeps:
                rollout.sleep(level=2)
                sync.push(version=2 * step)
                assert_same(answers(served.llm), wanted[step])
            sync.push(version=2 * step + 1)
            assert served.ask("commit_way") == "partly recorded"
            assert_same(answers(served.llm), wanted[step])
