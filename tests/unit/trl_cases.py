"""A small GRPO run of TRL whose samples come from a function of the test."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from tests.tiny_models import VOCAB

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL warns of every vLLM that is newer than itself
    from trl import GRPOConfig, GRPOTrainer

PROMPT, PROMPT_IDS = "w5 w6", [5, 6]
COMPLETION_TOKENS = 4


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    splitter = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=splitter, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(index) for index, _ in enumerate(completions)]


def make_trainer(
    folder: Path, model: PreTrainedModel, rollout_func: Any, callback: TrainerCallback, **options: Any
) -> GRPOTrainer:
    """A trainer that samples with `rollout_func`, four completions of four tokens for each prompt."""
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
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 16),
        processing_class=tokenizer(),
        rollout_func=rollout_func,
        callbacks=[callback],
    )
