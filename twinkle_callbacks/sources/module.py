"""The source over a trained module: plain, replicated (DDP, ZeRO-1/2), or sharded into DTensors (FSDP2)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.buckets.packing import dtype_name
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.base import WeightSource
from twinkle_callbacks.sources.conversions import plan_conversions
from twinkle_callbacks.sources.dtypes import sent_as
from twinkle_callbacks.sources.names import checkpoint_tensors, loaded, select
from twinkle_callbacks.sources.refusals import (
    refuse_adapters,
    refuse_missing_values,
    refuse_sharding,
    refuse_wrong_root,
)


class _Kind(NamedTuple):
    dtype: torch.dtype
    sent: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)}"


class ModuleSource(WeightSource):
    """Streams parameters and persistent buffers of a module; gathers one tensor at a time.

    Sharded tensors are cast before they are gathered, which halves the traffic of fp32 masters and gives the same
    values. Extra memory is the gathered tensor, or the few that one conversion of transformers needs together.

    Args:
        model: the module as the framework wrapped it.
        module: path of the policy inside it.
        dtype: dtype that floating point tensors are cast to, except 8-bit ones and those that the model keeps in fp32
            by its own declaration (such as the correction bias of a router); None casts nothing.

    Raises:
        SourceError: the module cannot be streamed; the message says why and what to do.
    """

    def __init__(self, model: nn.Module, *, module: str = "", dtype: torch.dtype | None = None) -> None:
        refuse_sharding(model)
        self._root = model
        self._module = select(model, module)
        refuse_adapters(self._module)
        refuse_wrong_root(self._module)
        self._dtype = dtype
        self._keeps_fp32 = _fp32_names(self._module)
        tensors = self._tensors()
        refuse_missing_values(self._module, tensors)
        self._kinds = self._kinds_of(tensors)
        metas = {name: torch.empty(kind.shape, dtype=kind.sent, device="meta") for name, kind in self._kinds.items()}
        self._plan = plan_conversions(self._module, metas)
        self._specs = [
            TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in self._plan.stream(metas.items())
        ]

    @property
    def is_collective(self) -> bool:
        dtensor = loaded("torch.distributed.tensor", "DTensor")
        return any(isinstance(parameter, dtensor) for parameter in self._module.parameters())

    def specs(self) -> list[TensorSpec]:
        return list(self._specs)

    @torch.no_grad()
    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = self._tensors()
        self._check_unchanged(tensors)
        full = ((name, _full(tensor.detach(), self._kinds[name].sent)) for name, tensor in tensors.items())
        yield from self._plan.stream(full)

    def _tensors(self) -> dict[str, torch.Tensor]:
        # After a forward pass that no backward followed, such as a validation, FSDP2 leaves the root's parameters
        # unsharded, in the dtype of its mixed precision.
        fsdp2 = loaded("torch.distributed.fsdp", "FSDPModule")
        for child in self._root.modules():
            if isinstance(child, fsdp2):
                sharded: Any = child
                sharded.reshard()
        return checkpoint_tensors(self._module)

    def _kinds_of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, _Kind]:
        kinds = {}
        for name, tensor in tensors.items():
            kept = self._keeps_fp32 is not None and self._keeps_fp32.search(name) is not None
            sent = tensor.dtype if kept else sent_as(tensor.dtype, self._dtype)
            kinds[name] = _Kind(tensor.dtype, sent, tuple(tensor.shape))
        return kinds

    def _check_unchanged(self, tensors: Mapping[str, torch.Tensor]) -> None:
        before, now = self._kinds, self._kinds_of(tensors)
        if now == before:
            return
        lines = [f"{name} is gone" for name in before if name not in now]
        lines += [f"{name} is new" for name in now if name not in before]
        lines += [
            f"{name} was {before[name]} and is {kind}"
            for name, kind in now.items()
            if name in before and before[name] != kind
        ]
        shown = "; ".join(lines[:5] or ["they come in another order"])
        rest = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise SourceError(
            f"the module's tensors changed since the source was opened: {shown}{rest}; "
            f"change the module before training starts, or open a new source"
        )


def _full(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Casts a tensor, and gathers it where it is a DTensor, on the device of its mesh if it is offloaded to CPU."""
    if not isinstance(tensor, loaded("torch.distributed.tensor", "DTensor")):
        return tensor.to(dtype)
    sharded: Any = tensor.to(dtype)
    mesh_device = sharded.device_mesh.device_type
    if tensor.device.type != mesh_device:
        sharded = sharded.to(mesh_device)
    full: torch.Tensor = sharded.full_tensor()
    return full


def _fp32_names(module: nn.Module) -> re.Pattern[str] | None:
    names = sorted(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    return re.compile("|".join(f"(?:{name.replace('*', '.*')})" for name in names)) if names else None
