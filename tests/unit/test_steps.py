"""What counts as a step that changed the policy."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.unit.recording_sync import SquaredOutput
from twinkle_callbacks.steps import StepWatch


@pytest.fixture
def net() -> SquaredOutput:
    return SquaredOutput()


@pytest.fixture
def watch(net: SquaredOutput) -> Iterator[StepWatch]:
    watch = StepWatch(net.parameters())
    yield watch
    watch.close()


def sgd(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def backward(net: SquaredOutput) -> None:
    net(torch.ones(2, 4)).backward()


def test_nothing_is_known_before_a_step_and_after_it_was_taken(net: SquaredOutput, watch: StepWatch) -> None:
    assert watch.take() is None
    backward(net)
    sgd(net).step()
    assert watch.take() is True
    assert watch.take() is None


def test_a_step_without_gradients_changes_nothing(net: SquaredOutput, watch: StepWatch) -> None:
    sgd(net).step()
    assert watch.take() is False


def test_one_changing_step_among_others_counts(net: SquaredOutput, watch: StepWatch) -> None:
    backward(net)
    sgd(net).step()
    net.zero_grad()
    sgd(net).step()
    assert watch.take() is True


def test_a_fused_step_that_found_infinities_changes_nothing(net: SquaredOutput, watch: StepWatch) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    before = net.a.weight.clone()
    scaler.scale(net(torch.ones(2, 4)) * float("inf")).backward()
    scaler.step(optimizer)
    assert torch.equal(net.a.weight, before)
    assert watch.take() is False


def test_steps_of_other_modules_are_not_seen(watch: StepWatch) -> None:
    other = SquaredOutput()
    backward(other)
    sgd(other).step()
    assert watch.take() is None


def test_any_step_of_a_partitioned_optimizer_counts(net: SquaredOutput) -> None:
    """As in ZeRO: the inner optimizer steps flat partitions, which are none of the model's parameters."""
    partition = torch.nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([partition], lr=0.1)
    watch = StepWatch(net.parameters(), [SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))])
    inner.step()
    assert watch.take() is True
    watch.close()


def test_a_rank_with_empty_shards_agrees_with_the_others() -> None:
    shard = torch.nn.Parameter(torch.zeros(0))
    watch = StepWatch([shard])
    torch.optim.SGD([shard], lr=0.1).step()
    assert watch.take() is True
    watch.close()


def test_a_closed_watch_sees_nothing(net: SquaredOutput, watch: StepWatch) -> None:
    watch.close()
    watch.close()
    backward(net)
    sgd(net).step()
    assert watch.take() is None
