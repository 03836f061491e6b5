"""The source over a trained module: plain, replicated, sharded in any of the known ways, or adapted by PEFT."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import nn

from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.buckets.packing import dtype_name
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.base import WeightSource
from twinkle_callbacks.sources.conversions import plan_conversions
from twinkle_callbacks.sources.dtypes import sent_as
from twinkle_callbacks.sources.gather import gathered
from twinkle_callbacks.sources.holdings import Holdings
from twinkle_callbacks.sources.mergeable import check_mergeable, check_separable
from twinkle_callbacks.sources.merging import peft_model
from twinkle_callbacks.sources.names import select
from twinkle_callbacks.sources.refusals import refuse_empty, refuse_inner_adapters, refuse_quantized, refuse_wrong_root
from twinkle_callbacks.sources.snapshot import Snapshot
from twinkle_callbacks.sources.survey import survey
from twinkle_callbacks.sources.units import Unit, gathered_from


class _Kind(NamedTuple):
    made_of: tuple[str, ...]
    sent: torch.dtype
    shape: tuple[int, ...]
    agreement: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(self.made_of)


class ModuleSource(WeightSource):
    """Streams parameters and persistent buffers of a module, gathered bucket by bucket.

    Active adapters of PEFT are merged on the way. Without merging, the stream is the base model alone, as its
    `save_pretrained` would write it if PEFT had never been put on it: nothing of any adapter, active or not, neither
    the trained copies of `modules_to_save` nor trained tokens. What PEFT changes in the base itself, such as biases
    that train (`bias="all"`) or weights that an initialization takes apart (PiSSA), is sent as it is now.

    Tensors are cast before they are gathered, which halves the traffic of fp32 masters and gives the same values. Extra
    memory on rank 0 is two buckets of 32 MiB (or larger tensors), and the few tensors that one conversion of
    transformers needs together.

    Args:
        model: the module as the framework wrapped it.
        module: path of the policy inside it.
        dtype: dtype that floating point tensors are cast to, except 8-bit ones and those that the model keeps in fp32
            by its own declaration (such as the correction bias of a router); None casts nothing.
        merge: whether adapters are merged; False streams the base model below them.

    Raises:
        SourceError: the module cannot be streamed; the message says why and what to do.
    """

    def __init__(
        self, model: nn.Module, *, module: str = "", dtype: torch.dtype | None = None, merge: bool = True
    ) -> None:
        self._root = model
        self._module = select(model, module)
        refuse_wrong_root(self._module)
        refuse_inner_adapters(self._module)
        refuse_quantized(self._module)
        self._dtype = dtype
        self._merge = merge
        self._keeps_fp32 = _fp32_names(self._module)
        self._checked: list[Unit] | None = None
        self._storages: set[int] = set()  # addresses of the module's own memory
        self._places: _Places | None = None  # of its tensors, at the last check; None where more than these decide
        self._arrangement = 0
        units = self._survey()
        refuse_empty(self._module, units)
        self._kinds = _kinds(units)
        self._units, self._snapshot = units, Snapshot.of(self._root, units)
        self._gathered_from = gathered_from(units)
        metas = {name: torch.empty(kind.shape, dtype=kind.sent, device="meta") for name, kind in self._kinds.items()}
        self._plan = plan_conversions(self._module, metas)
        self._specs = [
            TensorSpec(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in self._plan.stream(metas.items())
        ]

    def specs(self) -> list[TensorSpec]:
        return list(self._specs)

    def agreement(self) -> list[str]:
        return super().agreement() + self._gathered_from

    def check(self) -> None:
        self._checked = self._unchanged()
        snapshot, before = self._snapshot, self._places
        self._places = None if snapshot is None else _Places.of(snapshot)
        if before is None or before != self._places:
            self._arrangement += 1
            tensors = (*self._root.parameters(), *self._root.buffers()) if snapshot is None else snapshot.tensors
            self._storages = {_storage(tensor) for tensor in tensors}

    def lasts(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._storages

    @property
    def arrangement(self) -> int | None:
        return None if self._places is None else self._arrangement

    def stream(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        units, self._checked = self._checked or self._unchanged(), None
        with closing(_named(units)) as named:
            yield from self._plan.stream(named)

    @torch.no_grad()
    def _survey(self) -> list[Unit]:
        check = check_mergeable if self._merge else check_separable
        check(peft_model(self._root, self._module) or self._module)
        return survey(self._module, Holdings(self._root), self._sent, merge=self._merge)

    def _sent(self, name: str, dtype: torch.dtype) -> torch.dtype:
        wanted = self._dtype
        if wanted is not None and self._keeps_fp32 is not None and self._keeps_fp32.search(name):
            wanted = torch.float32
        return sent_as(dtype, wanted)

    def _unchanged(self) -> list[Unit]:
        """The module's units as they are now. Parameters may have been replaced, but not by others of another kind."""
        if self._snapshot is not None and self._snapshot.is_same():
            return self._units
        units = self._survey()
        before, now = self._kinds, _kinds(units)
        if list(now.items()) == list(before.items()):
            self._units, self._snapshot = units, Snapshot.of(self._root, units)
            return units
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


class _Places(NamedTuple):
    """Where the tensors of a snapshot lie, and whether they lie there as plainly as their kind tells."""

    snapshot: Snapshot
    addresses: list[int]
    plain: list[bool]

    @classmethod
    def of(cls, snapshot: Snapshot) -> _Places:
        tensors = snapshot.tensors
        plain = [each.is_contiguous() and not each.is_conj() and not each.is_neg() for each in tensors]
        return cls(snapshot, [each.data_ptr() for each in tensors], plain)


def _storage(tensor: torch.Tensor) -> int:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr()


def _named(units: list[Unit]) -> Generator[tuple[str, torch.Tensor], None, None]:
    with closing(gathered(units)) as arriving:
        for unit, tensors in arriving:
            built = unit.made(tensors)
            del tensors
            for output in unit.outputs:
                yield output.name, built.pop(0)


def _kinds(units: list[Unit]) -> dict[str, _Kind]:
    return {
        output.name: _Kind(
            tuple(str(wanted.handle) for wanted in unit.needs), output.dtype, output.shape, tuple(unit.agreement())
        )
        for unit in units
        for output in unit.outputs
    }


def _fp32_names(module: nn.Module) -> re.Pattern[str] | None:
    names = sorted(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    return re.compile("|".join(f"(?:{name.replace('*', '.*')})" for name in names)) if names else None
