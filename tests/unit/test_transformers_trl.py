"""TRL samples from the newest weights: `rollout_func` finds each step pushed before it is called."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import VOCAB, build
from tests.unit.accelerate_cases import reset_accelerate
from tests.unit.recording_sync import RecordingSynchronizer, recorder, same, weights_of
from tests.unit.trl_cases import COMPLETION_TOKENS, PROMPT_IDS, GRPOTrainer, make_trainer
from twinkle_callbacks.transformers import WeightSyncCallback


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RecordingSynchronizer]]:
    fake = recorder()
    monkeypatch.setattr("twinkle_callbacks.transformers.WeightSynchronizer", fake)
    yield fake
    reset_accelerate()


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_each_rollout_samples_from_the_weights_of_the_last_step(
    fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    model, seen = build("qwen3", num_hidden_layers=1), []

    def sample(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        version, pushed = fake.made[0].pushes[-1]
        seen.append((trainer.state.global_step, version))
        assert same(pushed, weights_of(trainer.accelerator.unwrap_model(trainer.model)))
        ids = torch.randint(3, VOCAB, (len(prompts), COMPLETION_TOKENS)).tolist()
        return {
            "prompt_ids": [PROMPT_IDS] * len(prompts),
            "completion_ids": ids,
            "logprobs": [[-1.0] * COMPLETION_TOKENS for _ in ids],
        }

    trainer = make_trainer(tmp_path, model, sample, WeightSyncCallback(), max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert seen == [(0, 0), (1, 1), (2, 2)]
    assert fake.made[0].versions == [0, 1, 2, 3]
    assert fake.made[0].closed == 1
    assert [row["weight_sync/version"] for row in trainer.state.log_history[:3]] == [1, 2, 3]
    pushes = [weights for _, weights in fake.made[0].pushes]
    assert not any(same(before, after) for before, after in itertools.pairwise(pushes))
