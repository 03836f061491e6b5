"""A walk over a policy that PEFT is in, as short as it can be: what the tests of merging stream with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from twinkle_callbacks.sources.handles import Handle, whole
from twinkle_callbacks.sources.merging import is_part, merged, stand_in
from twinkle_callbacks.sources.names import canonical
from twinkle_callbacks.sources.units import Output, Unit, Wanted


class PlainHoldings:
    """Handles of modules that are not sharded, tied tensors with one."""

    def __init__(self) -> None:
        self._handles: dict[int, Handle] = {}

    def tensors(self, module: nn.Module) -> Iterator[tuple[str, Handle]]:
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield name, self._handles.setdefault(id(tensor), whole(tensor))


def units_of(model: nn.Module, dtype: torch.dtype | None = None, held: PlainHoldings | None = None) -> Iterator[Unit]:
    """The units of everything a `PeftModel` computes with, in the order of the module tree."""
    base: Any = model
    yield from _walk(base.base_model.model, "", held or PlainHoldings(), lambda name, own: dtype or own)


def streamed(units: Iterator[Unit], gather: Callable[[Wanted], torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Every output of the units by name, copied."""
    take = gather or (lambda wanted: wanted.handle.local().to(wanted.dtype))
    made = {}
    with torch.no_grad():
        for unit in units:
            tensors = unit.build([take(wanted) for wanted in unit.needs])
            for output, tensor in zip(unit.outputs, tensors, strict=True):
                assert (tensor.dtype, tuple(tensor.shape)) == (output.dtype, output.shape), output.name
                assert output.name not in made
                made[output.name] = tensor.clone()
    return made


def _walk(module: nn.Module, path: str, held: PlainHoldings, sent: Any) -> Iterator[Unit]:
    if is_part(module):
        instead = stand_in(module)
        if instead is None:
            yield merged(canonical(path), module, held, sent)
        else:
            yield from _walk(instead, path, held, sent)
        return
    prefix = f"{path}." if path else ""
    for name, handle in held.tensors(module):
        if name not in module._non_persistent_buffers_set:
            full_name = canonical(prefix + name)
            dtype = sent(full_name, handle.dtype)
            yield Unit((Output(full_name, dtype, handle.shape, handle),), (Wanted(handle, dtype),))
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix + name, held, sent)
