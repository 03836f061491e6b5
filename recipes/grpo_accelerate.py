"""GRPO as a raw Accelerate loop, sampled from a vLLM server that `WeightSync` keeps on the newest weights.

    python -m recipes.prepare --config configs/grpo_arithmetic.yaml
    twinkle-callbacks serve runs/policy --dtype float32 --max-model-len 64 --enforce-eager --kv-cache-memory-bytes 64M
    python -m recipes.grpo_accelerate --config configs/grpo_arithmetic.yaml steps=100

Several GPUs: `accelerate launch --config_file configs/accelerate/fsdp2.yaml -m recipes.grpo_accelerate --config ...`;
each samples its share. The folder configs/accelerate has a file for each way to shard.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recipes import cli
from recipes.config import RecipeConfig

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from recipes.grpo import Batch
    from recipes.history import History


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the configuration says and prints what came of it."""
    return cli.run("GRPO with Accelerate on a synced vLLM server.", argv, lambda config: train(config).conclude())


def train(config: RecipeConfig) -> History:
    """Trains the policy of `config.model.path` against the running servers of `config.sync.rollouts`."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from recipes import grpo
    from recipes.experience import Collector
    from recipes.history import History
    from recipes.rollout import Sampler
    from twinkle_callbacks.accelerate import WeightSync

    accelerator = Accelerator()
    set_seed(config.seed)
    model, share = _load(accelerator, config)
    optimizer, schedule = grpo.make_optimizer(model, config.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    with (
        Sampler.of(config) as sampler,
        WeightSync(accelerator, model, optimizer, **config.sync_options()) as sync,
    ):
        collector = Collector(config, sampler, device=accelerator.device, **share)
        history = History(config.output_dir, config.steps, lambda: sync.report, is_writer=accelerator.is_main_process)
        for step in range(config.steps):
            experience = collector.collect(step)
            logprobs = grpo.token_logprobs(model, experience.batch.tokens)
            history.add(step, *_means(accelerator, logprobs, experience.batch), experience)
            accelerator.backward(grpo.policy_loss(logprobs, experience.batch))
            accelerator.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
            optimizer.step()  # pushes the new weights before it returns
            optimizer.zero_grad()
            schedule.step()
        experience = collector.collect(config.steps)
        with torch.no_grad():
            logprobs = grpo.token_logprobs(model, experience.batch.tokens)
        history.add(config.steps, *_means(accelerator, logprobs, experience.batch), experience)
    accelerator.end_training()
    return history


def _load(accelerator: Accelerator, config: RecipeConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The policy, ready for `accelerator.prepare`, and which share of the samples this rank collects."""
    from recipes import parallel
    from recipes.policy import load_policy

    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    if (deepspeed := accelerator.state.deepspeed_plugin) is not None:  # has no data loader to see it from
        samples = config.data.prompts_per_step * config.rollouts.samples_per_prompt // accelerator.num_processes
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = samples
    policy = load_policy(config.model.path, config.adapter)
    if (layout := accelerator.parallelism_config) is not None and layout.tp_enabled:
        mesh = accelerator.torch_device_mesh
        parallel.split_layers(policy.to(accelerator.device), mesh["tp"])
        share = parallel.share(mesh["dp_shard"], mesh["tp"])
        # What accelerate 1.15 does here itself, for parameters that `split_layers` has done already, imports a class
        # that transformers 5.19 has not:
        # https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/accelerator.py#L1618
        # Until accelerate works without `transformers.integrations.tensor_parallel.ReplicateParallel`.
        accelerator._prepare_tp = lambda *prepared: prepared
    return policy, share


def _means(accelerator: Accelerator, logprobs: torch.Tensor, batch: Batch) -> tuple[float, float]:
    from recipes.grpo import step_metrics

    reward, gap = accelerator.reduce(step_metrics(logprobs, batch), reduction="mean").tolist()
    return reward, gap


if __name__ == "__main__":
    sys.exit(main())
