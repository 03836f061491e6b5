"""A policy in training under each kind of sharding, as two or more processes on CPU hold it.

`shard(kind, policy)` asserts that the sharding is really the one named: several frameworks fall back to another without
a word where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.sources_fsdp1 import fsdp1
from tests.distributed.sources_trained import Tensors, Trained, layers

# Replicated


class _Replicated(Trained):
    def full(self) -> Tensors:
        return {name: tensor.detach().clone() for name, tensor in self.policy.state_dict().items()}


def ddp(policy: nn.Module) -> Trained:
    model = DistributedDataParallel(policy)
    assert dist.get_world_size(model.process_group) > 1
    return _Replicated(policy, model)


# DTensors


def fsdp2(policy: nn.Module) -> Trained:
    return _fully_sharded(policy, init_device_mesh("cpu", (dist.get_world_size(),)))


def hsdp(policy: nn.Module) -> Trained:
    """Copies over the first dimension of the mesh, shards over the second, which has two ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    return _fully_sharded(policy, mesh)


def tp(policy: nn.Module) -> Trained:
    _parallelize(policy, init_device_mesh("cpu", (dist.get_world_size(),)))
    return Trained(policy, policy)


def fsdp2_tp(policy: nn.Module) -> Trained:
    """Tensor parallelism over two neighbours, FSDP2 over the pairs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    _parallelize(policy, mesh["tp"])
    return _fully_sharded(policy, mesh["dp"])


def _fully_sharded(policy: nn.Module, mesh: Any) -> Trained:
    for layer in layers(policy):
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    for name, parameter in policy.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is no DTensor"
        assert parameter.to_local().numel() < parameter.numel(), f"{name} is not cut"
    return Trained(policy, policy)


COLWISE = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
ROWWISE = {"o_proj", "down_proj"}


def _parallelize(policy: nn.Module, mesh: Any) -> None:
    """Attention and MLP, as transformers' own plans have it; LoRA's matrices where the layer they adapt is cut."""
    plan: dict[str, Any] = {}
    for path, module in policy.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parts = set(path.split("."))
        if parts & COLWISE and "lora_A" not in parts:
            plan[path] = ColwiseParallel()
        elif parts & ROWWISE and "lora_B" not in parts:
            plan[path] = RowwiseParallel()
    parallelize_module(policy, mesh, plan)
    weights = [policy.get_submodule(path).weight for path in plan]
    assert weights, "the plan fits nothing"
    assert all(isinstance(w, DTensor) and w.to_local().numel() * mesh.size() == w.numel() for w in weights)


# DeepSpeed


class _Zero(Trained):
    def __init__(self, policy: nn.Module, stage: int, half: bool = False, **settings: int) -> None:
        import deepspeed

        super().__init__(policy, policy)
        self.model, *_ = deepspeed.initialize(
            model=policy,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "steps_per_print": 10**9,
                "zero_optimization": {"stage": stage, **settings},
                "bf16": {"enabled": half},
            },
        )
        assert self.model.zero_optimization_stage() == stage
        assert dist.get_world_size(self.model.data_parallel_group) > 1

    def step(self, tokens: torch.Tensor) -> None:
        self.model.backward(self.model(input_ids=tokens, labels=tokens).loss)
        self.model.step()

    def full(self) -> Tensors:
        import deepspeed

        full = {name: tensor.detach().clone() for name, tensor in self.policy.named_buffers()}
        for name, parameter in self.policy.named_parameters(remove_duplicate=False):
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):
                    full[name] = parameter.detach().clone()
            else:
                full[name] = parameter.detach().clone()
        return full

    def held(self) -> Tensors:
        parts = {
            f"part of {name}": p.ds_tensor.detach() for name, p in self.policy.named_parameters() if hasattr(p, "ds_id")
        }
        return parts | super().held()

    def optimizer_state(self) -> Tensors:
        zero = self.model.optimizer
        masters = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        return super().optimizer_state() | {
            f"master {number}": master.detach() for number, master in enumerate(masters)
        }


def zero(policy: nn.Module, *, stage: int) -> Trained:
    return _Zero(policy, stage)


def zero3(policy: nn.Module, *, persistence_threshold: int | None = 0, half: bool = False) -> Trained:
    """Shards by ZeRO-3, which holds parameters in bfloat16 and masters beside them if `half`.

    With a threshold, in elements, smaller parameters stay in full on every rank; None is DeepSpeed's default.
    """
    settings = {} if persistence_threshold is None else {"stage3_param_persistence_threshold": persistence_threshold}
    trained = _Zero(policy, 3, half, **settings)
    for name, parameter in policy.named_parameters():
        cut = parameter.ds_tensor.numel() * dist.get_world_size() - parameter.ds_numel
        assert 0 <= cut < dist.get_world_size(), f"{name} is not partitioned"
        assert not half or parameter.ds_tensor.dtype == torch.bfloat16, name
        assert parameter.ds_persist == (parameter.ds_numel <= (100_000 if persistence_threshold is None else 0)), name
    return trained


KINDS: dict[str, Callable[[Any], Trained]] = {
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp1_flat": lambda policy: fsdp1(policy, use_orig_params=False),
    "fsdp1_no_shard": lambda policy: fsdp1(policy, strategy="NO_SHARD"),
    "fsdp1_grad_op": lambda policy: fsdp1(policy, strategy="SHARD_GRAD_OP"),
    "fsdp1_hybrid": lambda policy: fsdp1(policy, strategy="HYBRID_SHARD"),
    "fsdp1_mixed_precision": lambda policy: fsdp1(policy, half=True),
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tp": tp,
    "fsdp2_tp": fsdp2_tp,
    "zero1": lambda policy: zero(policy, stage=1),
    "zero2": lambda policy: zero(policy, stage=2),
    "zero3": zero3,
    "zero3_bfloat16": lambda policy: zero3(policy, half=True),
    "zero3_persistent": lambda policy: zero3(policy, persistence_threshold=None),
}


def shard(kind: str, policy: nn.Module) -> Trained:
    return KINDS[kind](policy)
