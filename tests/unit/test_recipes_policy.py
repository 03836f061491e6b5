"""The policy of the recipes: the same for the same seed, warmed up on purpose, saved as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes import arithmetic
from recipes.config import AdapterConfig, ModelConfig
from recipes.policy import build_policy, load_policy, sampled_accuracy, save_policy, warm_up
from twinkle_callbacks.errors import ConfigError

SMALL = ModelConfig(layers=1, warmup_accuracy=0.03, warmup_max_steps=200)


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (build_policy(seed, SMALL).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_embeddings_are_untied_and_heads_fit_vllm_on_cpu() -> None:
    config = build_policy(0, ModelConfig()).config
    assert not config.tie_word_embeddings
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (32, 4, 2)
    assert config.vocab_size == len(arithmetic.VOCABULARY)


def test_warm_up_stops_once_it_is_accurate_enough_and_the_checkpoint_keeps_it(tmp_path: Path) -> None:
    policy = build_policy(0, SMALL)
    problems = arithmetic.all_problems(9)
    assert sampled_accuracy(policy, problems) < 0.01
    done = warm_up(policy, 0, SMALL, max_operand=9)
    assert done.steps < SMALL.warmup_max_steps
    assert done.accuracy == sampled_accuracy(policy, problems) >= SMALL.warmup_accuracy
    save_policy(policy, tmp_path)
    assert sampled_accuracy(load_policy(tmp_path), problems) == done.accuracy
    assert (tmp_path / "tokenizer.json").exists()


def test_sampled_accuracy_is_what_sampling_gives() -> None:
    policy = build_policy(0, SMALL)
    warm_up(policy, 0, SMALL, max_operand=9)
    problems = arithmetic.all_problems(9)
    torch.manual_seed(0)
    prompts = torch.tensor([arithmetic.encode(p.prompt) for p in problems]).repeat(20, 1)
    sampled = policy.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=3, do_sample=True, top_k=0, top_p=1.0
    )
    texts = arithmetic.tokenizer().batch_decode(sampled[:, prompts.shape[1] :], skip_special_tokens=True)
    hits = [arithmetic.exact_match(text, p.answer) for text, p in zip(texts, problems * 20, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(sampled_accuracy(policy, problems), abs=0.02)


def test_a_warm_up_on_two_tasks_brings_both_there() -> None:
    policy, tasks = build_policy(0, SMALL), (arithmetic.addition, arithmetic.reversal)
    done = warm_up(policy, 0, SMALL, max_operand=9, tasks=tasks)
    reached = [sampled_accuracy(policy, arithmetic.all_problems(9, task)) for task in tasks]
    assert done.accuracy == min(reached) >= SMALL.warmup_accuracy


def test_problems_of_different_lengths_do_not_disturb_each_other() -> None:
    policy, tasks = build_policy(0, SMALL), (arithmetic.addition, arithmetic.reversal)
    warm_up(policy, 0, SMALL, max_operand=9, tasks=tasks)
    one, other = (arithmetic.all_problems(9, task) for task in tasks)
    alone = (sampled_accuracy(policy, one) + sampled_accuracy(policy, other)) / 2
    assert sampled_accuracy(policy, one + other) == pytest.approx(alone, rel=1e-4)


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(tmp_path: Path) -> None:
    policy = build_policy(0, SMALL)
    save_policy(policy, tmp_path)
    adapted = load_policy(tmp_path, AdapterConfig(r=8, target_modules=["q_proj"]))
    tokens = torch.tensor([arithmetic.encode("07+15=")])
    assert torch.equal(adapted(tokens).logits, policy(tokens).logits)
    assert {name.split(".")[-3] for name, each in adapted.named_parameters() if each.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_a_warm_up_that_does_not_get_there_says_what_to_change() -> None:
    config = ModelConfig(layers=1, warmup_accuracy=0.9, warmup_max_steps=5)
    with pytest.raises(ConfigError, match=r"in 5 steps, not 0\.9; raise model\.warmup_max_steps"):
        warm_up(build_policy(0, config), 0, config, max_operand=9)


def test_a_missing_policy_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"python -m recipes\.prepare"):
        load_policy(tmp_path)
