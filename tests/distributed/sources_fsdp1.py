"""A policy in training under FSDP1, with its units asserted to be cut as named."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import CustomPolicy
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.distributed.sources_trained import Tensors, Trained, layers


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
    return name.replace("_fsdp_wrapped_module.", "")


def fsdp1(
    policy: nn.Module, *, use_orig_params: bool = True, strategy: str = "FULL_SHARD", half: bool = False
) -> Trained:
    """Shards by FSDP1; `half` computes in bfloat16, with masters in the policy's own dtype."""

    def wraps(module: nn.Module) -> bool:
        # Flat units may not mix what trains with what is frozen, so leaves that train are units, as in PEFT's policy.
        leaf = not use_orig_params and _is_adapted(policy) and not list(module.children())
        trains = leaf and getattr(module, "weight", None) is not None and module.weight.requires_grad
        return isinstance(module, GradientCheckpointingLayer) or trains

    options: dict[str, Any] = {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)} if half else {}
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
