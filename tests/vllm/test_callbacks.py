"""After each batch a real server is at the version of the last real step, in every case and with each framework."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.tiny_models import VOCAB
from tests.unit import accelerate_cases, lightning_cases, transformers_cases, trl_cases
from tests.unit.recording_sync import Truth
from tests.vllm.conftest import Server
from tests.vllm.engines import server_version
from twinkle_callbacks.accelerate import WeightSync
from twinkle_callbacks.lightning import WeightSyncCallback
from twinkle_callbacks.report import SyncReport
from twinkle_callbacks.transformers import WeightSyncCallback as TrainerSyncCallback

pytestmark = lightning_cases.IGNORE_WARNINGS


class WithLoss(torch.nn.Module):
    """A language model that returns its loss."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.policy(input_ids=ids, labels=ids).loss


class Served:
    """Compares the server's version with the number of times the policy's weights were seen to change."""

    def __init__(self, url: str, net: WithLoss) -> None:
        self.url, self.truth, self.stepped = url, Truth(net.policy), []

    def check(self, batch: int | None = None) -> None:
        if self.truth.look():
            self.stepped.append(batch)
        assert server_version(self.url) == str(len(self.stepped))


@pytest.fixture
def url(vllm_server: Server) -> str:
    return vllm_server.url


@pytest.fixture
def net(vllm_server: Server) -> WithLoss:
    return WithLoss(vllm_server.policy_dir)


@pytest.fixture
def served(url: str, net: WithLoss) -> Served:
    return Served(url, net)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    accelerate_cases.reset_accelerate()


def tokens(batches: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2 * batches, 8), generator=torch.Generator().manual_seed(0))


def assert_received(report: SyncReport | None, version: int) -> None:
    assert report is not None
    assert report.version == version
    assert [(replica.version, replica.digest) for replica in report.replicas] == [(version, report.digest)]


@pytest.mark.parametrize("case", lightning_cases.TABLE, ids=str)
def test_lightning(case: lightning_cases.Case, url: str, net: WithLoss, served: Served) -> None:
    class Watcher(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            served.check()

        def on_train_batch_end(
            self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
        ) -> None:
            served.check(index)

    callback = WeightSyncCallback(rollouts=url, engine="gloo", module="net.policy")
    trainer = lightning_cases.trainer(callback, Watcher(), **case.options())
    trainer.fit(case.module(net, case.optimizers), DataLoader(TensorDataset(tokens(case.batches)), batch_size=2))
    assert tuple(served.stepped) == case.stepped
    assert_received(callback.report, len(case.stepped))


@pytest.mark.parametrize("case", accelerate_cases.TABLE, ids=str)
def test_accelerate(case: accelerate_cases.Case, url: str, net: WithLoss, served: Served) -> None:
    loop = case.make(net)
    with WeightSync(loop.accelerator, loop.model, loop.prepared, rollouts=url, engine="gloo", module="policy") as sync:
        served.check()
        for index in loop.run(tokens(case.batches)):
            served.check(index)
    assert tuple(served.stepped) == case.stepped
    assert_received(sync.report, len(case.stepped))


@pytest.mark.parametrize("case", transformers_cases.TABLE, ids=str)
def test_trainer(case: transformers_cases.Case, url: str, net: WithLoss, served: Served, tmp_path: Path) -> None:
    class Watcher(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            served.check()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            served.check(state.global_step - 1)

    callback = TrainerSyncCallback(rollouts=url, engine="gloo", module="net.policy")
    model = transformers_cases.Model(net, case.inf_at)
    transformers_cases.make_trainer(
        tmp_path, model, case.optimizers, tokens(case.batches), [callback, Watcher()], case.amp, **case.arguments
    ).train()
    assert tuple(served.stepped) == case.stepped
    assert_received(callback.report, len(case.stepped))


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_trl_samples_from_the_servers_newest_weights(url: str, net: WithLoss, tmp_path: Path) -> None:
    versions: list[tuple[int, str]] = []

    def sample(prompts: list[str], trainer: trl_cases.GRPOTrainer) -> dict[str, Any]:
        versions.append((trainer.state.global_step, server_version(url)))
        body = {"prompt": [trl_cases.PROMPT_IDS] * len(prompts), "max_tokens": trl_cases.COMPLETION_TOKENS}
        body |= {"temperature": 1.0, "logprobs": 0, "ignore_eos": True, "return_token_ids": True}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
        completions = [choice["token_ids"] for choice in choices]
        logprobs = [choice["logprobs"]["token_logprobs"] for choice in choices]
        assert torch.allclose(torch.tensor(logprobs), policy_logprobs(net.policy, completions), atol=1e-3)
        return {"prompt_ids": body["prompt"], "completion_ids": completions, "logprobs": logprobs}

    callback = TrainerSyncCallback(rollouts=url, engine="gloo")
    trl_cases.make_trainer(tmp_path, net.policy, sample, callback, max_steps=3, gradient_accumulation_steps=2).train()
    assert versions == [(0, "0"), (1, "1"), (2, "2")]
    assert server_version(url) == "3"
    assert_received(callback.report, 3)


@torch.no_grad()
def policy_logprobs(policy: torch.nn.Module, completions: list[list[int]]) -> torch.Tensor:
    ids = torch.tensor([trl_cases.PROMPT_IDS + completion for completion in completions])
    start = len(trl_cases.PROMPT_IDS)
    logprobs = policy(input_ids=ids).logits[:, start - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, ids[:, start:, None]).squeeze(-1)
