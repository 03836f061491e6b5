"""Each shipped configuration, run by its recipe in real processes, shards as it says and pushes what the policy holds.

The ranks are in `config_ranks.py`. Two processes are enough for all but FSDP2 with tensor parallelism, which needs four
for both of its dimensions to mean something.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.config import ModelConfig
from recipes.policy import build_policy, save_policy
from tests.distributed.launch import ROOT, run_ranks

RANKS = Path(__file__).with_name("config_ranks.py")
FRAMEWORKS = ("lightning", "accelerate")  # whose ZeRO-3 comes last: it makes `from_pretrained` shard from then on
TWO = ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
FOUR = ("fsdp2_tp",)

Weights = dict[str, torch.Tensor]


class Runs:
    """Runs the configurations on first use, all of one world size in one launch."""

    def __init__(self, files: Path) -> None:
        self.files = files
        self.start = build_policy(0, ModelConfig(layers=2))
        save_policy(self.start, files / "policy")
        self.launch = cache(self._launch)

    def _launch(self, strategies: tuple[str, ...], world_size: int) -> list[list[str]]:
        cases = ",".join(f"{framework}/{strategy}" for framework in FRAMEWORKS for strategy in strategies)
        env = {"CASES": cases, "FILES": str(self.files), "DS_ACCELERATOR": "cpu"}
        logs = run_ranks(RANKS, world_size, 180, env)
        return [[line for line in log.splitlines() if line.startswith("passed ")] for log in logs]

    def passed(self, framework: str, strategy: str) -> list[bool]:
        """For each rank, whether it ran the configuration to its end, with every check on the way."""
        logs = self.launch(*((TWO, 2) if strategy in TWO else (FOUR, 4)))
        return [f"passed {framework}/{strategy}" in lines for lines in logs]

    def weights(self, framework: str, strategy: str) -> Weights:
        """What the last push of the run would have sent."""
        assert all(self.passed(framework, strategy))
        return load_file(self.files / f"{framework}_{strategy}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("strategy", TWO + FOUR)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_each_shipped_config_shards_as_it_says_and_pushes_whole_tensors(
    runs: Runs, framework: str, strategy: str
) -> None:
    passed = runs.passed(framework, strategy)
    assert passed == [True] * (4 if strategy in FOUR else 2)


@pytest.mark.parametrize("strategy", [strategy for strategy in TWO + FOUR if strategy != "ddp"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_each_shipped_config_trains_as_ddp_does(runs: Runs, framework: str, strategy: str) -> None:
    """Two steps from the same samples: wrong gradients of a shard would turn many of Adam's first steps around."""
    expected, found = runs.weights(framework, "ddp"), runs.weights(framework, strategy)
    assert found.keys() == expected.keys()
    for name, before in runs.start.state_dict().items():
        step = (expected[name] - before).norm()
        assert step > 0, name
        assert (found[name] - expected[name]).norm() < 1e-3 * step, name


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_shipped_config_is_run(framework: str) -> None:
    assert {file.stem for file in (ROOT / "configs" / framework).iterdir()} == set(TWO + FOUR)
