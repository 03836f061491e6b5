"""A policy in training under each kind of sharding, as two or more processes on CPU hold it.

`shard(kind, policy)` asserts that the sharding is really the one named: several frameworks fall back to another without
a word where there is no GPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

Tensors = dict[str, torch.Tensor]
_WRAPPERS = ("_fsdp_wrapped_module.",)
LEARNING_RATE = 1e-3


class Trained:
    """A policy in training, wrapped by one framework.

    Attributes:
        policy: the module under the wrappers; has the names of the one that was passed to `shard`.
        model: what the trainer holds, and a source is opened on.
        optimizer: the one that holds the state.
    """

    def __init__(self, policy: nn.Module, model: Any) -> None:
        self.policy, self.model = policy, model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(trained, LEARNING_RATE, foreach=False)

    def step(self, tokens: torch.Tensor) -> None:
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def full(self) -> Tensors:
        """Copies of all parameters in full, tied ones under each name, by the framework's own means. Collective."""
        options = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(self.policy, options=options)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def held(self) -> Tensors:
        """What this rank holds of the parameters and buffers: the memory itself."""
        named = [*self.policy.named_parameters(), *self.policy.named_buffers()]
        return {name: _memory(tensor) for name, tensor in named}

    def optimizer_state(self) -> Tensors:
        """What this rank holds of the optimizer's state: the memory itself."""
        return {
            f"{number}.{key}": _memory(value)
            for number, state in enumerate(self.optimizer.state.values())
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def layers(policy: nn.Module) -> list[nn.Module]:
    return [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]


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


# FSDP1


class _FSDP1(Trained):
    def full(self) -> Tensors:
        full: Tensors = {}
        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
            for path, module in self.model.named_modules(remove_duplicate=False):
                for name in [*_orig_names(module), *module._buffers]:
                    value = getattr(module, name)
                    if value is not None:
                        full[_without_wrappers(f"{path}.{name}" if path else name)] = value.detach().clone()
        return full

    def held(self) -> Tensors:
        flat = {f"flat {number}": unit._handle.flat_param.detach() for number, unit in enumerate(_units(self.model))}
        return flat | {_without_wrappers(name): tensor for name, tensor in super().held().items()}


def _orig_names(module: nn.Module) -> list[str]:
    # Flattened parameters come back as plain attributes for as long as they are summoned.
    names = [name for name in module._parameters if name != "_flat_param"]
    return names + [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]


def _units(model: nn.Module) -> list[Any]:
    found = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    return [unit for unit in found if unit._handle is not None]


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def fsdp1(policy: nn.Module, *, use_orig_params: bool = True, strategy: str = "FULL_SHARD") -> Trained:
    def wraps(module: nn.Module) -> bool:
        # Flat units may not mix what trains with what is frozen: as PEFT's policy does, leaves that train are units.
        leaf = not use_orig_params and _is_adapted(policy) and not list(module.children())
        trains = any(parameter.requires_grad for parameter in module.parameters())
        return isinstance(module, GradientCheckpointingLayer) or (leaf and trains)

    options: dict[str, Any] = {}
    if strategy.startswith("HYBRID"):
        options["device_mesh"] = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CPU is slow, and NO_SHARD deprecated
        model = FullyShardedDataParallel(
            policy,
            auto_wrap_policy=CustomPolicy(wraps),
            device_id=torch.device("cpu"),
            use_orig_params=use_orig_params,
            sharding_strategy=ShardingStrategy[strategy],
            **options,
        )
    units = _units(model)
    assert len(units) > len(layers(policy))
    for unit in units:
        handle, flat = unit._handle, unit._handle.flat_param
        parts = dist.get_world_size(handle.process_group)
        assert handle.uses_sharded_strategy == (strategy != "NO_SHARD")
        if strategy != "NO_SHARD":
            assert parts > 1
            assert flat._sharded_size.numel() * parts - flat._unpadded_unsharded_size.numel() in range(parts)
    return _FSDP1(policy, model)


def _is_adapted(policy: nn.Module) -> bool:
    return any("lora_" in name for name, _ in policy.named_parameters())


# DeepSpeed


class _Zero(Trained):
    def __init__(self, policy: nn.Module, stage: int, **settings: int) -> None:
        import deepspeed

        super().__init__(policy, policy)
        self.model, *_ = deepspeed.initialize(
            model=policy,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "steps_per_print": 10**9,
                "zero_optimization": {"stage": stage, **settings},
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


def zero3(policy: nn.Module, *, persistence_threshold: int | None = 0) -> Trained:
    """With a threshold, in elements, smaller parameters stay in full on every rank; None is DeepSpeed's default."""
    settings = {} if persistence_threshold is None else {"stage3_param_persistence_threshold": persistence_threshold}
    trained = _Zero(policy, 3, **settings)
    for name, parameter in policy.named_parameters():
        cut = parameter.ds_tensor.numel() * dist.get_world_size() - parameter.ds_numel
        assert 0 <= cut < dist.get_world_size(), f"{name} is not partitioned"
        assert parameter.ds_persist == (parameter.ds_numel <= (100_000 if persistence_threshold is None else 0)), name
    return trained


KINDS: dict[str, Callable[[Any], Trained]] = {
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp1_flat": lambda policy: fsdp1(policy, use_orig_params=False),
    "fsdp1_no_shard": lambda policy: fsdp1(policy, strategy="NO_SHARD"),
    "fsdp1_grad_op": lambda policy: fsdp1(policy, strategy="SHARD_GRAD_OP"),
    "fsdp1_hybrid": lambda policy: fsdp1(policy, strategy="HYBRID_SHARD"),
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tp": tp,
    "fsdp2_tp": fsdp2_tp,
    "zero1": lambda policy: zero(policy, stage=1),
    "zero2": lambda policy: zero(policy, stage=2),
    "zero3": zero3,
    "zero3_persistent": lambda policy: zero3(policy, persistence_threshold=None),
}


def shard(kind: str, policy: nn.Module) -> Trained:
    return KINDS[kind](policy)
