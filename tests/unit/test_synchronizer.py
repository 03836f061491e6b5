"""The order of a push, and what becomes of the rollouts when a step of it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
import torch

from tests.unit.fake_rollout import RUNS, FakeRollout
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.engines import CheckpointEngine
from twinkle_callbacks.errors import (
    BrokenCommitError,
    ConfigError,
    DeadlineError,
    DigestMismatchError,
    RolloutError,
    SyncError,
    TwinkleError,
    WeightMismatchError,
)
from twinkle_callbacks.worker.messages import LoRARuns
from twinkle_callbacks.worker.stage import Stage

PUSH = [
    "start",
    "update:receive",
    "update:check",
    "pause:keep:True",
    "finish",
    "set_version:{}",
    "reset_cache",
    "resume",
]


@pytest.fixture
def rollouts() -> Iterator[list[FakeRollout]]:
    fleet = [FakeRollout("one", workers=2), FakeRollout("two")]
    yield fleet
    for rollout in fleet:
        rollout.end()


@pytest.fixture
def policy() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))


def synchronizer(policy: torch.nn.Module, rollouts: list[FakeRollout], **settings) -> WeightSynchronizer:  # type: ignore[no-untyped-def]
    return WeightSynchronizer(policy, **{"rollouts": rollouts, "bucket_size_mb": 1, "timeout_s": 10, **settings})


def assert_serves(rollout: FakeRollout, policy: torch.nn.Module, version: int) -> None:
    assert rollout.version() == str(version)
    assert {n: t.tolist() for n, t in rollout.weights.items()} == {n: p.tolist() for n, p in policy.named_parameters()}
    assert not rollout.paused
    assert not rollout.in_update


def change(policy: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)


def test_each_phase_is_one_call_and_every_rollout_gets_every_version(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        for rollout in rollouts:
            assert_serves(rollout, policy, 0)
        change(policy)
        report = sync.push(version=7)
    for rollout in rollouts:
        assert_serves(rollout, policy, 7)
        expected = [call.format(v) for v in (0, 7) for call in PUSH]
        assert rollout.calls == ["world_size", "join", *expected, "leave", "close"]
    assert [(r.rollout, r.version, r.tensors, r.digest) for r in report.replicas] == [
        ("one", 7, 4, report.digest),
        ("two", 7, 4, report.digest),
    ]
    assert report.seconds >= report.gather_s + report.transfer_s + report.commit_s > 0


def test_cached_prefixes_stay_when_asked(policy: torch.nn.Module, rollouts: list[FakeRollout]) -> None:
    with synchronizer(policy, rollouts, stale_kv="keep", pause_mode="wait"):
        pass
    assert "pause:wait:False" in rollouts[0].calls
    assert "reset_cache" not in rollouts[0].calls


@pytest.mark.parametrize(
    "call", ["start", "update:receive", "staged", "update:check", "checked", "pause:keep:True", "finish", "committed"]
)
def test_a_rollout_that_refuses_a_step_keeps_all_on_the_old_weights_or_says_so_and_the_next_push_succeeds(
    call: str, policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        before = {n: t.clone() for n, t in rollouts[1].weights.items()}
        change(policy)
        rollouts[1].fail[call] = RolloutError("no")
        with pytest.raises(SyncError, match="no") as caught:
            sync.push(version=1)
        assert caught.value.phase in ("start", "transfer", "check", "commit")
        assert caught.value.rollouts == ("two",)
        for rollout in rollouts:
            assert (rollout.paused, rollout.in_update) == (False, False)
        assert rollouts[1].version() == "0"
        assert all(torch.equal(rollouts[1].weights[n], t) for n, t in before.items())
        sync.push(version=2)
    for rollout in rollouts:
        assert_serves(rollout, policy, 2)


def test_nothing_is_committed_anywhere_when_one_worker_has_other_digests(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        rollouts[0].fail["staged"] = DigestMismatchError("3 of 4 differ")
        with pytest.raises(SyncError, match="one .*3 of 4 differ") as caught:
            sync.push(version=1)
        assert (caught.value.phase, caught.value.rollouts) == ("transfer", ("one",))
        assert [rollout.version() for rollout in rollouts] == ["0", "0"]


def test_a_commit_that_broke_off_stays_paused_until_the_next_push_succeeds(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        rollouts[1].fail["committed"] = SystemError("half of the layers")
        with pytest.raises(SyncError, match="half of the layers"):
            sync.push(version=1)
        assert [rollout.paused for rollout in rollouts] == [False, True]
        sync.push(version=2)
        assert [rollout.paused for rollout in rollouts] == [False, False]


@pytest.mark.parametrize("trainer", ["the same", "another"])
def test_a_rollout_with_half_a_commit_is_not_resumed_by_a_push_that_fails(
    trainer: str, policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        rollouts[1].fail["committed"] = SystemError("half of the layers")
        with pytest.raises(BrokenCommitError, match="half of the layers.*two may not serve") as caught:
            sync.push(version=1)
        assert caught.value.rollouts == ("two",)
        for call in ("start", "checked", "pause:keep:True"):
            rollouts[0].fail[call] = RolloutError("no")
            with pytest.raises(BrokenCommitError, match="two may not serve"):
                if trainer == "the same":
                    sync.push(version=2)
                else:
                    synchronizer(policy, rollouts).open(version=2)
            assert [rollout.paused for rollout in rollouts] == [False, True]
        sync.close()
        sync.open(version=3)
        for rollout in rollouts:
            assert_serves(rollout, policy, 3)


def test_a_broken_commit_is_raised_also_when_failures_are_to_be_skipped(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts, on_error="skip") as sync:
        rollouts[1].fail["committed"] = SystemError("half of the layers")
        with pytest.raises(BrokenCommitError):
            sync.push(version=1)


def test_a_rollout_that_does_not_resume_is_raised_also_when_failures_are_to_be_skipped(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts, on_error="skip") as sync:
        rollouts[0].fail["pause:keep:True"] = RolloutError("pause went wrong")
        rollouts[0].fail["resume"] = RolloutError("and resume too")
        with pytest.raises(BrokenCommitError, match="one may not serve"):
            sync.push(version=1)
        assert [rollout.paused for rollout in rollouts] == [True, False]
        assert sync.push(version=2).error == ""
        for rollout in rollouts:
            assert_serves(rollout, policy, 2)


@pytest.mark.parametrize("call", ["world_size", "staged"])
def test_a_rollout_that_stands_still_lets_no_later_failure_be_skipped(
    call: str, policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts, on_error="skip") as sync:
        rollouts[1].fail["set_version:1"] = DeadlineError("no answer")
        with pytest.raises(BrokenCommitError, match="two may not serve"):
            sync.push(version=1)
        rollouts[1].fail[call] = RolloutError("not yet")
        with pytest.raises(TwinkleError, match="not yet"):
            sync.push(version=2)
        assert [rollout.paused for rollout in rollouts] == [False, True], "two has weights of no known version"
        assert sync.push(version=3).error == ""
        for rollout in rollouts:
            assert_serves(rollout, policy, 3)
        rollouts[1].fail["start"] = RolloutError("busy")
        assert "busy" in sync.push(version=4).error


def test_a_rollout_that_an_earlier_trainer_left_paused_serves_again_also_when_the_push_fails(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    rollouts[0].paused = True  # killed after its pause, before its commit
    rollouts[1].fail["checked"] = WeightMismatchError("other model")
    with pytest.raises(SyncError, match="other model"):
        synchronizer(policy, rollouts).open()
    assert [rollout.paused for rollout in rollouts] == [False, False]


@pytest.mark.parametrize("call", ["set_version:1", "reset_cache"])
def test_a_rollout_whose_version_or_cache_is_not_that_of_its_weights_stays_paused_and_the_others_serve(
    call: str, policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        change(policy)
        rollouts[0].fail[call] = RolloutError("no")
        with pytest.raises(BrokenCommitError, match="one may not serve"):
            sync.push(version=1)
        assert rollouts[0].paused
        assert_serves(rollouts[1], policy, 1)


def test_a_wrong_model_is_found_before_anything_is_paused(policy: torch.nn.Module, rollouts: list[FakeRollout]) -> None:
    rollouts[0].fail["checked"] = WeightMismatchError("other model")
    with pytest.raises(SyncError, match="one .*other model") as caught:
        synchronizer(policy, rollouts).open()
    assert caught.value.phase == "check"
    assert not any(call.startswith("pause") for rollout in rollouts for call in rollout.calls)


ENDED_BY_AN_ERROR = """
import weakref
import torch
from tests.unit.fake_rollout import FakeRollout
from twinkle_callbacks import WeightSynchronizer

rollouts = [FakeRollout("one"), FakeRollout("two")]
sync = WeightSynchronizer(torch.nn.Linear(4, 4), rollouts=rollouts, bucket_size_mb=1, timeout_s=10, token="t" * 32)
for rollout in rollouts:
    weakref.finalize(rollout, lambda calls: print(calls[-2:], flush=True), rollout.calls)
sync.open()
weakref.finalize(sync.settings, WeightSynchronizer.close, sync)  # at the end of the process, as Transformers' callback
raise RuntimeError("training failed")
"""


def test_all_rollouts_are_left_in_order_when_an_error_ends_the_process() -> None:
    environment = {**os.environ, "TWINKLE_TOKEN": "t" * 32}
    ended = subprocess.run(
        [sys.executable, "-c", ENDED_BY_AN_ERROR],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert ended.stdout.splitlines() == ["['leave', 'close']"] * 2, ended.stderr
    assert ended.stderr.count("Traceback") == 1
    assert ended.returncode == 1


def test_an_unexpected_error_of_one_rollout_leaves_the_others_in_order(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts, on_error="skip") as sync:
        rollouts[0].fail["pause:keep:True"] = KeyError("surprise")
        assert "surprise" in sync.push(version=1).error
        assert [rollout.paused for rollout in rollouts] == [False, False]
        rollouts[0].fail["world_size"] = OSError("surprise")
        assert "surprise" in sync.push(version=2).error
        assert sync.push(version=3).error == ""


def test_a_worker_that_does_not_join_is_named_by_its_server(policy: torch.nn.Module) -> None:
    class Deaf(FakeRollout):
        def join(self, request: dict[str, object]) -> None:
            self.calls.append("join")

    rollouts = [FakeRollout("one", workers=2), Deaf("two")]
    with pytest.raises(DeadlineError, match=r"rank 3 did not join.*ranks 1 to 2 are one; rank 3 is two"):
        synchronizer(policy, rollouts, timeout_s=1).open()
    for rollout in rollouts:
        rollout.end()


def test_a_server_whose_workers_leave_in_the_transfer_is_named(policy: torch.nn.Module) -> None:
    class Leaving(FakeRollout):
        leaves = False

        def _receive(self, engine: CheckpointEngine) -> Stage:
            if self.leaves:
                engine.finalize()
                return Stage(verify=True)
            return super()._receive(engine)

    rollout = Leaving("one")
    with synchronizer(policy, [rollout], timeout_s=2) as sync:
        rollout.leaves = True
        with pytest.raises(SyncError, match="rank 1 is one") as caught:
            sync.push(version=1)
        assert (caught.value.phase, caught.value.rollouts) == ("transfer", ("one",))
        rollout.leaves = False
        assert sync.push(version=2).version == 2


def test_a_rollout_that_signs_with_another_token_is_refused(policy: torch.nn.Module) -> None:
    rollout = FakeRollout("one")
    rollout.token = "another token, long enough"
    with pytest.raises(ConfigError, match="one has another token"):
        synchronizer(policy, [rollout]).open()


def test_a_rollout_that_committed_carries_the_new_version_although_another_failed(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        change(policy)
        rollouts[1].fail["finish"] = RolloutError("no")
        with pytest.raises(SyncError, match="no"):
            sync.push(version=1)
        assert_serves(rollouts[0], policy, 1)
        assert rollouts[1].version() == "0"


def test_a_rollout_that_did_not_answer_in_the_commit_stays_paused(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts) as sync:
        rollouts[1].fail["finish"] = DeadlineError("no answer")
        with pytest.raises(SyncError, match="no answer"):
            sync.push(version=1)
        assert [rollout.paused for rollout in rollouts] == [False, True]


def test_error_types_of_a_worker_reach_the_trainer(policy: torch.nn.Module, rollouts: list[FakeRollout]) -> None:
    rollouts[0].fail["committed"] = WeightMismatchError("other model")
    with pytest.raises(SyncError, match="other model") as caught:
        synchronizer(policy, rollouts).open()
    assert isinstance(caught.value.__cause__, WeightMismatchError)


def test_skip_reports_the_error_and_the_version_still_served(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    with synchronizer(policy, rollouts, on_error="skip") as sync:
        rollouts[0].fail["start"] = RolloutError("busy")
        report = sync.push(version=1)
        assert "busy" in report.error
        assert (report.version, report.replicas) == (0, [])
        assert report.metrics()["weight_sync/skipped"] == 1
        assert sync.push(version=2).error == ""


def test_an_update_left_open_by_a_dead_trainer_is_closed_by_the_handshake(
    policy: torch.nn.Module, rollouts: list[FakeRollout]
) -> None:
    rollouts[0].in_update = True
    with synchronizer(policy, rollouts):
        assert rollouts[0].calls[:4] == ["world_size", "join", "update:abort", "finish"]
    assert_serves(rollouts[0], policy, 0)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"lora": LoRARuns(2, 8, "float32")}, "two runs with enable_lora=True.*without --enable-lora"),
        ({"quantization": "fp8"}, "two runs a model quantized with fp8"),
        ({"vocab_size": 9}, "different models.*vocab_size=8.*vocab_size=9"),
    ],
)
def test_servers_that_do_not_fit_are_refused_in_the_handshake(
    runs: dict[str, object], message: str, policy: torch.nn.Module
) -> None:
    rollouts = [FakeRollout("one"), FakeRollout("two", runs=msgspec.structs.replace(RUNS, **runs))]
    with pytest.raises(RolloutError, match=message):
        synchronizer(policy, rollouts).open()
    assert "start" not in rollouts[0].calls
    for rollout in rollouts:
        rollout.end()


def test_push_before_open_and_after_close_says_what_to_do(policy: torch.nn.Module, rollouts: list[FakeRollout]) -> None:
    sync = synchronizer(policy, rollouts)
    with pytest.raises(ConfigError, match=r"sync\.open\(\)"):
        sync.push(version=1)
    with sync:
        pass
    sync.close()
    with pytest.raises(ConfigError, match=r"sync\.open\(\)"):
        sync.push(version=1)
    with sync:
        assert sync.push(version=3).version == 3


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_policy_that_changed_fails_one_push_and_is_taken_anew_by_the_next(
    policy: torch.nn.Module, rollouts: list[FakeRollout], dtype: str | None
) -> None:
    with synchronizer(policy, rollouts, dtype=dtype) as sync:
        policy.append(torch.nn.Linear(2, 2))
        with pytest.raises(SyncError, match=r"'start': .*2.weight is new"):
            sync.push(version=1)
        sync.push(version=2)
    assert_serves(rollouts[0], policy, 2)


def test_the_policy_is_read_and_never_changed(policy: torch.nn.Module, rollouts: list[FakeRollout]) -> None:
    before = [(p.data_ptr(), p._version, p.requires_grad) for p in policy.parameters()]
    with synchronizer(policy, rollouts) as sync:
        sync.push(version=1)
    assert [(p.data_ptr(), p._version, p.requires_grad) for p in policy.parameters()] == before
