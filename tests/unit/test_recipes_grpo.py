"""The pure part of GRPO: advantages, batches, the loss and the logprob gap."""

from __future__ import annotations

import pytest
import torch

from recipes import arithmetic, grpo
from recipes.config import ModelConfig, OptimizerConfig
from recipes.policy import build_policy
from recipes.rollout import Completion

PROMPT = arithmetic.encode("07+15=")


@pytest.fixture(scope="module")
def policy() -> torch.nn.Module:
    return build_policy(0, ModelConfig(layers=1))


def completion(text: str, logprob: float = -1.0, *, ends: bool = True) -> Completion:
    ids = arithmetic.encode(text) + [arithmetic.EOS_ID] * ends
    return Completion(PROMPT, ids, [logprob] * len(ids), text)


def test_advantages_are_relative_to_the_own_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    advantages = grpo.group_advantages(rewards, group_size=4)
    assert advantages[:4].mean() == pytest.approx(0.0, abs=1e-6)
    assert advantages[:4].std() == pytest.approx(1.0, abs=1e-3)
    assert advantages[0] == advantages[2] > 0 > advantages[1]
    assert advantages[4:].tolist() == [0.0] * 4


def test_batch_pads_ragged_completions_and_masks_what_was_not_sampled() -> None:
    batch = grpo.make_batch([completion("22", -0.5), completion("2", -0.25)], [1.0, 0.0], group_size=2)
    assert batch.tokens.tolist() == [
        [*PROMPT, *arithmetic.encode("22"), arithmetic.EOS_ID],
        [*PROMPT, *arithmetic.encode("2"), arithmetic.EOS_ID, arithmetic.PAD_ID],
    ]
    assert batch.mask.tolist() == [[False] * 5 + [True] * 3, [False] * 5 + [True] * 2 + [False]]
    assert batch.server_logprobs.tolist() == [[0.0] * 5 + [-0.5] * 3, [0.0] * 5 + [-0.25] * 2 + [0.0]]
    assert batch.rewards.tolist() == [1.0, 0.0]


def test_token_logprobs_are_those_of_the_next_token(policy: torch.nn.Module) -> None:
    tokens = torch.tensor([[*PROMPT, *arithmetic.encode("22")], [*PROMPT, *arithmetic.encode("31")]])
    logprobs = grpo.token_logprobs(policy, tokens)
    expected = policy(input_ids=tokens[1:, :-1]).logits.log_softmax(-1)[0, -1, tokens[1, -1]]
    assert logprobs.shape == (2, tokens.shape[1] - 1)
    torch.testing.assert_close(logprobs[1, -1], expected)


def test_padding_at_the_right_changes_no_logprob(policy: torch.nn.Module) -> None:
    alone = grpo.make_batch([completion("2")] * 2, [1.0, 0.0], 2)
    padded = grpo.make_batch([completion("2"), completion("222")], [1.0, 0.0], 2)
    torch.testing.assert_close(
        grpo.token_logprobs(policy, padded.tokens)[0][padded.mask[0]],
        grpo.token_logprobs(policy, alone.tokens)[0][alone.mask[0]],
    )


def test_gap_is_the_mean_over_sampled_tokens_only() -> None:
    batch = grpo.make_batch([completion("22", -0.5), completion("2", -0.25)], [1.0, 0.0], group_size=2)
    assert grpo.logprob_gap(batch.server_logprobs, batch) == 0.0
    shifted = batch.server_logprobs + torch.where(batch.mask, 0.1, 7.0)
    assert grpo.logprob_gap(shifted, batch) == pytest.approx(0.1)
    assert grpo.step_metrics(shifted, batch).tolist() == pytest.approx([0.5, 0.1])


def test_a_step_makes_rewarded_samples_likelier_than_others(policy: torch.nn.Module) -> None:
    trained = build_policy(0, ModelConfig(layers=1))
    optimizer, schedule = grpo.make_optimizer(trained, OptimizerConfig(lr=1e-3, lr_warmup_steps=0))
    batch = grpo.make_batch([completion("22"), completion("31")], [1.0, 0.0], group_size=2)
    grpo.policy_loss(grpo.token_logprobs(trained, batch.tokens), batch).backward()
    optimizer.step()
    schedule.step()
    with torch.no_grad():
        before, after = (
            (grpo.token_logprobs(model, batch.tokens) * batch.mask).sum(dim=1) for model in (policy, trained)
        )
    assert after[0] - after[1] > before[0] - before[1]


def test_learning_rate_rises_over_the_warmup_and_stays(policy: torch.nn.Module) -> None:
    optimizer, schedule = grpo.make_optimizer(policy, OptimizerConfig(lr=1.0, lr_warmup_steps=4))
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
