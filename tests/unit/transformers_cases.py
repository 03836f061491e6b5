"""The cases of `transformers.Trainer` in which "after the optimizer step" is hard to tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.unit.lightning_cases import MakeOptimizers, Net, adam, fused_adam


class Model(torch.nn.Module):
    """Gives a net that returns its loss the outputs that the Trainer expects; some batches come out infinite."""

    def __init__(self, net: Net, inf_at: int | None = None, fail_at: int | None = None) -> None:
        super().__init__()
        self.net, self.inf_at, self.fail_at, self.calls = net, inf_at, fail_at, 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        call, self.calls = self.calls, self.calls + 1
        if call == self.fail_at:
            raise ZeroDivisionError("from the model")
        loss = self.net(x)
        return {"loss": loss * float("inf") if call == self.inf_at else loss}


@dataclass(frozen=True)
class Case:
    name: str
    optimizers: MakeOptimizers
    batches: int
    stepped: tuple[int, ...]  # of the Trainer's steps those that changed the weights
    amp: bool = False
    inf_at: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


TABLE = [
    Case("one optimizer", adam, 3, (0, 1, 2)),
    Case("accumulate 2", adam, 5, (0, 1, 2), arguments={"gradient_accumulation_steps": 2}),
    Case("AMP inf skip", adam, 5, (0, 2, 3, 4), amp=True, inf_at=1),
    Case("AMP inf skip, fused Adam", fused_adam, 5, (0, 2, 3, 4), amp=True, inf_at=1),
]


def make_trainer(
    folder: Path,
    model: Model,
    optimizers: MakeOptimizers,
    data: torch.Tensor,
    callbacks: list[TrainerCallback],
    amp: bool = False,
    eval_dataset: Any = None,
    **arguments: Any,
) -> Trainer:
    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "num_train_epochs": 1}
    settings = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2, max_grad_norm=0,
        remove_unused_columns=False, **(quiet | arguments),
    )  # fmt: skip
    optimizer = optimizers(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    rows = [{"x": row} for row in data]
    trainer = Trainer(
        model,
        settings,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        optimizers=(optimizer, scheduler),
    )
    if amp:  # which the Trainer itself allows on a GPU only
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return trainer
