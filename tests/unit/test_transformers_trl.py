"""TRL samples from the newest weights: `rollout_func` finds each step pushed before it is called."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCAB, build
from tests.unit.accelerate_cases import reset_accelerate
from tests.unit.recording_sync import RecordingSynchronizer, recorder, same, weights_of
from twinkle_callbacks.transformers import WeightSyncCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL warns of every vLLM that is newer than itself
    from trl import GRPOConfig, GRPOTrainer

COMPLETION_TOKENS = 4


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[RecordingSynchronizer]]:
    fake = recorder()
    monkeypatch.setattr("twinkle_callbacks.transformers.WeightSynchronizer", fake)
    yield fake
    reset_accelerate()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    splitter = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=splitter, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(index) for index, _ in enumerate(completions)]


def make_trainer(folder: Path, rollout_func: Any, callback: WeightSyncCallback, **options: Any) -> GRPOTrainer:
    arguments = GRPOConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=COMPLETION_TOKENS,
        **options,
    )
    return GRPOTrainer(
        model=build("qwen3", num_hidden_layers=1),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "w5 w6"}] * 16),
        processing_class=tokenizer(),
        rollout_func=rollout_func,
        callbacks=[callback],
    )


@pytest.mark.filterwarnings("ignore")  # TRL's own, about the experimental rollout_func
def test_each_rollout_samples_from_the_weights_of_the_last_step(
    fake: type[RecordingSynchronizer], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []

    def sample(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        version, pushed = fake.made[0].pushes[-1]
        seen.append((trainer.state.global_step, version))
        assert same(pushed, weights_of(trainer.accelerator.unwrap_model(trainer.model)))
        ids = torch.randint(3, VOCAB, (len(prompts), COMPLETION_TOKENS)).tolist()
        return {
            "prompt_ids": [[5, 6]] * len(prompts),
            "completion_ids": ids,
            "logprobs": [[-1.0] * COMPLETION_TOKENS for _ in ids],
        }

    trainer = make_trainer(tmp_path, sample, WeightSyncCallback(), max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert seen == [(0, 0), (1, 1), (2, 2)]
    assert fake.made[0].versions == [0, 1, 2, 3]
    assert fake.made[0].closed == 1
    assert [row["weight_sync/version"] for row in trainer.state.log_history[:3]] == [1, 2, 3]
    pushes = [weights for _, weights in fake.made[0].pushes]
    assert not any(same(before, after) for before, after in itertools.pairwise(pushes))
