"""GRPO with Lightning, sampled from a vLLM server that one callback keeps on the newest weights.

Run in the checkout:

    python -m recipes.prepare --config configs/grpo_arithmetic.yaml
    twinkle-callbacks serve runs/policy --dtype float32 --max-model-len 64 --enforce-eager --kv-cache-memory-bytes 64M
    python -m recipes.grpo_lightning --config configs/grpo_arithmetic.yaml steps=100

Several GPUs: add a `--config` of configs/lightning/, which names the strategy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes import cli
from recipes.config import RecipeConfig

if TYPE_CHECKING:
    from recipes.history import History


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the configuration says and prints what came of it."""
    return cli.run("GRPO with Lightning on a synced vLLM server.", argv, lambda config: train(config).conclude())


def train(config: RecipeConfig) -> History:
    """Trains the policy of `config.model.path` against the running servers of `config.sync.rollouts`."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    from recipes import parallel
    from recipes.lightning_module import GRPOModule
    from recipes.rollout import Sampler
    from twinkle_callbacks.lightning import WeightSyncCallback

    pl.seed_everything(config.seed, verbose=False)
    sync = WeightSyncCallback(**config.sync_options(module="policy"))
    trainer = pl.Trainer(
        callbacks=[sync],
        max_steps=config.steps,
        logger=CSVLogger(config.output_dir),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **parallel.trainer_options(config),
    )
    with Sampler.of(config) as sampler:
        module = GRPOModule(config, sampler, sync)
        trainer.fit(module, train_dataloaders=range(config.steps))
    return module.history


if __name__ == "__main__":
    sys.exit(main())
