"""With each framework an adapter alone is pushed after each real step, and served as what was trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from tests.tiny_models import VOCAB
from tests.unit import accelerate_cases, lightning_cases
from tests.vllm.adapters import PROMPTS, Reference, adapted
from tests.vllm.conftest import Server
from tests.vllm.engines import assert_same, server_answers
from tests.vllm.test_adapters import version_of
from twinkle_callbacks.accelerate import WeightSync
from twinkle_callbacks.lightning import WeightSyncCallback
from twinkle_callbacks.report import SyncReport
from twinkle_callbacks.rollouts import HTTPRollout
from twinkle_callbacks.transformers import WeightSyncCallback as TrainerSyncCallback

pytestmark = lightning_cases.IGNORE_WARNINGS
BATCHES = 3
NAME = "callback"


@pytest.fixture
def settings(lora_server: Server) -> Iterator[dict[str, Any]]:
    yield {"rollouts": lora_server.url, "engine": "gloo", "merge_and_sync": False, "adapter_name": NAME}
    rollout = HTTPRollout(lora_server.url)
    rollout.unload_adapter(NAME)
    rollout.close()


@pytest.fixture
def policy() -> Any:
    return adapted().train()


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2 * BATCHES, 8), generator=torch.Generator().manual_seed(0))


def assert_served(server: Server, reference: Reference, policy: Any, report: SyncReport | None, folder: Path) -> None:
    assert report is not None
    assert report.version == version_of(server, NAME) == BATCHES
    policy.save_pretrained(folder)
    served = server_answers(server.url, PROMPTS, NAME)
    assert_same(served, reference.adapter(folder))
    assert served != server_answers(server.url, PROMPTS)


class Module(pl.LightningModule):
    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.policy(input_ids=batch[0], labels=batch[0]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def test_lightning(
    lora_server: Server, reference: Reference, policy: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    callback = WeightSyncCallback(**settings, module="policy")
    lightning_cases.trainer(callback).fit(Module(policy), DataLoader(TensorDataset(tokens()), batch_size=2))
    assert_served(lora_server, reference, policy, callback.report, tmp_path)


def test_trainer(
    lora_server: Server, reference: Reference, policy: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(
        str(tmp_path / "trainer"), per_device_train_batch_size=2, max_steps=BATCHES, learning_rate=0.05, report_to=[]
    )
    callback = TrainerSyncCallback(**settings)
    Trainer(policy, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert_served(lora_server, reference, policy, callback.report, tmp_path / "adapter")


def test_accelerate(
    lora_server: Server, reference: Reference, policy: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    model, optimizer = accelerator.prepare(policy, optimizer)
    with WeightSync(accelerator, model, optimizer, **settings) as sync:
        for batch in tokens().split(2):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerate_cases.reset_accelerate()
    assert_served(lora_server, reference, policy, sync.report, tmp_path)
