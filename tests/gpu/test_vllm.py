"""A real vLLM on the GPU, in a process of its own, synced over each engine for GPUs with a trainer on the same GPU."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.gpu.served import MIB, Memory, Served, host, make_policy, serve, train
from tests.vllm.engines import Answers, answers, assert_same, release
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.errors import TwinkleError
from twinkle_callbacks.rollouts import LocalRollout
from twinkle_callbacks.worker.messages import RECEIVE

ENGINES = ["ipc", "nccl"]
SEED = 1
SYNCS, WARM_SYNCS = 50, 15
SLACK_MIB = 16.0
BUCKET_MB = 4
FREED_MIB = 64.0  # at least, when an engine sleeps: its weights and its cache
ROOM_MIB = 1024  # left on the GPU, where there shall be no room for larger buckets
TIMEOUT_S = 20.0
LATE_S = 10.0  # how much later than its deadline an error may come


class References(NamedTuple):
    """What fresh loads answer: of the policy as it is at first, and after all syncs of the long test."""

    first: Answers
    last: Answers


def synchronizer(policy: torch.nn.Module, rollout: LocalRollout, engine: str, **settings: Any) -> WeightSynchronizer:
    settings = {"timeout_s": TIMEOUT_S, "bucket_size_mb": BUCKET_MB, **settings}
    return WeightSynchronizer(policy, rollouts=rollout, engine=engine, **settings)


@pytest.fixture(scope="module", autouse=True)
def this_process_is_a_host_of_its_own() -> Iterator[None]:
    with host("trainer"):
        yield


@pytest.fixture(scope="module")
def served_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that every engine is started with, which no test trains."""
    folder = tmp_path_factory.mktemp("served")
    make_policy(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    policy = make_policy(SEED)
    found = []
    for steps in (0, SYNCS):
        for step in range(steps):
            train(policy, step)
        folder = tmp_path_factory.mktemp(f"after-{steps}")
        policy.save_pretrained(folder)
        found.append(answers(serve(folder, synced=False).llm))
        release()
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
        sleepy.llm.wake_up()
        assert_same(answers(sleepy.llm), references.first)


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


class DyingRollout(LocalRollout):
    """An engine whose process is killed at a certain moment."""

    def __init__(self, served: Served, moment: str) -> None:
        super().__init__(served.llm)
        self._pid, self._moment = served.pid, moment
        self.may_die = False

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def start(self) -> None:
        if self.may_die and self._moment == "before a push":
            self.kill()
        super().start()

    def update(self, info: dict[str, Any]) -> None:
        super().update(info)
        if self.may_die and self._moment == "while it receives" and info["action"] == RECEIVE:
            self.kill()

    def finish(self) -> None:
        if self.may_die and self._moment == "inside the commit":
            os.kill(self._pid, signal.SIGSTOP)
            threading.Timer(1.0, self.kill).start()
        super().finish()


@pytest.fixture
def no_engine_outlives_its_test() -> Iterator[None]:
    yield
    release()


@pytest.mark.timeout(90)
@pytest.mark.usefixtures("no_engine_outlives_its_test")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("moment", ["before a push", "while it receives", "inside the commit"])
def test_killed_engine_is_a_clear_error_in_time(engine: str, moment: str, served_dir: Path) -> None:
    policy = make_policy(SEED)
    rollout = DyingRollout(serve(served_dir, synced=True), moment)
    sync = synchronizer(policy, rollout, engine)
    sync.open()
    rollout.may_die = True
    failed, seconds = outcome_of(lambda: sync.push(version=1))
    assert isinstance(failed, TwinkleError), failed
    assert "local" in str(failed)
    assert seconds < TIMEOUT_S + LATE_S
    failed, seconds = outcome_of(sync.close)
    assert failed is None
    assert seconds < TIMEOUT_S + LATE_S
    torch.cuda.synchronize()
    assert all(bool(parameter.isfinite().all()) for parameter in policy.parameters())


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("no_engine_outlives_its_test")
@pytest.mark.parametrize("engine", ENGINES)
def test_trainer_whose_engine_was_killed_syncs_with_the_next(
    engine: str, references: References, served_dir: Path
) -> None:
    policy = make_policy(SEED)
    rollout = DyingRollout(serve(served_dir, synced=True), "while it receives")
    with synchronizer(policy, rollout, engine) as sync:
        rollout.may_die = True
        failed, _ = outcome_of(lambda: sync.push(version=1))
        assert isinstance(failed, TwinkleError), failed
    release()
    other = serve(served_dir, synced=True)
    with synchronizer(policy, LocalRollout(other.llm), engine):
        assert_same(answers(other.llm), references.first)


def outcome_of(call: Callable[[], Any]) -> tuple[BaseException | None, float]:
    """What a call raised, and how long it took."""
    began = time.monotonic()
    try:
        call()
    except Exception as error:  # handed to the caller
        return error, time.monotonic() - began
    return None, time.monotonic() - began
