"""What each module of a tree holds, whatever shards it: the one place that tells the kinds of sharding apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import fsdp1, zero3
from twinkle_callbacks.sources.handles import Handle, whole
from twinkle_callbacks.sources.names import WRAPPER_COMPONENTS, loaded


class Holdings:
    """The tensors of every module below `root`. Made for one stream: a later one may find others.

    Args:
        root: the module as the framework wrapped it, since sharding may be rooted above the policy.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = modules_of(root)
        self._paths = {id(module): path for path, module in modules}
        wrappers = loaded("torch.distributed.fsdp", "FSDPModule") + fsdp1.wrapper()
        sharded = [module for _, module in modules if isinstance(module, wrappers)]
        _reshard(sharded)
        self._flat = fsdp1.handles(sharded)
        self._buffer_dtypes = fsdp1.buffer_dtypes(sharded)
        self._flat_names: dict[int, list[str]] = {}
        for module, name in self._flat:
            self._flat_names.setdefault(module, []).append(name)
        self._handles: dict[int, Handle] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self._paths

    def tensors(self, module: nn.Module) -> Iterator[tuple[str, Handle]]:
        """Yields name and handle of the parameters and buffers of exactly this module, tied ones with one handle."""
        registered = [
            name
            for name, value in module._parameters.items()
            if value is not None and not (self._flat and fsdp1.is_flat(value))
        ]
        flat = [name for name in self._flat_names.get(id(module), ()) if name not in registered]
        buffers = [name for name, value in module._buffers.items() if value is not None]
        for name in registered + flat + buffers:
            yield name, self.handle(module, name)

    def name(self, module: nn.Module, name: str) -> str:
        """The canonical name of a parameter or buffer of exactly this module."""
        return f"{self._paths.get(id(module), '')}{name}"

    def handle(self, module: nn.Module, name: str) -> Handle:
        """The handle of a parameter or buffer of exactly this module.

        Raises:
            SourceError: it has no values, or is sharded in a way that cannot be streamed.
        """
        if (id(module), name) in self._flat:
            return self._flat[id(module), name]
        tensor: torch.Tensor = getattr(module, name)
        if id(tensor) not in self._handles:
            found = _handle(self.name(module, name), tensor)
            dtype = self._buffer_dtypes.get(id(tensor), found.dtype)
            self._handles[id(tensor)] = found if dtype == found.dtype else whole(tensor, dtype)
        return self._handles[id(tensor)]


def _handle(name: str, tensor: Any) -> Handle:
    if isinstance(tensor, loaded("torch.distributed.tensor", "DTensor")) and tensor.device.type != "meta":
        from twinkle_callbacks.sources import dtensor

        return dtensor.handle(name, tensor)
    if nn.parameter.is_lazy(tensor):
        raise SourceError(f"{name!r} is not initialized yet; run one forward pass before training starts")
    fsdp1.refuse_part(name, tensor)
    if zero3.is_partitioned(tensor):
        return zero3.handle(name, tensor)
    if tensor.device.type == "meta":
        raise SourceError(
            f"{name!r} is on the meta device and has no values; load the weights first (parameters that accelerate "
            f"offloads to CPU or disk by hooks cannot be streamed)"
        )
    return whole(tensor)


def modules_of(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a tree once, and the prefix of its tensors' canonical names.

    `named_modules()` takes ten times as long, which counts where thousands of adapter layers are walked for each push.
    """
    found, seen = [("", root)], {id(root)}
    for path, module in found:  # which grows meanwhile
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append((path if name in WRAPPER_COMPONENTS else f"{path}{name}.", child))
    return found


def _reshard(modules: Iterable[nn.Module]) -> None:
    # After a forward pass that no backward followed, such as a validation, FSDP2 leaves the root's parameters
    # unsharded, in the dtype of its mixed precision.
    fsdp2 = loaded("torch.distributed.fsdp", "FSDPModule")
    for module in modules:
        if isinstance(module, fsdp2):
            sharded: Any = module
            sharded.reshard()
