"""Two real processes: every rank pushes at the same steps, and what they gather are the final weights of that step.

Run as a script, this file is one rank. The fake at the seam gathers like the real synchronizer, so a rank that pushed
alone would hang until the test's deadline.
"""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from tests.distributed.launch import run_ranks
from tests.tiny_models import VOCAB, build
from tests.unit.recording_sync import RecordingSynchronizer, Weights, same
from twinkle_callbacks.sources import open_source

WORLD, BATCHES = 2, 5


# The test's side


@pytest.mark.parametrize(
    "case", ["lightning_ddp", "lightning_fsdp1", "lightning_fsdp2", "accelerate_ddp", "accelerate_fsdp2", "trainer_ddp"]
)
def test_all_ranks_push_the_final_weights_of_each_real_step(case: str) -> None:
    first, second = (pushed(log) for log in run_ranks(Path(__file__), WORLD, 240, {"CASE": case}))
    assert [line.split()[0] for line in first] == ["0", "1", "2", "3"], "5 batches, accumulated by 2, are 3 steps"
    assert first == second


@pytest.mark.parametrize("case", ["overflow", "overflow_fused"])
def test_an_overflow_in_one_ranks_shard_is_skipped_by_all(case: str) -> None:
    first, second = (pushed(log) for log in run_ranks(Path(__file__), WORLD, 240, {"CASE": case}))
    assert [line.split()[0] for line in first] == ["0", "1", "2"], "3 steps, the second of which overflows"
    assert first == second


def pushed(log: str) -> list[str]:
    return [line.removeprefix("pushed ") for line in log.splitlines() if line.startswith("pushed ")]


# A rank's side


class GatheringSynchronizer(RecordingSynchronizer):
    """Copies what a push would send, gathered from all ranks."""

    def gather(self) -> Weights:
        return gathered(self.model, self.settings.module)


def gathered(model: torch.nn.Module, module: str = "policy") -> Weights:
    """What rank 0 streams, on every rank, so that each can tell a real step from none."""
    weights = [{name: tensor.clone() for name, tensor in open_source(model, module=module).stream()}]
    dist.broadcast_object_list(weights)
    return weights[0]


class WithLoss(torch.nn.Module):
    """A language model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = build("qwen3").train()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.policy(input_ids=ids, labels=ids).loss


class Truth:
    """Gathers by itself after each batch and keeps the weights that differ from the ones before."""

    def __init__(self, model: torch.nn.Module, module: str = "policy") -> None:
        self.model, self.module = model, module
        self.changes = [gathered(model, module)]

    def look(self) -> None:
        now = gathered(self.model, self.module)
        if not same(now, self.changes[-1]):
            self.changes.append(now)

    def compare(self) -> None:
        (synchronizer,) = GatheringSynchronizer.made
        assert synchronizer.closed
        assert len(synchronizer.pushes) == len(self.changes), (synchronizer.versions, len(self.changes))
        for (version, weights), expected in zip(synchronizer.pushes, self.changes, strict=True):
            assert same(weights, expected), f"version {version}"
            digest = hashlib.sha256(b"".join(bytes(weights[name].numpy()) for name in sorted(weights)))
            print("pushed", version, digest.hexdigest(), flush=True)


def data(batches: int = BATCHES) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2 * WORLD * batches, 8), generator=torch.Generator().manual_seed(0))


def is_sharded(model: torch.nn.Module) -> bool:
    sharded = {isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters()}
    assert len(sharded) == 1, "some parameters are sharded and some are not"
    return sharded.pop()


def run_lightning(strategy: str) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch import strategies
    from lightning.pytorch.strategies import ModelParallelStrategy

    from tests.distributed.config_shims import allow_cpu
    from tests.unit import lightning_cases as cases
    from twinkle_callbacks import lightning

    lightning.WeightSynchronizer = GatheringSynchronizer

    class Module(cases.Auto):
        def __init__(self) -> None:
            super().__init__(WithLoss(), cases.adam)

        def configure_model(self) -> None:
            if strategy == "fsdp2":
                mesh = self.device_mesh["data_parallel"]
                for layer in self.net.policy.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.net, mesh=mesh)

    class Watcher(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            assert isinstance(trainer.model, DistributedDataParallel) == (strategy == "ddp")
            if strategy == "fsdp1":
                assert isinstance(trainer.model, FullyShardedDataParallel)
                assert any("embed_tokens" in name for name in trainer.model._handle.flat_param._fqns), (
                    "in the outer unit"
                )
            else:
                assert is_sharded(module) == (strategy == "fsdp2")
            self.truth = Truth(trainer.model, "net.policy")

        def on_train_batch_end(self, *args: Any) -> None:
            self.truth.look()

    watcher = Watcher()
    chosen: Any = "ddp"
    if strategy == "fsdp1":
        allow_cpu()
        chosen = strategies.FSDPStrategy(auto_wrap_policy={Qwen3DecoderLayer})
    elif strategy == "fsdp2":
        chosen = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    callback = lightning.WeightSyncCallback(module="net.policy")
    trainer = cases.trainer(callback, watcher, strategy=chosen, devices=WORLD, accumulate_grad_batches=2)
    trainer.fit(Module(), DataLoader(TensorDataset(data()), batch_size=2))
    watcher.truth.compare()


def fsdp2_accelerator() -> Accelerator:
    """Accelerate shards on GPUs only; a state that claims to be one of several makes it shard on the CPU too."""
    state = PartialState(cpu=True)
    state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Qwen3DecoderLayer"]
    )
    return Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=2)


def run_accelerate(strategy: str) -> None:
    from tests.unit import accelerate_cases as cases
    from twinkle_callbacks import accelerate

    accelerate.WeightSynchronizer = GatheringSynchronizer
    accelerator = fsdp2_accelerator() if strategy == "fsdp2" else Accelerator(cpu=True, gradient_accumulation_steps=2)
    loop = cases.Loop(WithLoss(), cases.adam, accelerator)
    assert isinstance(loop.model, DistributedDataParallel) == (strategy == "ddp")
    assert is_sharded(loop.model) == (strategy == "fsdp2")
    truth = Truth(loop.model)
    with accelerate.WeightSync(accelerator, loop.model, loop.prepared, module="policy"):
        for _ in loop.run(data()):
            truth.look()
    truth.compare()


def run_overflow(fused: bool) -> None:
    from tests.unit import accelerate_cases as cases
    from twinkle_callbacks import accelerate

    accelerate.WeightSynchronizer = GatheringSynchronizer
    accelerator = fsdp2_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loop = cases.Loop(WithLoss(), cases.fused_adam if fused else cases.adam, accelerator)
    assert is_sharded(loop.model)
    truth, (optimizer,) = Truth(loop.model), loop.prepared
    with accelerate.WeightSync(accelerator, loop.model, optimizer, module="policy"):
        for index in range(3):
            accelerator.backward(loop.model(data(1)[:2]))
            if index == 1 and dist.get_rank() == 1:
                next(iter(loop.model.parameters())).grad.to_local()[0] = float("inf")
            optimizer.step()
            optimizer.zero_grad()
            truth.look()
    truth.compare()


def run_trainer() -> None:
    from transformers import TrainerCallback

    from tests.unit import transformers_cases as cases
    from twinkle_callbacks import transformers

    transformers.WeightSynchronizer = GatheringSynchronizer
    model = cases.Model(WithLoss())

    class Watcher(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            assert isinstance(trainer.model_wrapped, DistributedDataParallel)
            self.truth = Truth(model.net)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.truth.look()

    watcher = Watcher()
    callbacks = [transformers.WeightSyncCallback(module="net.policy"), watcher]
    with tempfile.TemporaryDirectory() as folder:
        trainer = cases.make_trainer(
            Path(folder), model, cases.adam, data(), callbacks, gradient_accumulation_steps=2, ddp_backend="gloo"
        )
        trainer.train()
    watcher.truth.compare()


CASES: dict[str, Callable[[], None]] = {
    "lightning_ddp": lambda: run_lightning("ddp"),
    "lightning_fsdp1": lambda: run_lightning("fsdp1"),
    "lightning_fsdp2": lambda: run_lightning("fsdp2"),
    "accelerate_ddp": lambda: run_accelerate("ddp"),
    "accelerate_fsdp2": lambda: run_accelerate("fsdp2"),
    "trainer_ddp": run_trainer,
    "overflow": lambda: run_overflow(fused=False),
    "overflow_fused": lambda: run_overflow(fused=True),
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    CASES[os.environ["CASE"]]()
    gc.collect()  # a DDP that outlives its group may hang, see tests/vllm/sharded_trainer.py
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
