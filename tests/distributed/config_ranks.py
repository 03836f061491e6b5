"""One rank of `test_configs_launch`: runs a recipe under one shipped configuration after another, on CPUs.

The recipe, its model and what its framework makes of the configuration are real; the server is not: completions are
random, and a push compares what would be sent with the framework's own full weights.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import recipes.rollout
from recipes import arithmetic
from recipes.config import RecipeConfig
from recipes.rollout import Completion
from tests.distributed import config_shims as shims
from tests.distributed.config_sharding import assert_sharded, full_state_dict
from tests.distributed.launch import ROOT
from tests.unit.recording_sync import RecordingSynchronizer, Weights, same
from twinkle_callbacks.sources import open_source
from twinkle_callbacks.sources.names import select

SMOKE = ROOT / "configs" / "grpo_smoke.yaml"
ON_CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
STEPS = 2
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ANSWERS = {tuple(arithmetic.encode(each.prompt)): each.answer for each in arithmetic.all_problems(9)}


class RandomSampler:
    """In the place of `recipes.rollout.Sampler`. Each of the two shares has its samples, whoever collects it."""

    def __init__(self) -> None:
        peers = WORLD // 2
        self._is_first, self._random = RANK % peers == 0, random.Random(RANK // peers)

    @classmethod
    def of(cls, _: RecipeConfig) -> RandomSampler:
        return cls()

    def sample(self, prompts: Sequence[list[int]], per_prompt: int) -> list[Completion]:
        assert self._is_first, "of ranks that share samples, only the first may draw them"
        return [self._completion(prompt) for prompt in prompts for _ in range(per_prompt)]

    def _completion(self, prompt: list[int]) -> Completion:
        text = self._random.choice([ANSWERS[tuple(prompt)], "??"])
        return Completion(prompt, arithmetic.encode(text), [-2.0] * len(text), text)

    def weight_version(self) -> str:
        return "0"

    def __enter__(self) -> RandomSampler:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def streamed(model: torch.nn.Module, module: str) -> Weights:
    """What a push would send, on rank 0; the others take part and yield nothing."""
    return {name: tensor.clone() for name, tensor in open_source(model, module=module).stream()}


class Comparing(RecordingSynchronizer):
    """Checks, at each push, how the policy is sharded and that what would be sent is bit for bit what it holds."""

    strategy: str
    root: torch.nn.Module | None = None  # what the framework made, where the callback gets another module

    def gather(self) -> Weights:
        root = self.root or self.model
        policy = select(self.model, self.settings.module)
        assert_sharded(self.strategy, root, policy)
        sent, expected = streamed(self.model, self.settings.module), full_state_dict(root, policy)
        if RANK == 0:
            differing = [name for name in expected if name not in sent or not torch.equal(sent[name], expected[name])]
            assert not differing, differing
            assert sent.keys() == expected.keys()
        else:
            assert not sent
        return sent


def run(framework: str, strategy: str, files: Path) -> None:
    recorder = type("Recorder", (Comparing,), {"strategy": strategy})
    settings = [f"model.path={files}/policy", f"output_dir={files}/{framework}_{strategy}", f"steps={STEPS}"]
    {"accelerate": run_accelerate, "lightning": run_lightning}[framework](strategy, recorder, settings)
    (synchronizer,) = recorder.made
    assert synchronizer.closed
    assert synchronizer.versions == list(range(STEPS + 1))
    if RANK == 0:
        weights = [pushed for _, pushed in synchronizer.pushes]
        assert not any(same(before, after) for before, after in pairwise(weights))
        save_file(weights[-1], files / f"{framework}_{strategy}.safetensors")
    print(f"passed {framework}/{strategy}", flush=True)


def run_accelerate(strategy: str, recorder: type[Comparing], settings: list[str]) -> None:
    from recipes import grpo_accelerate
    from twinkle_callbacks import accelerate

    accelerate.WeightSynchronizer = recorder
    shims.become_launched(ROOT / "configs" / "accelerate" / f"{strategy}.yaml")
    grpo_accelerate.train(RecipeConfig.load(SMOKE, settings))


def run_lightning(strategy: str, recorder: type[Comparing], settings: list[str]) -> None:
    from recipes import grpo_lightning
    from twinkle_callbacks import lightning

    class Callback(lightning.WeightSyncCallback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            recorder.root = trainer.strategy.model
            super().on_train_start(trainer, pl_module)

    original, lightning.WeightSyncCallback = lightning.WeightSyncCallback, Callback
    lightning.WeightSynchronizer = recorder
    files = [SMOKE, ROOT / "configs" / "lightning" / f"{strategy}.yaml"]
    try:
        grpo_lightning.train(RecipeConfig.load(files, [*settings, *ON_CPU]))
    finally:
        lightning.WeightSyncCallback = original


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    recipes.rollout.Sampler = RandomSampler
    shims.allow_cpu()
    for case in os.environ["CASES"].split(","):
        run(*case.split("/"), Path(os.environ["FILES"]))
    dist.barrier()
    dist.destroy_process_group()
