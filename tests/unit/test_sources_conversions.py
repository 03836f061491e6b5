"""Checkpoint layouts of transformers models: in parts, as early as possible, exactly as saving converts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from tests.tiny_models import build, saved_tensors
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import conversions, open_source
from twinkle_callbacks.sources.conversions import ConversionPlan, plan_conversions
from twinkle_callbacks.sources.holdings import Holdings
from twinkle_callbacks.sources.survey import survey

_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_GROUPS = {"n_group": 1, "topk_group": 1}
_CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_next": {},
    "deepseek_v3": {**_LATENT, **_GROUPS, "num_key_value_heads": 4, "first_k_dense_replace": 1, "head_dim": None},
    "glm4_moe": _GROUPS,
    "gpt_oss": {},
    "llama4_text": {},
    "minimax_m2": {},
    "ernie4_5_moe": {},
    "phimoe": {},
    "granitemoe": {},
    "jamba": {},
    "hrm_text": {},  # trains q, k, v and gate apart that its checkpoint holds as one
    "phi3": {},  # needs no conversion
}
_TEXT_AND_VISION = {
    "text_config": _SHAPE,
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 64,
        "patch_size": 14,
    },
}


def own_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What a module holds, under its own names, as views."""
    units = survey(model, Holdings(model), lambda _, dtype: dtype)
    return {unit.outputs[0].name: unit.needs[0].handle.local() for unit in units}


def from_config(model_type: str, auto: Any = transformers.AutoModelForCausalLM, **values: Any) -> Any:
    given = {name: value for name, value in values.items() if value is not None}
    torch.manual_seed(0)
    model = auto.from_config(transformers.CONFIG_MAPPING[model_type](**given))
    with torch.no_grad():
        for tensor in own_tensors(model).values():
            tensor.copy_(torch.randn(tensor.shape))
    return model


def assert_streams_its_checkpoint(model: Any, folder: Path) -> None:
    source = open_source(model)
    want = saved_tensors(model, folder)
    got = list(source.stream())
    assert sorted(name for name, _ in got) == sorted(want)
    for name, tensor in got:
        assert torch.equal(tensor, want[name]), name
    assert [(spec.name, spec.shape) for spec in source.specs()] == [(name, tuple(t.shape)) for name, t in got]


@pytest.mark.parametrize("model_type", _CONFIGS)
def test_language_models_stream_their_checkpoints_names_and_layout(model_type: str, tmp_path: Path) -> None:
    assert_streams_its_checkpoint(from_config(model_type, **{**_SHAPE, **_CONFIGS[model_type]}), tmp_path)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_conversions_of_models_inside_a_model_apply_at_their_paths(model_type: str, tmp_path: Path) -> None:
    model = from_config(model_type, transformers.AutoModelForImageTextToText, **_TEXT_AND_VISION)
    assert_streams_its_checkpoint(model, tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own import of dynamo
def test_conversions_of_a_wrapped_model_inside_a_model_apply_at_its_canonical_path(tmp_path: Path) -> None:
    model = from_config("qwen3_vl_moe", transformers.AutoModelForImageTextToText, **_TEXT_AND_VISION)
    want = saved_tensors(model, tmp_path)
    model.model.language_model = torch.compile(model.model.language_model)
    got = dict(open_source(model).stream())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt2"])
def test_a_model_whose_adapter_transformers_loaded_streams_its_checkpoints_names(kind: str, tmp_path: Path) -> None:
    base = saved_tensors(build(kind), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    target = "c_attn" if kind == "gpt2" else "q_proj"
    policy = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target], fan_in_fan_out=kind == "gpt2"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    policy.save_pretrained(tmp_path / "adapter")
    merged = saved_tensors(policy.merge_and_unload(safe_merge=True), tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    for source, wanted in ((open_source(loaded), merged), (open_source(loaded, merge=False), base)):
        streamed = dict(source.stream())
        assert streamed.keys() == wanted.keys()
        assert all(torch.equal(streamed[name], tensor) for name, tensor in wanted.items())


def test_router_bias_that_is_a_buffer_travels_with_the_weights() -> None:
    model = from_config("deepseek_v3", **{**_SHAPE, **_CONFIGS["deepseek_v3"]})
    got = {name: tensor.dtype for name, tensor in open_source(model, dtype=torch.bfloat16).stream()}
    assert got["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32
    assert got["model.layers.1.mlp.gate.weight"] == torch.bfloat16


def test_fused_experts_become_one_tensor_for_each_expert() -> None:
    names = [name for name, _ in open_source(build("qwen3_moe")).stream()]
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in names)


def test_group_is_converted_as_soon_as_it_is_complete() -> None:
    model = from_config("hrm_text", **_SHAPE)
    tensors = own_tensors(model)
    plan = plan_conversions(model, {name: tensor.to("meta") for name, tensor in tensors.items()})
    assert plan.largest_group == 4
    taken: list[str] = []

    def tracked() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            taken.append(name)
            yield name, tensor

    latest = {name: taken[-1] for name, _ in plan.stream(tracked())}
    layer = "model.L_module.layers.0"
    assert latest[f"{layer}.attn.o_proj.weight"] == f"{layer}.self_attn.o_proj.weight"
    assert latest[f"{layer}.attn.gqkv_proj.weight"] == f"{layer}.self_attn.gate_proj.weight"
    assert latest[f"{layer}.mlp.gate_up_proj.weight"] == f"{layer}.mlp.up_proj.weight"


def test_any_order_of_the_inputs_gives_the_same_tensors() -> None:
    model = from_config("hrm_text", **_SHAPE)
    tensors = own_tensors(model)
    plan = plan_conversions(model, {name: tensor.to("meta") for name, tensor in tensors.items()})
    forward = dict(plan.stream(tensors.items()))
    backward = dict(plan.stream(reversed(tensors.items())))
    assert forward.keys() == backward.keys()
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


def test_modules_of_other_libraries_pass_through_unchanged() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    tensors = own_tensors(module)
    plan = plan_conversions(module, tensors)
    assert type(plan) is ConversionPlan
    assert list(plan.stream(tensors.items())) == list(tensors.items())


def test_model_that_transformers_cannot_convert_back_is_refused_with_the_reason() -> None:
    model = build("qwen3_moe")
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions[0].quantization_operation = object()
    with pytest.raises(SourceError, match=r"cannot convert Qwen3MoeForCausalLM back .*ValueError: Cannot reverse"):
        open_source(model)


def test_plan_that_differs_from_transformers_own_conversion_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_config("hrm_text", **_SHAPE)
    rename = conversions._rename

    def every_name_a_group_of_its_own(name: str, transforms: list[Any], *, first_only: bool) -> str | None:
        group = rename(name, transforms, first_only=first_only)
        return f"{group} {name}" if group and first_only else group

    monkeypatch.setattr(conversions, "_rename", every_name_a_group_of_its_own)
    with pytest.raises(SourceError, match=r"converting HrmTextForCausalLM in parts gives other tensors .*gqkv_proj"):
        open_source(model)
