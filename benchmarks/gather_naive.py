"""How users gather a sharded policy today: every way delivers full tensors under checkpoint names on rank 0.

Each is a generator that all ranks drain. The ways that hand out one tensor at a time convert one at a time; those that
hold the whole state convert it at once, as `save_pretrained` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from benchmarks.gather_models import Policy

Pairs = Iterable[tuple[str, torch.Tensor]]
Way = Callable[[], Pairs]
PER_PARAMETER = "per parameter"


def ways(kind: str, policy: Policy, model: Any) -> dict[str, Way]:
    """The naive ways of a kind of sharding, by name; those that begin with `PER_PARAMETER` gather one tensor a time."""
    family = "fsdp1" if kind.startswith("fsdp1") else "zero3" if kind.startswith("zero3") else "dtensor"
    return {"fsdp1": _fsdp1, "zero3": _zero3, "dtensor": _dtensors}[family](policy, model)


# What all deliver


def _wanted(policy: Policy) -> list[tuple[str, nn.Parameter]]:
    """What a user gathers: each parameter once, only those that train where it is an adapter."""
    named = list(policy.module.named_parameters())
    return [(name, p) for name, p in named if p.requires_grad] if policy.is_adapter else named


def _one_by_one(policy: Policy, pairs: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in pairs:
        yield from _checkpoint(policy, {name: tensor.detach()}).items()


def _at_once(policy: Policy, state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from _checkpoint(policy, state).items()


def _checkpoint(policy: Policy, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {_unwrapped(name): tensor for name, tensor in state.items()}
    if policy.is_adapter:
        # What `get_peft_model_state_dict` does to names; calling it for one tensor at a time walks the whole model.
        return {name.replace(".default", ""): tensor for name, tensor in state.items() if "lora_" in name}
    state.pop("lm_head.weight", None)  # tied
    return revert_weight_conversion(policy.twin, state)


def _unwrapped(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "_fsdp_wrapped_module")


# DTensors: FSDP2, tensor parallelism


def _dtensors(policy: Policy, model: Any) -> dict[str, Way]:
    def per_parameter() -> Pairs:
        wanted = _wanted(policy)
        return _one_by_one(policy, ((name, p.full_tensor() if isinstance(p, DTensor) else p) for name, p in wanted))

    def state_dict(*, offload: bool) -> Pairs:
        options = StateDictOptions(full_state_dict=True, cpu_offload=offload, ignore_frozen_params=policy.is_adapter)
        return _at_once(policy, get_model_state_dict(policy.module, options=options))

    found: dict[str, Way] = {
        f"{PER_PARAMETER} full_tensor()": per_parameter,
        "get_model_state_dict(full)": lambda: state_dict(offload=False),
        "get_model_state_dict(full, cpu_offload)": lambda: state_dict(offload=True),
    }
    if any(isinstance(module, FSDPModule) for module in policy.module.modules()):
        found["unshard() of each unit"] = lambda: _one_by_one(policy, _by_unit(policy))
    return found


def _by_unit(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    units = {path: module for path, module in policy.module.named_modules() if isinstance(module, FSDPModule)}
    names: dict[str, list[str]] = {path: [] for path in units}
    for name, _ in _wanted(policy):
        owner = max((path for path in units if not path or name.startswith(f"{path}.")), key=len)
        names[owner].append(name)
    for path, unit in units.items():
        unit.unshard()
        for name in names[path]:
            yield name, policy.module.get_parameter(name)
        unit.reshard()


# FSDP1


def _fsdp1(policy: Policy, model: Any) -> dict[str, Way]:
    fsdp = FullyShardedDataParallel

    def whole() -> Iterator[tuple[str, torch.Tensor]]:
        with fsdp.summon_full_params(model, writeback=False):
            state = {name: parameter.detach() for name, parameter in _wanted(policy)}
            yield from _at_once(policy, state)

    def by_unit() -> Iterator[tuple[str, torch.Tensor]]:
        # While they are summoned, FSDP1 names parameters without its wrappers.
        units = [(_unwrapped(path), module) for path, module in model.named_modules() if isinstance(module, fsdp)]
        for path, unit in units:
            prefix = f"{path}." if path else ""
            inside = tuple(f"{other}." for other, _ in units if other.startswith(prefix) and other != path)
            with fsdp.summon_full_params(unit, recurse=False, writeback=False):
                own = [(prefix + name, parameter) for name, parameter in unit.named_parameters()]
                own = [(name, parameter) for name, parameter in own if not name.startswith(inside)]
                yield from _one_by_one(policy, own)

    def state_dict() -> Pairs:
        # `offload_to_cpu=True` would be what users take, but on CPU it reads freed memory.
        with fsdp.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=False)):
            return _at_once(policy, model.state_dict())

    return {
        "summon_full_params(model)": whole,
        "summon_full_params(unit) of each unit": by_unit,
        "FULL_STATE_DICT": state_dict,
    }


# ZeRO-3


def _zero3(policy: Policy, model: Any) -> dict[str, Way]:
    import deepspeed

    gathered = deepspeed.zero.GatheredParameters

    def per_parameter() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in _wanted(policy):
            with gathered([parameter]):
                yield from _one_by_one(policy, [(name, parameter)])

    def whole() -> Iterator[tuple[str, torch.Tensor]]:
        wanted = _wanted(policy)
        with gathered([parameter for _, parameter in wanted]):
            yield from _at_once(policy, {name: parameter.detach() for name, parameter in wanted})

    return {
        f"{PER_PARAMETER} GatheredParameters": per_parameter,
        "GatheredParameters(model.parameters())": whole,
    }
