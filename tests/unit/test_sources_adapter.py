"""An adapter alone: the names and values that PEFT saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tests.peft_cases as cases
from tests.tiny_models import build
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.adapter import AdapterSource

F32 = torch.float32
CASES = sorted(set(cases.CASES) - {"mixed", "lora_two_active", "dora_two_active"})


def saved(model: Any, name: str = "default", prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = cases.quiet(lambda: peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    return {prefix + key: tensor for key, tensor in tensors.items()}


def assert_streams(source: AdapterSource, wanted: dict[str, torch.Tensor]) -> None:
    source.check()
    streamed = dict(source.stream())
    assert list(streamed) == list(wanted)
    assert [name for name in wanted if not torch.equal(streamed[name], wanted[name])] == []
    assert [(spec.name, spec.shape) for spec in source.specs()] == [
        (name, tuple(tensor.shape)) for name, tensor in wanted.items()
    ]


@pytest.mark.parametrize("case", CASES)
def test_equals_what_peft_saves(case: str) -> None:
    model = cases.CASES[case](torch.bfloat16)
    source = AdapterSource(model)
    assert_streams(source, saved(model, source.adapter_name))
    cases.randomize(model, seed=5)
    assert_streams(source, saved(model, source.adapter_name))


def test_names_are_those_that_vllm_reads() -> None:
    names = [spec.name for spec in AdapterSource(cases.CASES["lora"](F32)).specs()]
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names


def test_casts() -> None:
    source = AdapterSource(cases.CASES["lora"](F32), dtype=torch.bfloat16)
    assert {spec.dtype for spec in source.specs()} == {"bfloat16"}
    assert {tensor.dtype for _, tensor in source.stream()} == {torch.bfloat16}


def test_one_of_several_adapters() -> None:
    model = cases.CASES["lora_two_active"](F32)
    for name in ("default", "second"):
        assert_streams(AdapterSource(model, adapter_name=name), saved(model, name))


def test_a_policy_inside_another_module() -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = cases.CASES["lora"](F32)
            self.reference = cases.CASES["rslora"](F32)

    trainer = Trainer()
    assert_streams(AdapterSource(trainer, module="policy"), saved(trainer.policy))
    assert_streams(AdapterSource(trainer, module="reference"), saved(trainer.reference))


def test_injected_adapters() -> None:
    model = cases.base("qwen3", F32)
    model.add_adapter(peft.LoraConfig(**cases.LORA))
    cases.randomize(model)
    source = AdapterSource(model)
    assert source.adapter_name == "default"
    assert_streams(source, saved(model, prefix="base_model.model."))


@pytest.mark.parametrize("case", ["lora", "dora", "patterns", "moe_experts", "ia3", "modules_to_save"])
def test_configuration_is_the_one_that_peft_saves(case: str, tmp_path: Path) -> None:
    model = cases.CASES[case](F32)
    config = AdapterSource(model).config
    cases.quiet(lambda: model.save_pretrained(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    for values in (written, config):
        for name, value in values.items():
            values[name] = sorted(value) if isinstance(value, list) else value
    assert config == written


def test_opening_leaves_the_module_alone() -> None:
    model = cases.CASES["modules_to_save"](F32)
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    list(AdapterSource(model).stream())
    assert {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()} == before


def test_unknown_adapter() -> None:
    with pytest.raises(SourceError, match=r"there is no adapter 'other'; those that exist are 'default', 'second'"):
        AdapterSource(cases.CASES["lora_two_active"](F32), adapter_name="other")


def test_several_active_adapters() -> None:
    with pytest.raises(SourceError, match=r"2 adapters are active .*adapter_name: 'default', 'second'"):
        AdapterSource(cases.CASES["lora_two_active"](F32))


def test_no_adapter() -> None:
    with pytest.raises(SourceError, match=r"Qwen3ForCausalLM holds no adapter.*merge_and_sync=True"):
        AdapterSource(cases.base("qwen3", F32))


def test_mixed_adapters() -> None:
    with pytest.raises(SourceError, match=r"PeftMixedModel holds no adapter that PEFT can save alone"):
        AdapterSource(cases.CASES["mixed"](F32))


def test_prompts() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = cases.quiet(lambda: peft.get_peft_model(cases.base("qwen3", F32), config))
    with pytest.raises(SourceError, match=r"'default' is PROMPT_TUNING, which trains a prompt"):
        AdapterSource(model)


def test_tensors_that_peft_computes_when_it_saves() -> None:
    config = peft.VBLoRAConfig(
        r=4, num_vectors=16, vector_length=32, target_modules=cases.ATTENTION, save_only_topk_weights=True
    )
    with pytest.raises(SourceError, match=r"PEFT computes .*save_only_topk_weights"):
        AdapterSource(cases.wrap(cases.base("qwen3", F32), config))


@pytest.mark.parametrize("when", ["before", "later"])
def test_a_base_that_trains_beside_the_adapter_is_refused(when: str) -> None:
    model = cases.CASES["lora"](F32)
    source = None if when == "before" else AdapterSource(model)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    for parameter in norms:
        parameter.requires_grad_(True)
    with pytest.raises(SourceError, match=rf"{len(norms)} parameters of the base train.*norm.*merge_and_sync=True"):
        AdapterSource(model) if source is None else source.check()
    for parameter in norms:
        parameter.requires_grad_(False)
    (source or AdapterSource(model)).check()


def test_a_base_layer_that_trains_below_its_adapter_is_refused() -> None:
    model = cases.CASES["lora"](F32)
    model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    with pytest.raises(SourceError, match=r"1 parameters of the base train.*q_proj\.base_layer\.weight"):
        AdapterSource(model)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_scale_that_the_configuration_does_not_tell_is_refused(use_rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=use_rslora, rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(build("qwen3"), config)
    source = AdapterSource(model)
    source.check()
    model.base_model.model.model.layers[0].self_attn.v_proj.set_scale("default", 0.5)
    with pytest.raises(SourceError, match=r"set_scale.*merge_and_sync=True"):
        source.check()


def test_deleted_adapter() -> None:
    model = cases.CASES["lora_two_active"](F32)
    source = AdapterSource(model, adapter_name="second")
    model.set_adapter("default")
    model.delete_adapter("second")
    with pytest.raises(SourceError, match=r"adapter 'second' was deleted or replaced since the source was opened"):
        source.check()
    with pytest.raises(SourceError, match=r"adapter 'second' was deleted"):
        list(source.stream())


def test_replaced_adapter() -> None:
    model = cases.CASES["lora"](F32)
    source = AdapterSource(model)
    cases.quiet(lambda: model.add_adapter("spare", peft.LoraConfig(**cases.LORA)))
    model.set_adapter("spare")
    model.delete_adapter("default")
    cases.quiet(lambda: model.add_adapter("default", peft.LoraConfig(**cases.LORA)))
    with pytest.raises(SourceError, match=r"deleted or replaced .*lora_A\.weight is gone"):
        source.check()


def test_changed_dtype() -> None:
    model = cases.CASES["lora"](F32)
    source = AdapterSource(model)
    model.bfloat16()
    with pytest.raises(SourceError, match=r"lora_A\.weight was float32\[8, 128\] .* and is bfloat16\[8, 128\]"):
        source.check()
