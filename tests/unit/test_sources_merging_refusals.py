"""Adapters that cannot be merged, or not rightly, are refused when a source is opened, with what to do instead."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.functional import set_adapter
from torch import nn

import tests.peft_cases as cases
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.mergeable import check_mergeable

F32 = torch.float32


def qwen3() -> Any:
    return cases.base("qwen3", F32)


def refused(model: nn.Module, pattern: str) -> None:
    with pytest.raises(SourceError, match=pattern):
        check_mergeable(model)


def test_without_peft_there_is_nothing_to_refuse() -> None:
    check_mergeable(qwen3())


CAUSAL = {"task_type": "CAUSAL_LM"}
PROMPTS = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **CAUSAL),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts(kind: str) -> None:
    model = cases.quiet(lambda: peft.get_peft_model(qwen3(), PROMPTS[kind]()))
    refused(model, rf"'default' is {kind}, which trains a prompt and no weights.*train with LoRA")


INPUT_DEPENDENT = {
    "POLY": lambda: peft.PolyConfig(r=4, n_tasks=2, target_modules=cases.LINEAR),
    "LILY": lambda: peft.LilyConfig(r=4, stride_A=1, num_B=2, target_modules=cases.LINEAR),
}


@pytest.mark.parametrize("kind", INPUT_DEPENDENT)
def test_effects_that_depend_on_the_input(kind: str) -> None:
    model = cases.quiet(lambda: peft.get_peft_model(qwen3(), INPUT_DEPENDENT[kind]()))
    refused(model, rf"'default' is {kind}, which cannot be merged into weights: its .*train with LoRA")


def test_adaption_prompts() -> None:
    config = peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=4, **CAUSAL)
    model = cases.quiet(lambda: peft.get_peft_model(cases.base("llama", F32), config))
    refused(model, r"'default' is ADAPTION_PROMPT, .*prompts to attentions")


def test_xlora(tmp_path: Any) -> None:
    cases.CASES["lora"](F32).save_pretrained(tmp_path / "one")
    config = peft.XLoraConfig(hidden_size=128, adapters={"one": str(tmp_path / "one")}, **CAUSAL)
    base = qwen3()
    base.config.use_cache = False
    model = cases.quiet(lambda: peft.get_peft_model(base, config))
    refused(model, r"is XLORA, which cannot be merged into weights: .*scaled for each input")


def test_alora() -> None:
    model = cases.wrap(qwen3(), peft.LoraConfig(**cases.LORA, alora_invocation_tokens=[3, 4], **CAUSAL))
    refused(model, r"self_attn\.q_proj: adapter 'default' is aLoRA, which PEFT cannot merge")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: peft.LoraConfig(r=4, target_modules=["up_proj"], lora_bias=True), id="lora_bias"),
        pytest.param(lambda: peft.BeftConfig(target_modules=["up_proj"]), id="beft"),
    ],
)
def test_biases_with_nowhere_to_go(config: Any) -> None:
    model = cases.quiet(lambda: peft.get_peft_model(qwen3(), config()))
    refused(model, r"mlp\.up_proj: adapter 'default' trains a bias, but the Linear there has none .*target_modules")


def test_convolutions_with_groups() -> None:
    model = cases.wrap(nn.Sequential(nn.Conv1d(8, 8, 3, groups=2)), peft.LoraConfig(r=4, target_modules=["0"]))
    refused(model, r"groups=2")


def test_layers_without_a_merge() -> None:
    model = cases.CASES["lora"](F32)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = type("GPTQLoraLinear", (nn.Module, peft.tuners.lora.LoraLayer), {})
    refused(model, r"layers\.0\.self_attn\.q_proj: PEFT has no merge for its GPTQLoraLinear on a Linear")


def test_merged_into_the_trained_module() -> None:
    model = cases.CASES["lora"](F32)
    model.merge_adapter()
    refused(model, r"self_attn\.q_proj: adapter default is merged into the module that trains, .*unmerge_adapter\(\)")
    model.unmerge_adapter()
    check_mergeable(model)


def test_unknown_active_adapter() -> None:
    model = cases.CASES["lora"](F32)
    model.base_model.set_adapter("missing")
    refused(model, r"adapter 'missing' is active but does not exist; those that do are 'default'.*set_adapter\(\)")


def test_unknown_active_adapter_of_injected_layers() -> None:
    model = cases.quiet(lambda: peft.inject_adapter_in_model(peft.LoraConfig(**cases.LORA), qwen3()))
    check_mergeable(model)
    set_adapter(model, "missing")
    refused(model, r"q_proj: adapter 'missing' is active but does not exist; those that do are 'default'")


def test_disabled_on_some_layers_only() -> None:
    model = cases.CASES["lora"](F32)
    model.base_model.model.model.layers[0].mlp.up_proj.enable_adapters(False)
    refused(model, r"disabled on \S*layers\.0\.mlp\.up_proj but enabled on \S*layers\.0\.self_attn\.q_proj")


def test_two_ln_tunings() -> None:
    model = cases.CASES["ln_tuning"](F32)
    config = peft.LNTuningConfig(target_modules=["input_layernorm", "model.norm"])
    cases.quiet(lambda: model.add_adapter("second", config))
    model.base_model.set_adapter(["default", "second"])
    refused(model, r"only one adapter of LN tuning can be active, not default, second")


def test_tokens_of_two_adapters_overlap() -> None:
    model = cases.CASES["token_layer"](F32)
    config = peft.TrainableTokensConfig(token_indices=[5, 7], target_modules=["embed_tokens"])
    cases.quiet(lambda: model.add_adapter("second", config))
    model.base_model.set_adapter(["default", "second"])
    refused(model, r"embed_tokens: Token indices of adapter second are already defined.*different tokens")


ENDS = r"lm_head\.weight and \S*model\.embed_tokens\.weight are one tensor, but PEFT adds "
TIED = {
    "lora": ({"target_modules": ["embed_tokens", "q_proj"]}, r"Embedding \(default\) to \S*embed_tokens.*nothing to"),
    "lora_head": ({"target_modules": ["lm_head"]}, r"nothing to \S*embed_tokens.*Linear \(default\) to \S*lm_head"),
    "lora_both": ({"target_modules": ["lm_head", "embed_tokens"]}, r"Embedding .*Linear"),
    "modules_to_save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        r"a trained copy to \S*embed_tokens\.weight, nothing to \S*lm_head",
    ),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_weights_treated_differently(case: str) -> None:
    settings, pattern = TIED[case]
    model = cases.wrap(cases.base("llama", F32), peft.LoraConfig(r=4, **settings))
    refused(model, ENDS + pattern + r".*ensure_weight_tying=True.*tie_word_embeddings=False")


def test_tied_weights_with_different_tokens() -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3]}
    )
    refused(cases.wrap(cases.base("llama", F32), config), ENDS + "trainable tokens .*trainable tokens")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, id="modules_to_save"),
        pytest.param({"target_modules": ["q_proj", "embed_tokens"]}, id="lora"),
        pytest.param({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, id="tokens"),
    ],
)
def test_tied_weights_treated_alike(settings: Any) -> None:
    tying = "trainable_token_indices" not in settings
    config = peft.LoraConfig(r=4, ensure_weight_tying=tying, **settings)
    check_mergeable(cases.wrap(cases.base("llama", F32), config))


def test_tied_adapters_that_sharding_parted() -> None:
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = cases.wrap(cases.base("llama", F32), config)
    head = model.base_model.model.lm_head
    head.lora_A["default"].weight = nn.Parameter(head.lora_A["default"].weight.detach().clone())
    refused(model, ENDS)


def test_replicated_layers() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    refused(cases.wrap(qwen3(), config), r"layers\.1\..*layers\.2\..*are one tensor")
