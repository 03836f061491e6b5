"""A real vLLM on the GPU, in a process of its own, synced over each engine for GPUs with a trainer on the same GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.gpu.served import (
    ENGINES,
    MIB,
    SEED,
    Memory,
    Served,
    fresh_answers,
    make_policy,
    serve,
    small_llm,
    synchronizer,
    train,
)
from tests.vllm.engines import Answers, answers, assert_same, release
from twinkle_callbacks.errors import TwinkleError
from twinkle_callbacks.rollouts import LocalRollout

SYNCS, WARM_SYNCS = 50, 15
SLACK_MIB = 16.0
FREED_MIB = 24.0  # at least, when an engine sleeps: its weights and its cache
ROOM_MIB = 1024  # left on the GPU, where there shall be no room for larger buckets


class References(NamedTuple):
    """What fresh loads answer: of the policy as it is at first, and after all syncs of the long test."""

    first: Answers
    last: Answers


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    policy = make_policy(SEED)
    found = []
    for steps in (0, SYNCS):
        for step in range(steps):
            train(policy, step)
        folder = tmp_path_factory.mktemp(f"after-{steps}")
        policy.save_pretrained(folder)
        found.append(fresh_answers(folder))
    assert found[0] != found[1]
    return References(*found)


@pytest.fixture(scope="module")
def served(references: References, served_dir: Path) -> Iterator[Served]:
    """One engine for all tests that leave it whole."""
    yield serve(served_dir, synced=True)
    release()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("verify", ["off", "digest"])
def test_answers_equal_a_fresh_load(engine: str, verify: str, served: Served, references: References) -> None:
    policy = make_policy(SEED + 1)
    with synchronizer(policy, LocalRollout(served.llm), engine, verify=verify) as sync:
        other = answers(served.llm)
        assert [tokens for tokens, _ in other] != [tokens for tokens, _ in references.first]
        policy.load_state_dict(make_policy(SEED).state_dict())
        report = sync.push(version=1)
        assert_same(answers(served.llm), references.first)
    assert [replica.digest for replica in report.replicas] == [report.digest]
    assert bool(report.digest) == (verify == "digest")
    assert (report.gather_s == 0) == (engine == "ipc"), "a stream that repeats is not drawn"
    assert report.bytes >= sum(parameter.nbytes for parameter in policy.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_fifty_syncs_with_generation_between_take_no_more_than_fifteen(
    engine: str, served: Served, references: References
) -> None:
    policy = make_policy(SEED)
    gc.collect()
    held = torch.cuda.memory_allocated()
    warm = None
    with synchronizer(policy, LocalRollout(served.llm), engine) as sync:
        assert_same(answers(served.llm), references.first)
        for step in range(SYNCS):
            train(policy, step)
            sync.push(version=step + 1)
            answers(served.llm)
            if step + 1 == WARM_SYNCS:
                warm = Memory.now(served)
        assert warm is not None
        warm.assert_flat(Memory.now(served), SLACK_MIB)
        assert (
            served.ask("commit_way") == {"ipc": "recorded", "nccl": "loader"}[engine]
        )  # from staged copies on the host
        assert_same(answers(served.llm), references.last)
    gc.collect()
    assert torch.cuda.memory_allocated() - held < MIB, "the engine's buffers are still there"


def test_a_policy_may_leave_the_gpu_between_pushes(served: Served, references: References) -> None:
    policy = make_policy(SEED + 1)
    with synchronizer(policy, LocalRollout(served.llm), "ipc") as sync:
        policy.to("cpu")
        torch.cuda.empty_cache()
        answers(served.llm)
        policy.to("cuda")
        policy.load_state_dict(make_policy(SEED).state_dict())
        sync.push(version=1)
        assert_same(answers(served.llm), references.first)


@pytest.mark.parametrize(
    ("kind", "settings"), [("qwen3_moe", {}), ("qwen3", {"quantization": "fp8"})], ids=["experts", "online fp8"]
)
def test_layers_that_compute_with_other_tensors_are_loaded_and_the_others_recorded(
    kind: str, settings: dict[str, str], tmp_path: Path
) -> None:
    policy = make_policy(SEED, kind)
    make_policy(0, kind).save_pretrained(tmp_path / "served")
    policy.save_pretrained(tmp_path / "policy")
    expected = fresh_answers(tmp_path / "policy", **settings)
    served = serve(tmp_path / "served", synced=True, enable_sleep_mode=True, **settings)
    assert [tokens for tokens, _ in answers(served.llm)] != [tokens for tokens, _ in expected]
    rollout = LocalRollout(served.llm)
    with synchronizer(policy, rollout, "ipc") as sync:
        assert_same(answers(served.llm), expected)
        for version, seed in enumerate((2, 3, SEED)):
            policy.load_state_dict(make_policy(seed, kind).state_dict())
            sync.push(version=version)
            assert served.ask("commit_way") == "partly recorded"
        assert_same(answers(served.llm), expected)
        rollout.sleep(level=2)
        for version in (4, 5):
            sync.push(version=version)
            assert_same(answers(served.llm), expected)
        assert served.ask("commit_way") == "partly recorded"


@pytest.fixture(scope="module")
def sleepy(references: References, served_dir: Path) -> Iterator[Served]:
    """One engine for all tests in which it sleeps."""
    yield serve(served_dir, synced=True, enable_sleep_mode=True)
    release()


@pytest.mark.parametrize("level", [1, 2])
def test_push_wakes_an_engine_that_gave_its_memory_back(level: int, sleepy: Served, references: References) -> None:
    policy = make_policy(SEED)
    rollout = LocalRollout(sleepy.llm)
    awake = Memory.now(sleepy).gpu
    with synchronizer(policy, rollout, "ipc") as sync:
        for step in range(SYNCS):
            train(policy, step)
            if step % 10 == 9:
                rollout.sleep(level)
                assert Memory.now(sleepy).gpu < awake - FREED_MIB
            if step % 10 == 9 or step % 10 == 0:  # the second of these finds recorded copies
                sync.push(version=step + 1)
        assert_same(answers(sleepy.llm), references.last)
        assert sleepy.ask("commit_way") == "recorded"


def test_push_into_an_engine_that_sleeps_unknown_to_it_is_refused(sleepy: Served, references: References) -> None:
    policy = make_policy(SEED)
    rollout = LocalRollout(sleepy.llm)
    with synchronizer(policy, rollout, "ipc") as sync:
        sleepy.llm.sleep(level=1)
        train(policy, 0)
        with pytest.raises(TwinkleError, match="vLLM sleeps"):
            sync.push(version=2)
        sleepy.llm.wake_up(tags=["weights"])
        sleepy.llm.wake_up(tags=["kv_cache"])
        assert_same(answers(sleepy.llm), references.first)


def test_engine_in_the_trainers_own_process_syncs_and_sleeps(references: References, served_dir: Path) -> None:
    llm = small_llm(served_dir, own_process=False, synced=True, enable_sleep_mode=True)
    policy = make_policy(SEED)
    rollout = LocalRollout(llm)
    with synchronizer(policy, rollout, "ipc") as sync:
        assert_same(answers(llm), references.first)
        for step in range(SYNCS):
            train(policy, step)
        rollout.sleep(level=2)
        sync.push(version=1)
        assert_same(answers(llm), references.last)


@pytest.mark.parametrize("engine", ENGINES)
def test_buckets_that_the_gpu_has_no_room_for_are_a_clear_error(
    engine: str, served: Served, references: References
) -> None:
    policy = make_policy(SEED)
    free, _ = torch.cuda.mem_get_info()
    held = [torch.empty(free - ROOM_MIB * MIB, dtype=torch.uint8, device="cuda")]
    policy.large = torch.nn.Parameter(torch.zeros(2 * ROOM_MIB * MIB))  # on the CPU, so that it goes through buckets
    with pytest.raises(TwinkleError, match="bucket_size_mb"):
        synchronizer(policy, LocalRollout(served.llm), engine, bucket_size_mb=2 * ROOM_MIB).open()
    held.clear()
    torch.cuda.empty_cache()
    del policy.large
    with synchronizer(policy, LocalRollout(served.llm), engine):
        assert_same(answers(served.llm), references.first)
