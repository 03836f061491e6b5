"""One step's experience: draw prompts, sample them from the rollouts, score the samples."""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist

from recipes import arithmetic, grpo
from recipes.config import RecipeConfig
from recipes.rollout import Completion, Sampler
from twinkle_callbacks.errors import ConfigError
from twinkle_callbacks.trainer_group import broadcast


@dataclass(frozen=True)
class Experience:
    """Scored samples, the weight version that the server said it had just before, and the seconds sampling took."""

    batch: grpo.Batch
    server_version: str
    sample_s: float


class Collector:
    """Collects this rank's share of each step. Every trainer rank has one; the shares are disjoint.

    Args:
        config: the run.
        sampler: draws from the rollouts.
        rank: which share.
        world_size: number of shares.
        peers: ranks that have to train on the same share, as tensor parallel ones do; the first samples for all.
        device: where the batches go.
    """

    def __init__(
        self,
        config: RecipeConfig,
        sampler: Sampler,
        *,
        rank: int = 0,
        world_size: int = 1,
        peers: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if config.data.prompts_per_step % world_size:
            raise ConfigError(
                f"data.prompts_per_step={config.data.prompts_per_step} does not divide among {world_size} trainer ranks"
            )
        self._config, self._sampler = config, sampler
        self._share = slice(rank, None, world_size)
        self._peers, self._device = peers, device

    def collect(self, step: int) -> Experience:
        """Samples and scores the prompts of a step."""
        data, group_size = self._config.data, self._config.rollouts.samples_per_prompt
        problems = arithmetic.draw_problems(
            data.prompts_per_step,
            task=arithmetic.TASKS[data.task],
            max_operand=data.max_operand,
            seed=self._config.seed,
            step=step,
        )[self._share]
        version = self._sampler.weight_version()
        started = time.perf_counter()
        completions = self._sample([arithmetic.encode(p.prompt) for p in problems], group_size)
        sample_s = time.perf_counter() - started
        answers = [p.answer for p in problems for _ in range(group_size)]
        reward = arithmetic.REWARDS[self._config.reward.name]
        rewards = [reward(c.text, answer) for c, answer in zip(completions, answers, strict=True)]
        return Experience(grpo.make_batch(completions, rewards, group_size, self._device), version, sample_s)

    def _sample(self, prompts: list[list[int]], group_size: int) -> list[Completion]:
        if self._peers is None:
            return self._sampler.sample(prompts, group_size)
        first = dist.get_global_rank(self._peers, 0)
        mine = msgspec.msgpack.encode(self._sampler.sample(prompts, group_size)) if dist.get_rank() == first else None
        return msgspec.msgpack.decode(broadcast(mine, first, self._peers), type=list[Completion])
