"""The base model alone: what it was before PEFT put adapters on it, bit for bit, whatever they have learned since."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tests.peft_cases as cases
from tests.tiny_models import saved_tensors
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import open_source

F32, BF16 = torch.float32, torch.bfloat16
Tensors = dict[str, torch.Tensor]

CHANGED = {"bias_all", "kasa", "pissa"}
"""Cases in which PEFT trains the base's own parameters, or takes its weights apart."""


def streamed(model: nn.Module, **options: Any) -> Tensors:
    """The base in a stream, checked against what the source announces."""
    source = open_source(model, merge=False, **options)
    source.check()
    made = {name: tensor.clone() for name, tensor in source.stream()}
    specs = [(spec.name, spec.dtype, tuple(spec.shape)) for spec in source.specs()]
    assert specs == [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in made.items()]
    assert source.agreement() == [f"{name} {dtype}{list(shape)}" for name, dtype, shape in specs]
    return made


def assert_equal(made: Tensors, wanted: Tensors) -> None:
    assert sorted(made) == sorted(wanted)
    assert [name for name in made if made[name].dtype != wanted[name].dtype] == []
    assert [name for name in made if not torch.equal(made[name], wanted[name])] == []


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tensors:
    """The checkpoint of the base, saved when PEFT is about to put adapters on it."""
    tensors: Tensors = {}
    put_on = peft.get_peft_model

    def saving(base: Any, *args: Any, **options: Any) -> Any:
        tensors.update(saved_tensors(base, tmp_path / "base"))
        return put_on(base, *args, **options)

    monkeypatch.setattr(peft, "get_peft_model", saving)
    return tensors


@pytest.mark.parametrize("case", sorted(set(cases.CASES) - CHANGED))
def test_is_the_checkpoint_from_before_the_adapters(case: str, before: Tensors) -> None:
    model = cases.CASES[case](BF16)
    held = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    assert_equal(streamed(model), before)
    assert {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()} == held
    model.base_model.disable_adapter_layers()
    assert_equal(streamed(model), before)


@pytest.mark.parametrize("case", sorted(CHANGED))
def test_what_peft_changes_in_the_base_is_sent_as_it_is_now(case: str, before: Tensors, tmp_path: Path) -> None:
    model = cases.CASES[case](BF16)
    now = saved_tensors(copy.deepcopy(model).unload(), tmp_path / "now")
    assert any(not torch.equal(now[name], tensor) for name, tensor in before.items())
    assert_equal(streamed(model), now)


TIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "embedding_copied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head_copied": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "both_copied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens_apart": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]},
    },
}


@pytest.mark.parametrize("case", TIED)
def test_tied_weights_come_once_whatever_is_put_on_them(case: str, before: Tensors) -> None:
    model = cases.wrap(cases.base("llama", F32), peft.LoraConfig(r=4, **TIED[case]))
    assert_equal(streamed(model), before)


UNMERGEABLE: dict[str, Callable[[], Any]] = {
    "alora": lambda: peft.LoraConfig(**cases.LORA, alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"),
    "lily": lambda: peft.LilyConfig(r=4, stride_A=1, num_B=2, target_modules=cases.LINEAR),
    "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("case", UNMERGEABLE)
def test_adapters_need_no_merge(case: str, before: Tensors) -> None:
    model = cases.wrap(cases.base("qwen3", F32), UNMERGEABLE[case]())
    with pytest.raises(SourceError):
        open_source(model)
    assert_equal(streamed(model), before)


def test_casts(before: Tensors) -> None:
    made = streamed(cases.CASES["dora"](F32), dtype=BF16)
    assert_equal(made, {name: tensor.to(BF16) for name, tensor in before.items()})


def test_a_policy_inside_another_module(before: Tensors) -> None:
    trainer = nn.Module()
    trainer.policy, trainer.value = cases.CASES["modules_to_save"](F32), nn.Linear(4, 1)
    assert_equal(streamed(trainer, module="policy"), before)


def test_wrappers_inside_leave_no_trace_in_names(before: Tensors) -> None:
    model = cases.CASES["modules_to_save"](F32)
    policy = model.base_model.model
    attention = policy.model.layers[0].self_attn
    attention.q_proj.base_layer = checkpoint_wrapper(attention.q_proj.base_layer)
    attention.v_proj = checkpoint_wrapper(attention.v_proj)
    policy.lm_head.original_module = checkpoint_wrapper(policy.lm_head.original_module)
    assert_equal(streamed(model), before)


def test_injected_adapters(tmp_path: Path) -> None:
    model = cases.base("qwen3", F32)
    wanted = saved_tensors(model, tmp_path)
    model.add_adapter(peft.LoraConfig(**cases.LORA))
    cases.randomize(model)
    assert_equal(streamed(model), wanted)


def test_without_adapters_it_is_the_whole_model() -> None:
    model = cases.base("qwen3_moe", F32)
    merged, alone = open_source(model), open_source(model, merge=False)
    assert alone.specs() == merged.specs()
    assert alone.agreement() == merged.agreement()
    assert_equal(dict(alone.stream()), dict(merged.stream()))


def test_adapters_may_come_and_train_meanwhile(before: Tensors) -> None:
    model = cases.CASES["lora"](F32)
    source = open_source(model, merge=False)
    cases.randomize(model, seed=3)
    cases.quiet(lambda: model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["k_proj", "lm_head"])))
    model.set_adapter("second")
    source.check()
    assert_equal(dict(source.stream()), before)


def test_attention_of_torch_after_a_forward_pass() -> None:
    model = cases.wrap(
        nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "head": nn.Linear(16, 4)}),
        peft.LoraConfig(r=4, target_modules=["attention", "head"]),
    )
    inputs = torch.randn(3, 2, 16)
    source = open_source(model, merge=False)
    model.base_model.model["attention"](inputs, inputs, inputs)  # merges and unmerges
    source.check()
    assert_equal(dict(source.stream()), copy.deepcopy(model).unload().state_dict())


def test_merged_into_the_trained_module() -> None:
    model = cases.CASES["lora_two_active"](F32)
    source = open_source(model, merge=False)
    model.merge_adapter()
    for opened in (source.check, lambda: open_source(model, merge=False)):
        with pytest.raises(SourceError, match=r"q_proj: adapter default, second is merged .*unmerge_adapter\(\)"):
            opened()


def test_adaption_prompts() -> None:
    config = peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=4, task_type="CAUSAL_LM")
    model = cases.quiet(lambda: peft.get_peft_model(cases.base("llama", F32), config))
    with pytest.raises(SourceError, match=r"adaption prompts replace whole attentions.*train with LoRA"):
        open_source(model, merge=False)
