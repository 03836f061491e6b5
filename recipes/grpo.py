"""GRPO on policy: group-relative advantages and the policy gradient. Pure functions that both recipes share.

The samples come from the weights that are being trained (that is what the weight sync is for), so the importance ratio
is 1 and there is nothing to clip. `logprob_gap` measures how true that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.arithmetic import PAD_ID
from recipes.config import OptimizerConfig
from recipes.rollout import Completion


@dataclass(frozen=True)
class Batch:
    """Sampled completions as tensors; `samples` = prompts * group size, a prompt's samples side by side.

    Attributes:
        tokens: prompt and completion, padded at the right: int64 (samples, length).
        mask: true where `tokens[:, 1:]` was sampled: bool (samples, length - 1).
        server_logprobs: natural logarithms that the rollout reported, zero where not sampled: float32, as `mask`.
        advantages: float32 (samples,).
        rewards: float32 (samples,).
    """

    tokens: Tensor
    mask: Tensor
    server_logprobs: Tensor
    advantages: Tensor
    rewards: Tensor


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards (samples,) relative to their own group: mean 0, deviation 1; all zero where a group agrees."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).view(-1)


def make_batch(
    completions: Sequence[Completion], rewards: Sequence[float], group_size: int, device: torch.device | str = "cpu"
) -> Batch:
    """Pads completions, ordered by group, to the longest of them."""
    length = max(len(c.prompt_ids) + len(c.token_ids) for c in completions)
    tokens = torch.full((len(completions), length), PAD_ID)
    mask = torch.zeros(len(completions), length - 1, dtype=torch.bool)
    logprobs = torch.zeros(len(completions), length - 1)
    for row, completion in enumerate(completions):
        start, end = len(completion.prompt_ids), len(completion.prompt_ids) + len(completion.token_ids)
        tokens[row, :start] = torch.tensor(completion.prompt_ids)
        tokens[row, start:end] = torch.tensor(completion.token_ids)
        mask[row, start - 1 : end - 1] = True
        logprobs[row, start - 1 : end - 1] = torch.tensor(completion.logprobs)
    scores = torch.tensor(rewards, dtype=torch.float32)
    return Batch(
        tokens=tokens.to(device),
        mask=mask.to(device),
        server_logprobs=logprobs.to(device),
        advantages=group_advantages(scores, group_size).to(device),
        rewards=scores.to(device),
    )


def token_logprobs(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logprobs of `tokens[:, 1:]` under the model: float32 (samples, length - 1). Keep the padding at the right."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def policy_loss(logprobs: Tensor, batch: Batch) -> Tensor:
    """Mean over the sampled tokens of -advantage * logprob; a scalar."""
    weighted = batch.advantages[:, None] * logprobs * batch.mask
    return -weighted.sum() / batch.mask.sum()


def logprob_gap(logprobs: Tensor, batch: Batch) -> Tensor:
    """Mean absolute difference, per sampled token, between the trainer's logprobs and the rollout's; a scalar."""
    difference = (logprobs.detach() - batch.server_logprobs).abs() * batch.mask
    return difference.sum() / batch.mask.sum()


def step_metrics(logprobs: Tensor, batch: Batch) -> Tensor:
    """Mean reward and logprob gap of this rank's share: float32 (2,), to be averaged over the ranks."""
    return torch.stack([batch.rewards.mean(), logprob_gap(logprobs, batch)])


def make_optimizer(
    model: nn.Module, config: OptimizerConfig
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer and its learning rate schedule, to be advanced after each optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, config.beta2), weight_decay=0.0)
    rising = max(1, config.lr_warmup_steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rising))
