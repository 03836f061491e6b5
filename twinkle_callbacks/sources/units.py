"""What is gathered together, because only together it can be sent: mostly one tensor, with a merge several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from twinkle_callbacks.sources.handles import Handle

Sent = Callable[[str, torch.dtype], torch.dtype]
"""The dtype in which the tensor of a canonical name is sent, given the one it is held in."""


class Wanted(NamedTuple):
    """A tensor to gather, and the dtype to cast it to before it travels."""

    handle: Handle
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.handle.nbytes // self.handle.dtype.itemsize * self.dtype.itemsize


class Output(NamedTuple):
    """A tensor that is sent, under its canonical name; `identity` tells which names are the same tensor (tied)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    identity: object


def _as_they_are(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return tensors


class Unit(NamedTuple):
    """Tensors that are gathered together, and what is made of them.

    Attributes:
        outputs: what is sent, in order.
        needs: what has to be gathered first.
        build: makes the outputs from the gathered tensors, on the sending rank, under `no_grad`. The tensors are full,
            may be views of the trained module's own memory, and must not be written to. Call `made` instead.
    """

    outputs: tuple[Output, ...]
    needs: tuple[Wanted, ...]
    build: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] = _as_they_are

    def agreement(self) -> list[str]:
        """What has to be equal on all ranks for them to gather this unit together, a line for each sharded tensor."""
        return [
            f"{self.outputs[0].name} from {list(handle.shape)}, sharded, as {dtype}"
            for handle, dtype in self.needs
            if handle.is_sharded
        ]

    def made(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs, from the gathered tensors."""
        if self.build is _as_they_are:
            return list(tensors)
        with torch.no_grad():
            return list(self.build(tensors))

    def only(self, kept: Sequence[int]) -> Unit:
        """The same unit without the outputs whose positions are not in `kept`."""
        if len(kept) == len(self.outputs):
            return self
        build = self.build
        outputs = tuple(self.outputs[position] for position in kept)
        return Unit(outputs, self.needs, lambda tensors: _at(build(tensors), kept))


def is_plain(unit: Unit) -> bool:
    """Whether a unit is one tensor as it is, which this rank has in full and nothing shards."""
    return unit.build is _as_they_are and all(not w.handle.is_sharded and not w.handle.blocks for w in unit.needs)


def gathered_from(units: Iterable[Unit]) -> list[str]:
    """What has to be equal on all ranks for them to gather these units together, in order."""
    return [line for unit in units for line in unit.agreement()]


def _at(tensors: Sequence[torch.Tensor], kept: Sequence[int]) -> list[torch.Tensor]:
    return [tensors[position] for position in kept]
