"""The Accelerate context manager pushes once for each step that really changed the weights, with the final weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator

from tests.unit import accelerate_cases as cases
from tests.unit.recording_sync import RecordingSynchronizer, SquaredOutput, Truth, assert_pushed, recorder
from twinkle_callbacks.accelerate import WeightSync
from twinkle_callbacks.errors import ConfigError


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RecordingSynchronizer]]:
    fake = recorder()
    monkeypatch.setattr("twinkle_callbacks.accelerate.WeightSynchronizer", fake)
    yield fake
    cases.reset_accelerate()


@pytest.mark.parametrize("case", cases.TABLE, ids=str)
def test_pushes_the_final_weights_of_each_real_step(case: cases.Case, fake: type[RecordingSynchronizer]) -> None:
    net = SquaredOutput()
    loop, truth, stepped = case.make(net), Truth(net), []
    torch.manual_seed(1)
    with WeightSync(loop.accelerator, loop.model, loop.prepared):
        for index in loop.run(torch.randn(2 * case.batches, 4)):
            if truth.look():
                stepped.append(index)
            assert len(fake.made[0].pushes) == len(stepped) + 1, "the push has to come before `step` returns"
    assert tuple(stepped) == case.stepped
    assert_pushed(fake.made[0], truth, steps=len(case.stepped))


def test_one_skipped_optimizer_of_two_still_pushes_once(fake: type[RecordingSynchronizer]) -> None:
    accelerator = cases.amp_accelerator()
    net = SquaredOutput()
    loop, truth = cases.Loop(net, cases.two_sgd, accelerator), Truth(net)
    with WeightSync(accelerator, loop.model, loop.prepared):
        accelerator.backward(loop.model(torch.ones(2, 4)))
        next(iter(net.parameters())).grad.fill_(float("inf"))
        for each in loop.prepared:
            each.step()
        truth.look()
    assert [each.step_was_skipped for each in loop.prepared] == [True, False]
    assert_pushed(fake.made[0], truth, steps=1)


class ActorCritic(torch.nn.Module):
    """A policy, and a critic with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.critic = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.policy(batch).square().mean() + self.critic(batch).square().mean()


def test_a_skipped_step_of_the_policy_pushes_nothing_although_the_critic_steps(
    fake: type[RecordingSynchronizer],
) -> None:
    accelerator, net = cases.amp_accelerator(), ActorCritic()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (net.policy, net.critic)]
    loop = cases.Loop(net, lambda _: optimizers, accelerator)
    with WeightSync(accelerator, loop.model, loop.prepared, module="policy"):
        for overflows in (False, True, False):
            accelerator.backward(loop.model(torch.ones(2, 4)))
            if overflows:
                net.policy.weight.grad[0, 0] = float("inf")
            for each in loop.prepared:
                each.step()
            assert [each.step_was_skipped for each in loop.prepared] == [overflows, False]
            for each in loop.prepared:
                each.zero_grad()
    assert fake.made[0].versions == [0, 1, 2]


def test_an_optimizer_that_is_not_given_pushes_nothing(fake: type[RecordingSynchronizer]) -> None:
    net = SquaredOutput()
    loop, truth = cases.Loop(net, cases.two_sgd, Accelerator(cpu=True)), Truth(net)
    with WeightSync(loop.accelerator, loop.model, loop.prepared[0]):
        loop.accelerator.backward(loop.model(torch.ones(2, 4)))
        loop.prepared[1].step()
        assert fake.made[0].versions == [0]
        loop.prepared[0].step()
        truth.look()
    assert_pushed(fake.made[0], truth, steps=1)


def test_optimizers_that_do_not_step_together_are_refused_before_anything_goes_stale() -> None:
    loop = cases.Loop(SquaredOutput(), cases.two_sgd, Accelerator(cpu=True))
    with WeightSync(loop.accelerator, loop.model, loop.prepared):
        loop.accelerator.backward(loop.model(torch.ones(2, 4)))
        loop.prepared[0].step()
        with pytest.raises(ConfigError, match=r"optimizer 0 steps a second time while optimizers \[1\]"):
            loop.prepared[0].step()


def test_several_steps_on_one_batch_push_each(fake: type[RecordingSynchronizer]) -> None:
    net = SquaredOutput()
    loop, truth = cases.Loop(net, cases.adam, Accelerator(cpu=True)), Truth(net)
    with WeightSync(loop.accelerator, loop.model, *loop.prepared):
        for _ in range(3):
            loop.step(0, torch.ones(2, 4))
            truth.look()
    assert_pushed(fake.made[0], truth, steps=3)


def test_every_n_steps_pushes_every_nth_version(fake: type[RecordingSynchronizer]) -> None:
    loop = cases.Loop(SquaredOutput(), cases.adam, Accelerator(cpu=True))
    with WeightSync(loop.accelerator, loop.model, *loop.prepared, every_n_steps=2) as sync:
        list(loop.run(torch.randn(10, 4)))
        assert fake.made[0].versions == [0, 2, 4]
        sync.push()
        assert fake.made[0].versions == [0, 2, 4, 5]
