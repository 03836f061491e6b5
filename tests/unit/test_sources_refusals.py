"""What cannot be streamed is refused when the source is opened, with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from transformers import GPTQConfig

from tests.tiny_models import build
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import open_source


class LitModule(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


@pytest.fixture
def gloo_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_something_that_is_no_module() -> None:
    with pytest.raises(SourceError, match=r"got str '/models/policy'; for a checkpoint folder use CheckpointSource"):
        open_source("/models/policy")


def test_adapters_on_a_part_of_the_policy() -> None:
    policy = build("qwen3")
    policy.model = peft.get_peft_model(policy.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(SourceError, match=r"model of Qwen3ForCausalLM is a PeftModel.*wrap the whole policy"):
        open_source(policy)


def test_module_without_parameters() -> None:
    with pytest.raises(SourceError, match=r"ReLU has no parameters; pass the module that is trained, or set module="):
        open_source(nn.ReLU())


def test_module_with_buffers_only() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.zeros(2))
    with pytest.raises(SourceError, match="has no parameters"):
        open_source(module)


def test_parameters_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build("qwen3")
    with pytest.raises(SourceError, match=r"'model.embed_tokens.weight' is on the meta device and has no values"):
        open_source(model)


def test_lazy_parameters_that_no_forward_pass_shaped_yet() -> None:
    with pytest.raises(SourceError, match=r"'1.weight' is not initialized yet; run one forward pass"):
        open_source(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("children", "choices"),
    [
        (["net"], r"set module='net' \(Qwen3ForCausalLM\)$"),
        (["policy", "reference"], r"set module='policy' \(Qwen3ForCausalLM\) or module='reference' "),
    ],
)
def test_holder_of_the_policy_names_the_path_to_set(children: list[str], choices: str) -> None:
    with pytest.raises(SourceError, match=f"LitModule is not the policy itself but holds it.*{choices}"):
        open_source(LitModule(**{name: build("qwen3") for name in children}))


def test_holder_of_the_policy_deeper_inside_wrappers_names_the_canonical_path() -> None:
    holder = LitModule(actor=LitModule(_orig_mod=build("qwen3")))
    with pytest.raises(SourceError, match="set module='actor'"):
        open_source(holder)


def test_model_with_parameters_of_its_own_around_a_transformers_model_is_its_own_policy() -> None:
    names = [spec.name for spec in open_source(LitModule(backbone=build("gpt2"), head=nn.Linear(2, 2))).specs()]
    assert names[0].startswith("backbone.transformer.")
    assert names[-1] == "head.bias"


def test_model_that_another_library_quantized() -> None:
    model = build("qwen3")
    model.hf_quantizer = SimpleNamespace(quantization_config=GPTQConfig(bits=4))
    with pytest.raises(SourceError, match=r"net is quantized by gptq.*load it without quantization, or with bitsandb"):
        open_source(LitModule(net=model, head=nn.Linear(2, 2)))


@pytest.mark.usefixtures("gloo_of_one")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # FSDP1 is deprecated; a world of one
@pytest.mark.parametrize("use_orig_params", [True, False])
class TestFSDP1InAWorldOfOne:
    def wrapped(self, use_orig_params: bool) -> FullyShardedDataParallel:
        holder = LitModule(net=build("qwen3"))
        return FullyShardedDataParallel(holder, device_id=torch.device("cpu"), use_orig_params=use_orig_params)

    def test_flattened_parameters_are_streamed(self, use_orig_params: bool) -> None:
        got = dict(open_source(self.wrapped(use_orig_params), module="net").stream())
        want = dict(open_source(build("qwen3")).stream())
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)

    def test_values_assigned_to_a_parameter_are_streamed(self, use_orig_params: bool) -> None:
        wrapped = self.wrapped(use_orig_params)
        weight = wrapped.module.net.lm_head.weight  # without the original parameters, a view of the flat one
        if use_orig_params:
            weight.data = weight.data + 1
        else:
            weight.data.add_(1)
        got = dict(open_source(wrapped, module="net").stream())
        assert torch.equal(got["lm_head.weight"], build("qwen3").lm_head.weight + 1)

    def test_buffers_keep_their_dtype_though_fsdp_casts_them(self, use_orig_params: bool) -> None:
        holder = LitModule(net=build("qwen3"))
        holder.net.model.norm.register_buffer("scale", torch.rand(3).bfloat16().float())
        bf16 = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
        wrapped = FullyShardedDataParallel(
            holder, device_id=torch.device("cpu"), use_orig_params=use_orig_params, mixed_precision=bf16
        )
        holder.forward = lambda ids: holder.net(input_ids=ids)
        source, want = open_source(wrapped, module="net"), holder.net.model.norm.scale.clone()
        wrapped(torch.zeros(1, 2, dtype=torch.int64))
        assert holder.net.model.norm.scale.dtype == torch.bfloat16
        source.check()
        assert torch.equal(dict(source.stream())["model.norm.scale"], want)

    def test_module_without_the_wrapper_that_flattened_it_is_refused(self, use_orig_params: bool) -> None:
        advice = "pass the whole wrapped module" if use_orig_params else "has no parameters; pass the module"
        with pytest.raises(SourceError, match=advice):
            open_source(self.wrapped(use_orig_params).module, module="net")
