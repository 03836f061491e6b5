"""A push of what lies where it lay is not drawn from the source; whatever else happened in between, it is drawn.

The engine is Gloo, whose receivers are made to see the tensors themselves: they are in this process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.unit.fake_rollout import FakeRollout
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.engines.backend import Place
from twinkle_callbacks.engines.gloo import GlooBackend
from twinkle_callbacks.engines.sender import FrameSender
from twinkle_callbacks.errors import RolloutError, SyncError
from twinkle_callbacks.sources import WeightSource, open_source


def place_of(_: GlooBackend, tensor: torch.Tensor) -> Place:
    return Place(b"this process", tensor.data_ptr())


def view(_: GlooBackend, place: Place, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(place.offset), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def receivers_see_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GlooBackend, "place_of", place_of)
    monkeypatch.setattr(GlooBackend, "view", view)


@pytest.fixture
def policy() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))


@pytest.fixture
def rollout() -> Iterator[FakeRollout]:
    rollout = FakeRollout("one")
    yield rollout
    rollout.end()


@pytest.fixture
def other() -> Iterator[FakeRollout]:
    rollout = FakeRollout("two")
    yield rollout
    rollout.end()


def synchronizer(model: torch.nn.Module | WeightSource, rollout: FakeRollout) -> WeightSynchronizer:
    return WeightSynchronizer(model, rollouts=[rollout], engine="gloo", bucket_size_mb=1, timeout_s=10)


def train(policy: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)


def move(policy: torch.nn.Module) -> None:
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone() + 1


def push(sync: WeightSynchronizer, policy: torch.nn.Module, rollout: FakeRollout, version: int) -> bool:
    """Whether the stream was drawn; the rollout has the policy's weights."""
    report = sync.push(version)
    assert rollout.weights.keys() == policy.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(rollout.weights[name], tensor), name
    assert report.digest
    return report.gather_s > 0


def test_new_values_where_the_old_ones_were_are_pushed_without_being_drawn(
    policy: torch.nn.Module, rollout: FakeRollout
) -> None:
    with synchronizer(policy, rollout) as sync:
        for version in range(1, 4):
            train(policy)
            assert not push(sync, policy, rollout, version)


@pytest.mark.parametrize("engine", ["gloo", "shm"])
def test_what_no_receiver_sees_is_drawn(
    engine: str, policy: torch.nn.Module, rollout: FakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("TWINKLE_TOKEN", "a token of the tests")
    with WeightSynchronizer(policy, rollouts=[rollout], engine=engine, bucket_size_mb=1, timeout_s=10) as sync:
        for version in range(1, 3):
            train(policy)
            assert push(sync, policy, rollout, version)


def replace(policy: torch.nn.Module) -> None:
    policy[0].weight = torch.nn.Parameter(policy[0].weight.detach() + 1)


def move_buffer(policy: torch.nn.Module) -> None:
    policy[1].running_mean = policy[1].running_mean + 1


@pytest.mark.parametrize("change", [move, replace, move_buffer])
def test_what_moved_is_drawn_once(
    change: Callable[[torch.nn.Module], None], policy: torch.nn.Module, rollout: FakeRollout
) -> None:
    with synchronizer(policy, rollout) as sync:
        change(policy)
        assert push(sync, policy, rollout, 1)
        train(policy)
        assert not push(sync, policy, rollout, 2)


def test_two_synchronizers_of_one_source_each_know_what_they_sent(
    policy: torch.nn.Module, rollout: FakeRollout, other: FakeRollout
) -> None:
    source = open_source(policy)
    with synchronizer(source, rollout) as first, synchronizer(source, other) as second:
        move(policy)
        assert push(first, policy, rollout, 1)
        assert push(second, policy, other, 1)
        train(policy)
        assert not push(first, policy, rollout, 2)
        assert not push(second, policy, other, 2)


def test_a_check_by_somebody_else_hides_no_move(policy: torch.nn.Module, rollout: FakeRollout) -> None:
    source = open_source(policy)
    with synchronizer(source, rollout) as sync:
        move(policy)
        source.check()
        assert push(sync, policy, rollout, 1)


@pytest.mark.parametrize("step", ["start", "update:receive", "staged", "finish"])
def test_the_push_after_one_that_failed_is_drawn(step: str, policy: torch.nn.Module, rollout: FakeRollout) -> None:
    with synchronizer(policy, rollout) as sync:
        train(policy)
        assert not push(sync, policy, rollout, 1)
        train(policy)
        rollout.fail[step] = RolloutError("no")
        with pytest.raises(SyncError, match="no"):
            sync.push(2)
        train(policy)
        assert push(sync, policy, rollout, 3)
        train(policy)
        assert not push(sync, policy, rollout, 4)


def test_a_stream_that_could_not_begin_early_is_drawn(
    policy: torch.nn.Module, rollout: FakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = FrameSender.begin

    def fails_at_first(sender: FrameSender, *, repeats: bool) -> None:
        begin(sender, repeats=repeats)
        if repeats:
            sender._is_begun = False
            raise torch.OutOfMemoryError("no room for a digest")

    with synchronizer(policy, rollout) as sync:
        monkeypatch.setattr(FrameSender, "begin", fails_at_first)
        train(policy)
        assert push(sync, policy, rollout, 1)
