"""Whether a module tree without sharding, adapters or quantization is still the one that was surveyed.

A survey takes 15 ms for the 400 tensors of an 8B policy, more than sending them within one GPU; this takes two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from twinkle_callbacks.sources import fsdp1, merging
from twinkle_callbacks.sources.holdings import modules_of
from twinkle_callbacks.sources.names import loaded
from twinkle_callbacks.sources.units import Unit, is_plain

_PLAIN = (nn.Parameter, torch.Tensor, nn.Buffer)


class Snapshot:
    """The modules and tensors of a tree, each by its identity and kind. Values may change, nothing else.

    Attributes:
        tensors: its parameters and buffers.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._kept = [module for _, module in modules_of(root)]  # so that no identity is given to another object
        self.tensors = [tensor for module in self._kept for tensor in _tensors(module)]
        self._picture = self._look()

    @classmethod
    def of(cls, root: nn.Module, units: list[Unit]) -> Snapshot | None:
        """The snapshot of a tree that was just surveyed; None if more than identities decide what its units are."""
        if not all(map(is_plain, units)):
            return None
        snapshot = cls(root)
        wrappers = loaded("torch.distributed.fsdp", "FSDPModule") + fsdp1.wrapper()
        if any(isinstance(module, wrappers) or merging.is_part(module) for module in snapshot._kept):
            return None
        plain = all(type(tensor) in _PLAIN and not hasattr(tensor, "ds_id") for tensor in snapshot.tensors)
        return snapshot if plain else None

    def is_same(self) -> bool:
        """Whether the tree has not changed."""
        return self._look() == self._picture

    def _look(self) -> list[Any]:
        picture: list[Any] = []
        modules, seen = [self._root], {id(self._root)}
        for module in modules:  # which grows meanwhile
            picture.append(type(module))
            if module._modules:
                picture += module._modules
                for child in module._modules.values():
                    identity = id(child)
                    picture.append(identity)
                    if child is not None and identity not in seen:
                        seen.add(identity)
                        modules.append(child)
            if module._buffers:
                picture += module._non_persistent_buffers_set
            for held in (module._parameters, module._buffers):
                if held:
                    picture += held
                    for tensor in held.values():
                        if tensor is not None:
                            picture += (id(tensor), tensor.dtype, tensor.shape)
        return picture


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for held in (module._parameters, module._buffers) for tensor in held.values() if tensor is not None]
