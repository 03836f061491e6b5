"""The units of a policy, and what they give: what the tests of merging and of quantized bases stream with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from twinkle_callbacks.sources.holdings import Holdings
from twinkle_callbacks.sources.merging import stand_in
from twinkle_callbacks.sources.names import unwrap
from twinkle_callbacks.sources.survey import _walk
from twinkle_callbacks.sources.units import Unit, Wanted


def units_of(model: nn.Module, dtype: torch.dtype | None = None, held: Holdings | None = None) -> list[Unit]:
    """The units of everything a policy computes with, in the order of the module tree, tied ends each for itself."""
    return list(_walk(unwrap(model), "", held or Holdings(model), lambda _, own: dtype or own, stand_in))


def streamed(units: Iterable[Unit], gather: Callable[[Wanted], torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
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
