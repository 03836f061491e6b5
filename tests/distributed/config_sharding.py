"""How a wrapped policy is really sharded, and its full weights by the frameworks' own means."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp._flat_param import HandleShardingStrategy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

Weights = dict[str, torch.Tensor]


def assert_sharded(strategy: str, root: torch.nn.Module, policy: torch.nn.Module) -> None:
    """Asserts that `root`, which a framework made, shards the policy within as `strategy` says, and in no other way."""
    kinds = {
        "ddp": isinstance(root, DistributedDataParallel),
        "fsdp1": isinstance(root, FullyShardedDataParallel),
        "fsdp2": any(isinstance(each, FSDPModule) for each in root.modules()),
        "zero": hasattr(root, "zero_optimization_stage"),
    }
    (found,) = [kind for kind, is_it in kinds.items() if is_it]
    assert strategy.startswith(found)
    CHECKS[strategy](root, policy)


def check_ddp(root: DistributedDataParallel, policy: torch.nn.Module) -> None:
    assert dist.get_world_size(root.process_group) == 2
    assert not any(isinstance(each, DTensor) for each in policy.parameters())


def check_fsdp1(root: FullyShardedDataParallel, policy: torch.nn.Module) -> None:
    handles = [unit._handle for unit in FullyShardedDataParallel.fsdp_modules(root) if unit._handle]
    assert len(handles) == 3, "two layers, and the rest of the policy"
    for handle in handles:
        assert handle.world_size == 2
        assert handle._sharding_strategy == HandleShardingStrategy.FULL_SHARD
        whole = handle.flat_param._unpadded_unsharded_size.numel()
        assert handle.is_sharded(handle.flat_param)
        assert handle.flat_param.numel() == -(-whole // 2)


def check_fsdp2(root: torch.nn.Module, policy: torch.nn.Module) -> None:
    for parameter in policy.parameters():
        assert isinstance(parameter, DTensor)
        assert (parameter.device_mesh.size(), parameter.placements) == (2, (Shard(0),))
        assert parameter.to_local().numel() < parameter.numel()
    assert sum(isinstance(each, FSDPModule) for each in policy.modules()) >= 3


def check_fsdp2_tp(root: torch.nn.Module, policy: torch.nn.Module) -> None:
    for name, parameter in policy.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.device_mesh.shape == (2, 2)
        data, tensor = parameter.placements
        assert (type(data), data.dim) in {(Shard, 0), (_StridedShard, 0)}
        assert (tensor == Replicate()) == ("norm" in name), "only norms are whole on every tensor parallel rank"
        parts = 2 if "norm" in name else 4
        assert parameter.to_local().numel() < 1.5 * parameter.numel() / parts
        if "norm" in name:
            assert is_alike(parameter.to_local(), parameter.device_mesh.get_group(1)), f"{name} differs between peers"


def is_alike(tensor: torch.Tensor, group: dist.ProcessGroup) -> bool:
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, tensor.contiguous(), group=group)
    return all(torch.equal(tensor, each) for each in everyone)


def check_zero(root: torch.nn.Module, policy: torch.nn.Module, stage: int) -> None:
    assert root.zero_optimization_stage() == stage
    assert root.zero_optimization_partition_gradients() == (stage >= 2)
    assert root.zero_optimization_partition_weights() == (stage == 3)
    whole = sum(getattr(each, "ds_numel", each.numel()) for each in policy.parameters())
    parts = (
        root.optimizer.fp32_partitioned_groups_flat if stage == 3 else root.optimizer.single_partition_of_fp32_groups
    )
    assert sum(part.numel() for part in parts) < 0.6 * whole, "the optimizer has the states of half of the parameters"
    for parameter in policy.parameters():
        assert hasattr(parameter, "ds_tensor") == (stage == 3)
        assert stage < 3 or parameter.ds_tensor.numel() == -(-parameter.ds_numel // 2)


CHECKS = {
    "ddp": check_ddp,
    "fsdp1": check_fsdp1,
    "fsdp2": check_fsdp2,
    "fsdp2_tp": check_fsdp2_tp,
    "zero1": lambda root, policy: check_zero(root, policy, 1),
    "zero2": lambda root, policy: check_zero(root, policy, 2),
    "zero3": lambda root, policy: check_zero(root, policy, 3),
}


def full_state_dict(root: torch.nn.Module, policy: torch.nn.Module) -> Weights:
    """Every tensor of the policy by name, whole, as the framework itself gives it, on rank 0. Every rank takes part."""
    if isinstance(root, FullyShardedDataParallel):
        whole = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(root, StateDictType.FULL_STATE_DICT, whole):
            return below(policy, root, root.state_dict())
    if hasattr(root, "zero_optimization_partition_weights") and root.zero_optimization_partition_weights():
        return below(policy, root.module, root._zero3_consolidated_16bit_state_dict() or {})  # in any dtype
    return get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True))


def below(policy: torch.nn.Module, root: torch.nn.Module, weights: Weights) -> Weights:
    """The weights of a module within `root`, by their names there."""
    path = next(name for name, each in root.named_modules() if each is policy).replace("_fsdp_wrapped_module", "")
    prefix = "".join(f"{part}." for part in path.split(".") if part)
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
