"""The cases of Lightning in which "after the optimizer step" is hard to tell, for any net that returns its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

Net = torch.nn.Module
MakeOptimizers = Callable[[Net], Any]

# Of Lightning itself, on settings that are fine in a test.
IGNORE_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The '.*_dataloader' does not have many workers",
        ".*training_step.* returned `None`",
        "`LightningModule.configure_optimizers` returned `None`",
        "The number of training batches",
        ".isinstance.treespec, LeafSpec",
    )
]


class Auto(pl.LightningModule):
    """Automatic optimization of `self.net`, whose output is the loss."""

    def __init__(self, net: Net, optimizers: MakeOptimizers) -> None:
        super().__init__()
        self.net, self.make_optimizers = net, optimizers

    def training_step(self, batch: Any, index: int) -> torch.Tensor | None:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make_optimizers(self.net)


class NoLossOnce(Auto):
    def training_step(self, batch: Any, index: int) -> torch.Tensor | None:
        return None if index == 1 else self.net(batch[0])


class InfOnce(Auto):
    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0]) * (float("inf") if index == 1 else 1.0)


class Manual(Auto):
    """Accumulates two batches by hand, then steps each optimizer."""

    def __init__(self, net: Net, optimizers: MakeOptimizers) -> None:
        super().__init__(net, optimizers)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizers = self.optimizers()
        if index % 2 == 0:
            for each in optimizers:
                each.zero_grad()
        self.manual_backward(self.net(batch[0]))
        if index % 2 == 1:
            for each in optimizers:
                each.step()


class ManualRaw(Manual):
    def training_step(self, batch: Any, index: int) -> None:
        optimizers = self.optimizers(use_pl_optimizer=False)
        for each in optimizers:
            each.zero_grad()
        self.manual_backward(self.net(batch[0]))
        for each in optimizers:
            each.step()


class OwnOptimizer(Manual):
    """Steps an optimizer that Lightning never hears of."""

    def training_step(self, batch: Any, index: int) -> None:
        if index == 0:
            self.own = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.own.zero_grad()
        self.manual_backward(self.net(batch[0]))
        self.own.step()


class StepsInHook(Manual):
    """Steps in a hook that Lightning calls after that of the callbacks."""

    def training_step(self, batch: Any, index: int) -> None:
        for each in self.optimizers():
            each.zero_grad()
        self.manual_backward(self.net(batch[0]))

    def on_train_batch_end(self, *args: Any) -> None:
        for each in self.optimizers():
            each.step()


def adam(net: Net) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.01)


def fused_adam(net: Net) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.01, fused=True)


def lbfgs(net: Net) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(net.parameters(), lr=0.01)


def two_sgd(net: Net) -> list[torch.optim.Optimizer]:
    parameters = list(net.parameters())
    return [torch.optim.SGD(part, lr=0.1) for part in (parameters[::2], parameters[1::2])]


def no_optimizer(net: Net) -> None:
    return None


def amp() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))]}


def accumulate() -> dict[str, Any]:
    return {"accumulate_grad_batches": 2}


@dataclass(frozen=True)
class Case:
    name: str
    module: type[Auto]
    optimizers: MakeOptimizers
    batches: int
    stepped: tuple[int, ...]  # batches after which the weights are others than before
    options: Callable[[], dict[str, Any]] = field(default=dict)

    def __str__(self) -> str:
        return self.name


TABLE = [
    Case("one optimizer", Auto, adam, 3, (0, 1, 2)),
    Case("accumulate 2", Auto, adam, 5, (1, 3, 4), accumulate),
    Case("no loss in one batch", NoLossOnce, adam, 5, (0, 2, 3, 4)),
    Case("manual, two optimizers", Manual, two_sgd, 4, (1, 3)),
    Case("manual, raw optimizers", ManualRaw, two_sgd, 3, (0, 1, 2)),
    Case("manual, optimizer unknown to Lightning", OwnOptimizer, no_optimizer, 3, (0, 1, 2)),
    Case("AMP inf skip", InfOnce, adam, 5, (0, 2, 3, 4), amp),
    Case("AMP inf skip, fused Adam", InfOnce, fused_adam, 5, (0, 2, 3, 4), amp),
    Case("LBFGS", Auto, lbfgs, 2, (0, 1)),
]


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False}
    return pl.Trainer(
        **(quiet | {"max_epochs": 1} | options),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
