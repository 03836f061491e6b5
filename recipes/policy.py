"""The policy: a char-level Qwen3 of half a million parameters, made on the spot and warmed up for some seconds.

The warm-up leaves it right about four times in ten, so that a group of samples holds both right and wrong ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3ForCausalLM

from recipes import arithmetic
from recipes.arithmetic import Problem, Task
from recipes.config import AdapterConfig, ModelConfig
from recipes.grpo import token_logprobs
from twinkle_callbacks.errors import ConfigError

transformers.utils.logging.disable_progress_bar()  # for reading and writing two megabytes

_IGNORED = -100
_CHECK_EVERY_STEPS = 5
_PROBLEMS_PER_STEP = 64
_PROBLEMS_AGAINST_FORGETTING = 2


@dataclass(frozen=True)
class WarmUp:
    """What the supervised phase did: optimizer steps, the sampled accuracy it reached, and wall seconds."""

    steps: int
    accuracy: float
    seconds: float


def build_policy(seed: int, config: ModelConfig) -> Qwen3ForCausalLM:
    """A fresh policy in float32 on the CPU, the same for the same seed."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(arithmetic.VOCABULARY),
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.hidden_size // 32,
            num_key_value_heads=config.hidden_size // 64,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            pad_token_id=arithmetic.PAD_ID,
            eos_token_id=arithmetic.EOS_ID,
            bos_token_id=None,
        )
    )


def warm_up(
    model: Qwen3ForCausalLM,
    seed: int,
    config: ModelConfig,
    max_operand: int,
    tasks: Sequence[Task] = (arithmetic.addition,),
    progress: Callable[[int, float], None] | None = None,
) -> WarmUp:
    """Trains on right answers until sampling would be right with probability `config.warmup_accuracy` in each task.

    A task that is there already gets a few problems a step, enough not to be forgotten.

    Raises:
        ConfigError: that accuracy was not reached within `config.warmup_max_steps`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.warmup_lr, weight_decay=0.0)
    started, accuracy = time.perf_counter(), 0.0
    shares = dict.fromkeys(tasks, _PROBLEMS_PER_STEP)
    for step in range(1, config.warmup_max_steps + 1):
        problems = [
            problem
            for task, share in shares.items()
            for problem in arithmetic.draw_problems(share, task=task, max_operand=max_operand, seed=seed, step=-step)
        ]
        tokens, labels = _with_answers(problems)
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % _CHECK_EVERY_STEPS == 0:
            reached = {task: sampled_accuracy(model, arithmetic.all_problems(max_operand, task)) for task in tasks}
            shares = {
                task: _PROBLEMS_PER_STEP if each < config.warmup_accuracy else _PROBLEMS_AGAINST_FORGETTING
                for task, each in reached.items()
            }
            accuracy = min(reached.values())
            if progress is not None:
                progress(step, accuracy)
            if accuracy >= config.warmup_accuracy:
                return WarmUp(step, accuracy, time.perf_counter() - started)
    raise ConfigError(
        f"the warm-up reached an accuracy of {accuracy:.2f} in {config.warmup_max_steps} steps, not "
        f"{config.warmup_accuracy}; raise model.warmup_max_steps or model.warmup_lr"
    )


@torch.no_grad()
def sampled_accuracy(model: Qwen3ForCausalLM, problems: list[Problem]) -> float:
    """Mean probability that a sample at temperature 1 is exactly the answer; computed, not sampled."""
    tokens, labels = _with_answers(problems)
    answers = token_logprobs(model, tokens) * (labels[:, 1:] != _IGNORED)
    return float(answers.sum(dim=1).exp().mean())


def save_policy(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Writes a checkpoint folder that `from_pretrained` and a stock vLLM server load, tokenizer included."""
    model.save_pretrained(folder)
    arithmetic.tokenizer().save_pretrained(folder)


def load_policy(folder: Path, adapter: AdapterConfig | None = None) -> nn.Module:
    """The policy of a folder, in float32 on the CPU, below a fresh adapter if one is given.

    Raises:
        ConfigError: there is no checkpoint; says how to make one.
    """
    if not (folder / "config.json").exists():
        raise ConfigError(f"no policy in {folder}; make it with: python -m recipes.prepare --config FILE")
    policy = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).train()
    if adapter is None:
        return policy
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        policy, LoraConfig(r=adapter.r, lora_alpha=adapter.alpha, target_modules=adapter.target_modules)
    )


def _with_answers(problems: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with their answers, and the labels: the same where a token is to be learnt. Padded at the right."""
    tokens = [torch.tensor([*arithmetic.encode(p.prompt + p.answer), arithmetic.EOS_ID]) for p in problems]
    labels = [row.clone() for row in tokens]
    for row, each in zip(labels, problems, strict=True):
        row[: len(each.prompt)] = _IGNORED
    return (
        pad_sequence(tokens, batch_first=True, padding_value=arithmetic.PAD_ID),
        pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
    )
