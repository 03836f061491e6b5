"""The LightningModule behind `grpo_lightning`: each training step samples, scores, and returns the GRPO loss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from typing_extensions import override

from recipes import grpo, parallel
from recipes.config import RecipeConfig
from recipes.experience import Collector, Experience
from recipes.history import History
from recipes.policy import load_policy
from recipes.rollout import Sampler
from twinkle_callbacks.lightning import WeightSyncCallback


class GRPOModule(pl.LightningModule):
    """Trains `self.policy` on samples of the rollouts. A batch is a step's number: the prompts follow from it.

    Args:
        config: the run.
        sampler: draws from the rollouts.
        sync: the callback that keeps them on the newest weights; only asked for its last report.
    """

    history: History

    def __init__(self, config: RecipeConfig, sampler: Sampler, sync: WeightSyncCallback) -> None:
        super().__init__()
        self.policy = load_policy(config.model.path, config.adapter)
        self._config, self._sampler, self._sync = config, sampler, sync

    @override
    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or any(isinstance(each, DTensor) for each in self.policy.parameters()):
            return  # another strategy, which does it all by itself; or done before
        self.policy.to(self.trainer.strategy.root_device)
        if mesh["tensor_parallel"].size() > 1:
            parallel.split_layers(self.policy, mesh["tensor_parallel"])
        parallel.shard(self.policy, mesh["data_parallel"], self._config.trainer.precision)

    @override
    def on_fit_start(self) -> None:
        share = {"rank": self.global_rank, "world_size": self.trainer.world_size}
        if (mesh := self.device_mesh) is not None:
            share = parallel.share(mesh["data_parallel"], mesh["tensor_parallel"])
        self._collector = Collector(self._config, self._sampler, device=self.device, **share)
        self.history = History(
            self._config.output_dir,
            self._config.steps,
            lambda: self._sync.report,
            is_writer=self.trainer.is_global_zero,
        )

    @override
    def training_step(self, step: int, batch_idx: int) -> torch.Tensor:
        experience = self._collector.collect(step)
        logprobs = grpo.token_logprobs(self.policy, experience.batch.tokens)
        self._record(step, experience, logprobs)
        return grpo.policy_loss(logprobs, experience.batch)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        root = self.trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel):  # alone knows the norm over all shards
            root.clip_grad_norm_(self._config.optimizer.grad_clip)

    @override
    def on_train_end(self) -> None:
        # After the callbacks' own `on_train_end`, so the rollouts hold the final weights.
        experience = self._collector.collect(self._config.steps)
        with torch.no_grad():
            self._record(self._config.steps, experience, grpo.token_logprobs(self.policy, experience.batch.tokens))

    @override
    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, schedule = grpo.make_optimizer(self.policy, self._config.optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _record(self, step: int, experience: Experience, logprobs: torch.Tensor) -> None:
        values = grpo.step_metrics(logprobs, experience.batch)
        reward, gap = self.trainer.strategy.reduce(values, reduce_op="mean").tolist()
        for logger in self.trainer.loggers:
            logger.log_metrics({"reward": reward, "logprob_gap": gap}, step=step)
        self.history.add(step, reward, gap, experience)
