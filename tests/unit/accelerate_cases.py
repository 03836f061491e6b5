"""The cases of Accelerate loops in which "after the optimizer step" is hard to tell, for any net returning its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader

from tests.unit.lightning_cases import MakeOptimizers, Net, adam, fused_adam, lbfgs, two_sgd


def reset_accelerate() -> None:
    """Forgets the process-wide state of an earlier accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def amp_accelerator() -> Accelerator:
    """An accelerator that scales losses as it does for fp16, which Accelerate itself allows on a GPU only."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return accelerator


@dataclass
class Loop:
    """A training loop as users write it; each item of `run()` is the index of a batch just done."""

    net: Net
    optimizers: MakeOptimizers
    accelerator: Accelerator
    inf_at: int | None = None
    no_loss_at: int | None = None

    def __post_init__(self) -> None:
        made = self.optimizers(self.net)
        made = made if isinstance(made, list) else [made]
        self.model, *self.prepared = self.accelerator.prepare(self.net, *made)

    def run(self, data: torch.Tensor) -> Iterator[int]:
        for index, batch in enumerate(self.accelerator.prepare(DataLoader(data, batch_size=2))):
            with self.accelerator.accumulate(self.model):
                self.step(index, batch)
            yield index

    def step(self, index: int, batch: torch.Tensor) -> None:
        if index != self.no_loss_at:
            loss = self.model(batch)
            self.accelerator.backward(loss * float("inf") if index == self.inf_at else loss)
        for each in self.prepared:
            each.step()
        for each in self.prepared:
            each.zero_grad()


class ClosureLoop(Loop):
    def step(self, index: int, batch: torch.Tensor) -> None:
        (optimizer,) = self.prepared

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.model(batch)
            self.accelerator.backward(loss)
            return loss

        optimizer.step(closure)


def plain_accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def accumulating_accelerator() -> Accelerator:
    return Accelerator(cpu=True, gradient_accumulation_steps=2)


@dataclass(frozen=True)
class Case:
    name: str
    optimizers: MakeOptimizers
    batches: int
    stepped: tuple[int, ...]
    accelerator: Callable[[], Accelerator] = plain_accelerator
    loop: type[Loop] = Loop
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def make(self, net: Net) -> Loop:
        return self.loop(net, self.optimizers, self.accelerator(), **self.options)


TABLE = [
    Case("one optimizer", adam, 3, (0, 1, 2)),
    Case("accumulate 2", adam, 5, (1, 3, 4), accumulating_accelerator),
    Case("two optimizers", two_sgd, 3, (0, 1, 2)),
    Case("two optimizers, accumulate 2", two_sgd, 5, (1, 3, 4), accumulating_accelerator),
    Case("no loss in one batch", adam, 4, (0, 2, 3), options={"no_loss_at": 1}),
    Case("AMP inf skip", adam, 5, (0, 2, 3, 4), amp_accelerator, options={"inf_at": 1}),
    Case("AMP inf skip, fused Adam", fused_adam, 5, (0, 2, 3, 4), amp_accelerator, options={"inf_at": 1}),
    Case("LBFGS", lbfgs, 2, (0, 1), loop=ClosureLoop),
]
