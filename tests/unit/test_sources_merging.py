"""Merging on gathered tensors: PEFT's own result, bit for bit, while the trained module stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tests.peft_cases as cases
from tests.unit.peft_streams import streamed, units_of
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import WeightSource, open_source
from twinkle_callbacks.sources.handles import Handle
from twinkle_callbacks.sources.holdings import Holdings
from twinkle_callbacks.sources.mergeable import check_mergeable
from twinkle_callbacks.sources.merging import is_part, merged

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]


def expected(model: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    copied = copy.deepcopy(model)
    reference = cases.quiet(lambda: copied.merge_and_unload(safe_merge=True))
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in reference.state_dict().items()}


def assert_equal(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(made) == sorted(wanted)
    different = [name for name in made if not torch.equal(made[name], wanted[name])]
    assert not different


class Poisoned(Holdings):
    """Gives copies; what the module itself has is NaN by the time of a merge."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._copies: dict[Handle, torch.Tensor] = {}
        self._model = model
        self.tensors_held: list[torch.Tensor] = []

    def tensors(self, module: nn.Module) -> Any:
        for name, handle in super().tensors(module):
            self._copies.setdefault(handle, handle.local().clone())
            self.tensors_held.append(getattr(module, name))
            yield name, handle

    def gather(self, wanted: Any) -> torch.Tensor:
        return self._copies[wanted.handle].to(wanted.dtype)

    def poison(self) -> None:
        held = {id(tensor) for tensor in self.tensors_held}
        for tensor in [*self._model.parameters(), *self._model.buffers()]:
            if isinstance(tensor, nn.Parameter) or id(tensor) in held:  # FRoD reads buffers of its model, never sharded
                tensor.data.copy_(torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", sorted(cases.CASES))
def test_equals_peft_bit_for_bit_and_leaves_the_module_alone(case: str, dtype: torch.dtype) -> None:
    model = cases.CASES[case](dtype)
    check_mergeable(model)
    wanted = expected(model, dtype)
    before, trained = snapshot(model), values(model)
    assert_equal(streamed(units_of(model)), wanted)
    assert_equal(streamed(units_of(model)), wanted)
    assert snapshot(model) == before
    assert_equal(values(model), trained)


@pytest.mark.parametrize("case", sorted(set(cases.LORA_CASES) - {"mixed"}))
def test_a_source_streams_the_merged_policy(case: str) -> None:
    model = cases.CASES[case](torch.bfloat16)
    copied = copy.deepcopy(model)
    merged = cases.quiet(lambda: copied.merge_and_unload(safe_merge=True)).bfloat16()
    assert_equal(copies(open_source(model)), copies(open_source(merged)))


def copies(source: WeightSource) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in source.stream()}


@pytest.mark.parametrize("case", sorted(cases.CASES))
def test_reads_only_what_was_gathered(case: str) -> None:
    model = cases.CASES[case](torch.float32)
    wanted = expected(model)
    held = Poisoned(model)
    units = units_of(model, held=held)
    held.poison()
    assert_equal(streamed(units, held.gather), wanted)


def snapshot(model: nn.Module) -> list[Any]:
    """Where a module's tensors are, what trains, and what PEFT notes down about merges."""
    state: list[Any] = [(name, tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()]
    state += [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    for path, module in model.named_modules():
        if is_part(module):
            notes = {
                name: repr(value) for name, value in vars(module).items() if type(value) in (list, dict, set, bool)
            }
            state.append((path, notes | {"_modules": "", "_parameters": "", "_buffers": ""}))
    return state


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_hundred_streams_drift_by_nothing() -> None:
    model = cases.CASES["dora"](torch.bfloat16)
    first, trained = streamed(units_of(model)), values(model)
    for _ in range(100):
        last = streamed(units_of(model))
    assert_equal(last, first)
    assert_equal(values(model), trained)


def test_casts_after_the_merge() -> None:
    model = cases.CASES["lora"](torch.float32)
    assert_equal(streamed(units_of(model, torch.bfloat16)), expected(model, torch.bfloat16))


def test_units_are_built_again_from_newer_values() -> None:
    model = cases.CASES["lora_two_active"](torch.bfloat16)
    units = units_of(model)
    streamed(units)
    cases.randomize(model, seed=3)
    assert_equal(streamed(units), expected(model))


def test_what_no_merge_changes_keeps_its_identity() -> None:
    model = cases.CASES["moe_one_parameter"](torch.float32)
    held = Holdings(model)
    outputs = {output.name: output for unit in units_of(model, held=held) for output in unit.outputs}
    experts = model.base_model.model.model.layers[0].mlp.experts
    names = dict(held.tensors(experts.get_base_layer()))
    assert outputs["model.layers.0.mlp.experts.gate_up_proj"].identity is names["gate_up_proj"]
    assert outputs["model.layers.0.mlp.experts.down_proj"].identity == ("merged", names["down_proj"])


def test_tied_tokens_are_one_tensor() -> None:
    model = cases.CASES["trainable_tokens_tied"](torch.float32)
    outputs = {output.name: output for unit in units_of(model) for output in unit.outputs}
    assert outputs["lm_head.weight"].identity == outputs["model.embed_tokens.weight"].identity


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_lora_is_added_once(target: str) -> None:
    # PEFT's own merge adds it twice, once from each end of the tie; what the model computes with is W + BA.
    config = peft.LoraConfig(r=4, target_modules=[target, "q_proj"], ensure_weight_tying=True)
    model = cases.wrap(cases.base("llama", torch.float32), config)
    check_mergeable(model)
    outputs = {output.name: output for unit in units_of(model) for output in unit.outputs}
    assert outputs["lm_head.weight"].identity == outputs["model.embed_tokens.weight"].identity
    made = streamed(units_of(model))
    torch.testing.assert_close(made["lm_head.weight"], made["model.embed_tokens.weight"])
    plain = cases.base("llama", torch.float32)
    plain.load_state_dict(made)
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(plain(tokens).logits, model(tokens).logits)


def test_disabled_adapters_leave_the_base_model() -> None:
    for case in ("lora", "modules_to_save", "trainable_tokens_tied", "ln_tuning"):
        model = cases.CASES[case](torch.float32)
        base = copy.deepcopy(model).unload().state_dict()
        model.base_model.disable_adapter_layers()
        check_mergeable(model)
        original = dict(base)
        if case == "modules_to_save":  # unload() keeps its trained copy, which a disabled adapter does not use
            original = cases.base("qwen3", torch.float32).state_dict()
        assert_equal(streamed(units_of(model)), original)


def test_an_adapter_that_a_layer_lacks_is_not_merged_there() -> None:
    model = cases.CASES["lora_one_of_two"](torch.float32)  # the second adapter has no up_proj
    base = cases.base("qwen3", torch.float32).state_dict()
    made = streamed(units_of(model))
    assert torch.equal(made["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(
        made["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )


def test_adapters_that_take_no_part_are_not_gathered_and_may_come_later() -> None:
    model = cases.CASES["lora"](torch.float32)
    source = open_source(model)
    before = {name: tensor.clone() for name, tensor in source.stream()}
    cases.quiet(lambda: model.add_adapter("reference", peft.LoraConfig(**{**cases.LORA, "r": 2})))
    source.check()
    after = dict(source.stream())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    needed = merged("q_proj", layer, Holdings(layer), lambda _, dtype: dtype).needs
    assert [wanted.handle.shape for wanted in needed if wanted.handle.shape[0] == 2] == []


def test_attention_of_torch() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.head = nn.Linear(16, 4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(inputs, inputs, inputs)[0])

    model = cases.wrap(Attending(), peft.LoraConfig(r=4, target_modules=["attention", "head"]))
    check_mergeable(model)
    assert_equal(streamed(units_of(model)), expected(model))
    model(torch.randn(3, 2, 16))  # merges and unmerges the attention
    assert_equal(streamed(units_of(model)), expected(model))


def test_convolutions() -> None:
    layers = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv2d(6, 8, 3))
    for settings in ({}, {"use_dora": True}):
        model = cases.wrap(copy.deepcopy(layers), peft.LoraConfig(r=4, target_modules=["0", "1"], **settings))
        check_mergeable(model)
        assert_equal(streamed(units_of(model)), expected(model))


def test_wrappers_inside_leave_no_trace_in_names() -> None:
    model = cases.CASES["lora"](torch.float32)
    wanted = expected(model)
    layer = model.base_model.model.model.layers[0]
    layer.self_attn.q_proj.base_layer = checkpoint_wrapper(layer.self_attn.q_proj.base_layer)
    layer.self_attn.v_proj = checkpoint_wrapper(layer.self_attn.v_proj)
    check_mergeable(model)
    assert_equal(streamed(units_of(model)), wanted)


def test_autocast_around_a_stream_changes_nothing() -> None:
    model = cases.CASES["lora"](torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = streamed(units_of(model))
    assert_equal(made, expected(model))


def test_hooks_and_replaced_forwards_are_not_run() -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a merge ran the trained module")

    model = cases.CASES["glora"](torch.float32)  # its merge calls modules
    wanted = expected(model)
    for module in model.modules():
        module.register_forward_pre_hook(fail)
        module.register_forward_hook(fail)
        module._compiled_call_impl = fail  # as module.compile() does
    assert_equal(streamed(units_of(model)), wanted)


def test_broken_adapter_names_its_layer() -> None:
    model = cases.CASES["lora"](torch.float32)
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight[0, 0] = float("inf")
    with pytest.raises(SourceError, match=r"model\.layers\.1\.self_attn\.v_proj: .*default.*NaNs detected"):
        streamed(units_of(model))
