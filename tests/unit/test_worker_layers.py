"""Which layers may hold more than copies of what was loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from twinkle_callbacks.worker.layers import counted, obstacle_in_model, unfit_layers


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Linear(3, 4, bias=False)


def found(model: torch.nn.Module) -> list[tuple[str, str]]:
    layers = unfit_layers(model)
    assert all(model.get_submodule(layer.name) is layer.layer for layer in layers)
    return [(layer.name, layer.deriving) for layer in layers]


def processing(name: str, *bases: type, **attributes: Any) -> Any:
    """An object of a class of this name that processes weights after loading."""
    return type(name, bases, {"process_weights_after_loading": lambda self, layer: None, **attributes})()


def with_layer(**attributes: Any) -> torch.nn.Module:
    model = Toy()
    for name, value in attributes.items():
        setattr(model.down, name, value)
    return model


def attention(implementation: Any = None, **attributes: Any) -> torch.nn.Module:
    layer = processing("Attention", torch.nn.Module, kv_cache_dtype="auto", impl=implementation)
    model = Toy()
    model.attention = layer
    for name, value in attributes.items():
        setattr(layer, name, value)
    return model


class Inherits(type(processing("UnquantizedLinearMethod"))):  # type: ignore[misc]
    """A quantization method that does not process anything of its own."""


def test_layers_that_only_hold_what_was_loaded_can_be_recorded() -> None:
    assert found(Toy()) == []
    for name in ("QuantizeMethodBase", "UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"):
        assert found(with_layer(quant_method=processing(name))) == []
    assert found(with_layer(quant_method=Inherits())) == []
    assert found(with_layer(quant_method=None)) == []
    assert found(attention(processing("AttentionImpl"))) == []
    assert found(attention(processing("FlashInferImpl", sinks=None))) == []
    vision = Toy()
    vision.attention = processing("MMEncoderAttention", torch.nn.Module, fp8_enabled=False)
    assert found(vision) == []


@pytest.mark.parametrize("name", ["Fp8LinearMethod", "UnquantizedFusedMoEMethod", "BaseKVCacheMethod"])
def test_quantized_and_moe_layers_are_not_recorded(name: str) -> None:
    assert found(with_layer(quant_method=processing(name))) == [("down", name)]


def test_attention_that_derives_something_is_not_recorded() -> None:
    mla = Toy()
    mla.attention = processing("MLAAttention", torch.nn.Module)
    assert found(mla) == [("attention", "MLAAttention")]
    assert found(attention(kv_cache_dtype="fp8")) == [("attention", "Attention")]
    flash = [("attention", "FlashInferImpl")]
    assert found(attention(processing("FlashInferImpl", sinks=torch.zeros(1)))) == flash
    assert found(attention(processing("FlashInferImpl"))) == flash  # without the attribute
    assert found(attention(processing("OtherImpl"))) == [("attention", "OtherImpl")]


def test_a_layer_inside_one_that_is_not_recorded_is_its_part() -> None:
    model = Toy()
    outer = processing("MLAAttention", torch.nn.Module)
    outer.inner = processing("MLAAttention", torch.nn.Module)
    model.attention, model.last = outer, processing("Other", torch.nn.Module)
    model.again = outer.inner
    assert found(model) == [("attention", "MLAAttention"), ("last", "Other")]
    assert counted(unfit_layers(model)) == "1 MLAAttention, 1 Other"


def test_a_model_may_be_one_such_layer() -> None:
    assert found(processing("Whole", torch.nn.Module)) == [("", "Whole")]


def test_a_model_with_lora_is_not_recorded() -> None:
    model = Toy()
    model.lora_manager = object()
    assert obstacle_in_model(model) == "the model runs with LoRA"


def test_a_model_that_torchao_reloads_is_not_recorded() -> None:
    model = Toy()
    assert obstacle_in_model(model) == ""
    model._do_torchao_reload = True
    assert "torchao reloads all layers" in obstacle_in_model(model)
