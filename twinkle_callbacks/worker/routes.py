"""Which checkpoint tensors go to which layers: asked of the loader itself, on an instance of the model without memory.

It loads meta tensors, and each operator that touches one of them is watched. A tensor of which slices are copied into
parameters and buffers, and with which nothing else is done, goes where these are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from twinkle_callbacks.worker.check import WriteCounter
from twinkle_callbacks.worker.recorded import Layouts, places_in


class Routes(NamedTuple):
    """Where the tensors go, seen from some of the layers.

    Attributes:
        into: names of those that are for these layers, in part at least, or whose way cannot be followed.
        past: names of all others.
        filled: titles of the parameters, of whatever layer, that all tensors together fill entirely.
        known: titles of all parameters and buffers; a live model has others only through what is done after loading.
    """

    into: list[str]
    past: list[str]
    filled: frozenset[str]
    known: frozenset[str]


def find_routes(shadow: Any, layers: Iterable[str], layouts: Layouts) -> Routes:
    """Loads tensors of these layouts into a model on the meta device, and tells which go to the layers named.

    A parameter of such a layer, or of a layer inside it, is one of these layers' also where others share it.

    Raises:
        AttributeError: there is no such layer.
        Exception: whatever the loader raises.
    """
    own = {_storage(place.home) for layer in layers for place in places_in(shadow.get_submodule(layer))}
    registered = list(places_in(shadow))
    given = {name: torch.empty(layout[1], dtype=layout[0], device="meta") for name, layout in layouts.items()}
    with torch.no_grad(), _Watch(given, {_storage(place.home) for place in registered}) as watch:
        shadow.load_weights(given.items())
    past = {name for name, targets in watch.targets.items() if targets and not targets & own} - watch.lost
    filled = frozenset(p.title for p in registered if watch.written(p.home) >= p.home.numel() > 0)
    into = [name for name in given if name not in past]
    known = frozenset(place.title for place in registered)
    return Routes(into, [name for name in given if name in past], filled, known)


class _Watch(WriteCounter):  # type: ignore[no-untyped-call]  # as its base
    """Notes too into which storages given tensors are copied, and with which of them anything else is done.

    Attributes:
        targets: the storages, by the name of the tensor.
        lost: names of the tensors whose way cannot be followed.
    """

    def __init__(self, given: dict[str, torch.Tensor], registered: set[int]) -> None:
        super().__init__()
        self.targets: dict[str, set[int]] = {name: set() for name in given}
        self.lost: set[str] = set()
        self._names = {_storage(tensor): name for name, tensor in given.items()}
        self._registered = registered

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        operands = [_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _has_elements(leaf)]
        names = {self._names[storage] for storage in operands if storage in self._names}
        if func is torch.ops.aten.copy_.default and len(names) == 1 and _storage(args[0]) in self._registered:
            self.targets[names.pop()].add(_storage(args[0]))
        elif func._schema.is_mutable or not _are_views(result, operands):
            self.lost |= names
        return result


def _are_views(result: Any, storages: list[int]) -> bool:
    return all(isinstance(leaf, torch.Tensor) and _storage(leaf) in storages for leaf in tree_leaves(result))


def _has_elements(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.numel() > 0


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # meta tensors have no address
