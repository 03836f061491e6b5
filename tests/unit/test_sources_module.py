"""What a source over an unsharded module streams is what saving the module would write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny_models import KINDS, build, saved_tensors
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import WeightSource, open_source


class LitModule(nn.Module):
    """Holds its policy as LightningModules do."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.net = policy


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.absent = None
        self.register_parameter("none", None)
        self.register_buffer("bias", torch.randn(3))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("cache", torch.randn(3), persistent=False)


def streamed(source: WeightSource) -> dict[str, torch.Tensor]:
    pairs = [(name, tensor.clone()) for name, tensor in source.stream()]
    assert len(dict(pairs)) == len(pairs), "a name was yielded twice"
    return dict(pairs)


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def kinds_of(source: WeightSource) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(spec.name, spec.dtype, spec.shape) for spec in source.specs()]


@pytest.mark.parametrize("kind", KINDS)
def test_stream_is_bit_for_bit_the_saved_checkpoint(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    assert_same(streamed(open_source(model)), saved_tensors(model, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_model_loaded_from_a_checkpoint_streams_that_checkpoint(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    want = saved_tensors(model, tmp_path)
    assert_same(streamed(open_source(type(model).from_pretrained(tmp_path))), want)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_specs_tell_name_dtype_shape_and_order_of_the_stream(kind: str, dtype: torch.dtype | None) -> None:
    source = open_source(build(kind), dtype=dtype)
    stream = [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in source.stream()]
    assert kinds_of(source) == stream


def test_tied_head_is_left_out_and_the_embedding_kept() -> None:
    names = [name for name, _ in open_source(build("llama")).stream()]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_policy_inside_a_lightning_like_module_keeps_its_own_names(tmp_path: Path) -> None:
    policy = build("qwen3_moe")
    assert_same(streamed(open_source(LitModule(policy), module="net")), saved_tensors(policy, tmp_path))


def test_base_model_selected_by_a_deeper_path_streams_its_own_checkpoint(tmp_path: Path) -> None:
    policy = build("mixtral")
    assert_same(streamed(open_source(LitModule(policy), module="net.model")), saved_tensors(policy.model, tmp_path))


def test_cast_touches_only_floating_point_tensors() -> None:
    router = Router()
    got = streamed(open_source(router, dtype=torch.bfloat16))
    assert got["steps"].dtype == torch.int64
    assert torch.equal(got["weight"], router.weight.detach().to(torch.bfloat16))


def test_cast_leaves_8_bit_floats_as_they_are() -> None:
    module = nn.Linear(2, 2, bias=False)
    module.register_buffer("quantized", torch.zeros(2, 2).to(torch.float8_e4m3fn))
    assert streamed(open_source(module, dtype=torch.bfloat16))["quantized"].dtype == torch.float8_e4m3fn


def test_cast_leaves_what_the_model_declares_as_float32(tmp_path: Path) -> None:
    model = build("qwen3")
    model._keep_in_fp32_modules_strict = {"q_norm"}
    got = streamed(open_source(model, dtype=torch.bfloat16))
    assert {name for name, tensor in got.items() if tensor.dtype == torch.float32} == {
        f"model.layers.{layer}.self_attn.q_norm.weight" for layer in range(2)
    }


def test_persistent_buffers_are_streamed_and_others_are_not() -> None:
    got = streamed(open_source(nn.Sequential(Router())))
    assert sorted(got) == ["0.bias", "0.scale", "0.steps", "0.weight"]
    assert got["0.scale"].shape == ()


def test_names_that_a_model_does_not_save_are_left_out(tmp_path: Path) -> None:
    model = build("qwen3")
    model._keys_to_ignore_on_save = {"lm_head.weight"}
    assert_same(streamed(open_source(model)), saved_tensors(model, tmp_path))


def test_every_stream_reads_the_newest_weights(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    source = open_source(model)
    streamed(source)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step()
    assert_same(streamed(source), saved_tensors(model, tmp_path))


def test_streaming_keeps_nothing_for_autograd_and_leaves_the_consumers_mode_alone() -> None:
    for _, tensor in open_source(build("qwen3_moe"), dtype=torch.bfloat16).stream():
        assert torch.is_grad_enabled()
        assert not tensor.requires_grad


def test_module_is_not_changed_by_streaming() -> None:
    model = build("mixtral")
    before = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    streamed(open_source(model, dtype=torch.bfloat16))
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.requires_grad == before[name][2]
    assert not hasattr(model, "_weight_conversions")


def test_frozen_parameters_are_streamed_too(tmp_path: Path) -> None:
    model = build("gpt2")
    model.transformer.wte.requires_grad_(False)
    assert_same(streamed(open_source(model)), saved_tensors(model, tmp_path))


def test_source_given_as_a_model_is_returned_as_it_is() -> None:
    source = open_source(build("qwen3"))
    assert open_source(source) is source


class TestModuleThatChangedAfterOpening:
    def test_added_parameter(self) -> None:
        module = nn.Linear(2, 2)
        source = open_source(module)
        module.extra = nn.Parameter(torch.zeros(1))
        with pytest.raises(SourceError, match="changed since the source was opened: extra is new"):
            next(source.stream())

    def test_removed_parameter(self) -> None:
        module = nn.Linear(2, 2)
        source = open_source(module)
        module.bias = None
        with pytest.raises(SourceError, match="bias is gone"):
            next(source.stream())

    def test_resized_embedding(self) -> None:
        model = build("qwen3")
        source = open_source(model)
        model.resize_token_embeddings(65, mean_resizing=False)
        with pytest.raises(SourceError, match=r"was float32\[64, 128\] and is float32\[65, 128\]"):
            next(source.stream())

    def test_other_dtype_also_when_it_is_cast_anyway(self) -> None:
        module = nn.Linear(2, 2)
        source = open_source(module, dtype=torch.bfloat16)
        module.half()
        with pytest.raises(SourceError, match=r"weight was float32\[2, 2\] and is float16\[2, 2\]"):
            next(source.stream())

    def test_many_changes_are_counted(self) -> None:
        model = build("qwen3")
        source = open_source(model)
        model.half()
        with pytest.raises(SourceError, match="and 20 more; change the module before training starts"):
            next(source.stream())
