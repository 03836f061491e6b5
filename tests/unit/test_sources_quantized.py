"""Bases that bitsandbytes quantized: what is sent is PEFT's merge into the dequantized weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tests.peft_cases as cases
from tests.unit.peft_streams import streamed, units_of
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import open_source
from twinkle_callbacks.sources.holdings import Holdings
from twinkle_callbacks.sources.mergeable import check_mergeable
from twinkle_callbacks.sources.quantized import is_quantized

bnb = pytest.importorskip("bitsandbytes")

BITS = [4, 8]
BF16 = torch.bfloat16


def packed(linear: nn.Linear, bits: int) -> nn.Module:
    bias = linear.bias is not None
    if bits == 4:
        made: nn.Module = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias, compute_dtype=BF16)
    else:
        made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to(linear.weight.dtype).to("cpu")  # the move to a device packs


def quantize(model: nn.Module, bits: int) -> Any:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, packed(module, bits))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def unpacked(model: nn.Module) -> Any:
    """A copy in which each quantized layer is a plain one that holds the dequantized weight."""
    made = copy.deepcopy(model)
    for path, module in list(made.named_modules()):
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            weight = peft.utils.integrations.dequantize_module_weight(copy.deepcopy(module))
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight = nn.Parameter(weight.data)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.data.to(weight.dtype))
            parent, _, name = path.rpartition(".")
            setattr(made.get_submodule(parent), name, plain)
    made.is_loaded_in_4bit = made.is_loaded_in_8bit = False
    return made


def pair(bits: int, config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A policy on a quantized base, and PEFT's merge of the same adapter into the same base dequantized."""
    base = quantize(cases.base("qwen3_1", BF16), bits)
    plain = unpacked(base)
    model = cases.wrap(base, copy.deepcopy(config))
    reference = cases.wrap(plain, copy.deepcopy(config))
    adapter = cases.quiet(lambda: peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    cases.quiet(lambda: peft.set_peft_model_state_dict(reference, adapter))
    merged = cases.quiet(lambda: reference.merge_and_unload(safe_merge=True))
    return model, merged.state_dict()


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**cases.LORA),
    "rslora": lambda: peft.LoraConfig(**cases.LORA, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**cases.LORA, use_dora=True),
    "lora_bias": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
    "modules_to_save": lambda: peft.LoraConfig(**cases.LORA, modules_to_save=["lm_head"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=8, target_r=4, total_step=10, target_modules=cases.LINEAR),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=cases.LINEAR),
    "vera": lambda: peft.VeraConfig(r=16, target_modules=cases.ATTENTION),
    "randlora": lambda: peft.RandLoraConfig(r=16, target_modules=cases.ATTENTION),
    "road": lambda: peft.RoadConfig(group_size=32, target_modules=cases.LINEAR),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=cases.LINEAR),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=cases.LINEAR),
    "miss": lambda: peft.MissConfig(r=8, target_modules=cases.LINEAR),
    "shira": lambda: peft.ShiraConfig(r=4, random_seed=1, target_modules=cases.LINEAR),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_merge_into_the_dequantized_base(name: str, bits: int) -> None:
    model, wanted = pair(bits, CONFIGS[name]())
    check_mergeable(model)
    before = {key: (tensor.data_ptr(), tensor.detach().clone()) for key, tensor in model.named_parameters()}
    for _ in range(2):
        made = streamed(units_of(model))
        assert sorted(made) == sorted(wanted)
        assert [key for key in made if not torch.equal(made[key], wanted[key].to(made[key].dtype))] == []
    after = dict(model.named_parameters())
    assert all(after[key].data_ptr() == at and torch.equal(after[key], value) for key, (at, value) in before.items())
    assert any(is_quantized(module) for module in model.modules())


@pytest.mark.parametrize("bits", BITS)
def test_without_adapters(bits: int) -> None:
    model = quantize(cases.base("qwen3_1", BF16), bits)
    wanted = unpacked(model).state_dict()
    made = streamed(units_of(model))
    assert sorted(made) == sorted(wanted)
    assert [key for key in made if not torch.equal(made[key], wanted[key].to(made[key].dtype))] == []
    assert {tensor.dtype for tensor in streamed(units_of(model, BF16)).values()} == {BF16}


@pytest.mark.parametrize("bits", BITS)
def test_disabled_adapters_leave_the_base(bits: int) -> None:
    base = quantize(cases.base("qwen3_1", BF16), bits)
    wanted = unpacked(base).state_dict()
    model = cases.wrap(base, peft.LoraConfig(**cases.LORA))
    model.base_model.disable_adapter_layers()
    made = streamed(units_of(model))
    assert [key for key in made if not torch.equal(made[key], wanted[key].to(made[key].dtype))] == []


@pytest.mark.parametrize("bits", BITS)
def test_the_base_alone(bits: int) -> None:
    base = quantize(cases.base("qwen3_1", BF16), bits)
    wanted = unpacked(base).state_dict()
    model = cases.wrap(base, peft.LoraConfig(**cases.LORA, use_dora=True, modules_to_save=["lm_head"]))
    made = dict(open_source(model, merge=False).stream())
    assert sorted(made) == sorted(wanted)
    assert [key for key in made if not torch.equal(made[key], wanted[key].to(made[key].dtype))] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_dtypes(dtype: torch.dtype) -> None:
    for bits, expected in ((4, dtype), (8, torch.float32)):
        (unit,) = units_of(nn.Sequential(packed(nn.Linear(64, 32).to(dtype), bits)))
        assert {output.name: output.dtype for output in unit.outputs} == {"0.weight": expected, "0.bias": dtype}


def test_after_a_forward_pass() -> None:
    model, wanted = pair(8, CONFIGS["lora"]())
    model(torch.arange(6)[None])  # moves the scales
    made = streamed(units_of(model))
    assert [key for key in made if not torch.equal(made[key], wanted[key].to(made[key].dtype))] == []


def test_what_is_lost_by_quantizing_the_sum_again() -> None:
    model, wanted = pair(4, CONFIGS["lora"]())
    name = "model.layers.0.self_attn.q_proj"
    ours = streamed(units_of(model))[f"{name}.weight"].float()
    layer = cases.quiet(lambda: copy.deepcopy(model).merge_and_unload()).get_submodule(name)
    peft_own = peft.utils.integrations.dequantize_module_weight(layer).float()
    assert torch.equal(ours, wanted[f"{name}.weight"].float())
    assert (peft_own - ours).abs().max() > 0.01


@pytest.mark.parametrize("bits", BITS)
def test_sharded_weights(bits: int) -> None:
    class Sharded(Holdings):
        def tensors(self, module: nn.Module) -> Any:
            for name, handle in super().tensors(module):
                yield name, replace(handle, is_sharded=True)

    plain = quantize(cases.base("qwen3_1", BF16), bits)
    adapted = cases.wrap(copy.deepcopy(plain), peft.LoraConfig(**cases.LORA))
    for model in (plain, adapted):
        with pytest.raises(SourceError, match=r"layers\.0\.\S*\.weight is quantized .* sharded .*merge_and_sync=False"):
            list(units_of(model, held=Sharded(model)))


def test_layers_that_were_conv1d() -> None:
    base = nn.Sequential(packed(nn.Linear(64, 32).to(BF16), 4))
    base[0].source_cls = Conv1D  # as transformers notes it
    base.is_loaded_in_4bit = True
    wanted = unpacked(base)[0].weight.T
    assert torch.equal(streamed(units_of(base))["0.weight"], wanted)
    merged = streamed(units_of(cases.wrap(base, peft.LoraConfig(r=4, target_modules=["0"]))))["0.weight"]
    assert merged.shape == wanted.shape
    assert 0 < (merged - wanted).abs().max() < 0.1


def test_weights_that_are_not_packed_yet() -> None:
    linear = bnb.nn.Linear4bit(64, 32)
    assert not is_quantized(linear)
    assert not is_quantized(nn.Linear(64, 32))
