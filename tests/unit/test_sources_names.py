"""Canonical names under every nesting of wrappers, and which of several tied names is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from tests.tiny_models import build
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import open_source
from twinkle_callbacks.sources.names import canonical, loaded, select, unwrap

# Torch's own import of dynamo warns, FSDP1 is deprecated, and a world of one is too small for it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*FSDP.*"),
]


@pytest.fixture(scope="module", autouse=True)
def gloo_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class DeepSpeedEngine(nn.Module):
    """Has the name and the shape of DeepSpeed's engine, which is recognized without importing DeepSpeed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class LitModule(nn.Module):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.net = policy
        self.models = nn.ModuleList([nn.Linear(2, 2)])


def compile_layers(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)
    return model


def checkpoint_layers(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    return model


def compile_layers_in_place(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.compile()
    return model


def shard(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    if not model.config.tie_word_embeddings:
        fully_shard(model.model)
    return fully_shard(model)


def shard_flat(model: nn.Module) -> nn.Module:
    """By FSDP1, layer by layer; of tied embeddings both ends have to be in one unit, here the root's."""
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def adapt(model: nn.Module) -> nn.Module:
    """With a LoRA adapter that does nothing yet, so that it is merged into the same weights."""
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"]))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": torch.compile,
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "DeepSpeed engine": DeepSpeedEngine,
    "activation checkpoint of the root": checkpoint_wrapper,
    "compile(DDP)": lambda m: torch.compile(DistributedDataParallel(m)),
    "DDP(compile)": lambda m: DistributedDataParallel(torch.compile(m)),
    "compile(DDP(compile))": lambda m: torch.compile(DistributedDataParallel(torch.compile(m))),
    "DeepSpeed engine(compile)": lambda m: DeepSpeedEngine(torch.compile(m)),
    "layers compiled": compile_layers,
    "layers compiled in place": compile_layers_in_place,
    "layers checkpointed": checkpoint_layers,
    "DDP(layers checkpointed, then compiled)": lambda m: DistributedDataParallel(compile_layers(checkpoint_layers(m))),
    "FSDP2": shard,
    "FSDP2(layers checkpointed)": lambda m: shard(checkpoint_layers(m)),
    "FSDP2(layers compiled)": lambda m: shard(compile_layers(m)),
    "compile(FSDP2)": lambda m: torch.compile(shard(m)),
    "FSDP1": shard_flat,
    "FSDP1(layers checkpointed)": lambda m: shard_flat(checkpoint_layers(m)),
    "compile(FSDP1)": lambda m: torch.compile(shard_flat(m)),
    "PEFT": adapt,
    "PEFT(layers checkpointed, then compiled)": lambda m: adapt(compile_layers(checkpoint_layers(m))),
    "DDP(PEFT)": lambda m: DistributedDataParallel(adapt(m)),
    "compile(DeepSpeed engine(PEFT))": lambda m: torch.compile(DeepSpeedEngine(adapt(m))),
    "PEFT(FSDP2)": lambda m: adapt(shard(m)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_wrapped_module_streams_as_the_bare_one(kind: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    want = {name: tensor.clone() for name, tensor in open_source(build(kind)).stream()}
    source = open_source(wrap(build(kind)))
    got = list(source.stream())
    assert [name for name, _ in got] == list(want)
    assert [spec.name for spec in source.specs()] == list(want)
    assert all(torch.equal(tensor, want[name]) for name, tensor in got)


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper, DistributedDataParallel], ids=lambda f: f.__name__)
def test_policy_is_found_through_wrappers_around_it_and_around_its_holder(wrap: Callable[..., nn.Module]) -> None:
    want = [name for name, _ in open_source(build("qwen3")).stream()]
    source = open_source(torch.compile(LitModule(wrap(build("qwen3")))), module="net")
    assert [spec.name for spec in source.specs()] == want


def test_path_goes_through_wrappers_between_its_parts() -> None:
    policy = build("qwen3")
    assert select(DistributedDataParallel(LitModule(torch.compile(policy))), "net.model") is policy.model
    assert isinstance(select(LitModule(policy), "models.0"), nn.Linear)


def test_unknown_path_lists_the_children_at_the_point_where_it_ends() -> None:
    lit = LitModule(build("qwen3"))
    with pytest.raises(SourceError, match=r"module='policy': LitModule has no submodule 'policy'.* 'net', 'models'"):
        open_source(lit, module="policy")
    with pytest.raises(
        SourceError, match=r"'net.backbone': LitModule.net has no submodule 'backbone'.*'model', 'lm_head'"
    ):
        open_source(DistributedDataParallel(lit), module="net.backbone")
    with pytest.raises(SourceError, match=r"its submodules are none"):
        open_source(lit, module="models.0.weight")


def test_only_whole_components_that_wrappers_add_are_dropped() -> None:
    assert canonical("model._orig_mod.layers.0._checkpoint_wrapped_module._fsdp_wrapped_module.w") == "model.layers.0.w"
    assert canonical("my_orig_mod.module.weight") == "my_orig_mod.module.weight"
    assert canonical("_orig_mod") == ""


def test_module_that_is_called_module_keeps_its_name() -> None:
    inner = nn.Module()
    inner.module = nn.Linear(2, 2, bias=False)
    assert [spec.name for spec in open_source(DistributedDataParallel(inner)).specs()] == ["module.weight"]


def test_unwrapping_leaves_a_bare_module_alone() -> None:
    module = nn.Linear(2, 2)
    assert unwrap(module) is module


def test_class_of_a_module_that_nobody_imported_has_no_instances() -> None:
    assert loaded("a_library_that_is_not_loaded", "Model") == ()
    assert loaded("torch.nn", "no_such_class") == ()
    assert loaded("torch.nn", "Linear") == (nn.Linear,)


def test_two_tensors_with_one_canonical_name_are_refused() -> None:
    module = nn.Module()
    module.layer = nn.Linear(2, 2, bias=False)
    module.layer._orig_mod = nn.Linear(2, 2, bias=False)
    with pytest.raises(SourceError, match=r"two different tensors are named 'layer.weight'"):
        open_source(module)


def names(module: nn.Module, path: str = "") -> list[str]:
    return [name for name, _ in open_source(module, module=path).stream()]


class TestTiedWeights:
    def test_first_name_is_kept_where_nothing_else_is_declared(self) -> None:
        module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        module[1].weight = module[0].weight
        assert names(module) == ["0.weight"]

    def test_module_that_stands_at_two_places_is_streamed_once(self) -> None:
        shared = nn.Linear(2, 2)
        assert names(nn.ModuleDict({"a": shared, "b": shared})) == ["a.weight", "a.bias"]

    def test_name_that_a_model_declares_as_tied_is_left_out_also_when_it_comes_first(self) -> None:
        module = nn.ModuleDict({"head": nn.Linear(2, 3, bias=False), "embedding": nn.Embedding(3, 2)})
        module["head"].weight = module["embedding"].weight
        module._tied_weights_keys = {"head.weight": "embedding.weight"}
        assert names(module) == ["embedding.weight"]

    def test_tie_inside_a_holder_is_recognized_by_the_policys_own_declaration(self) -> None:
        assert "lm_head.weight" not in names(LitModule(torch.compile(build("llama"))), "net")

    def test_tie_that_the_model_does_not_declare_is_refused(self) -> None:
        model = build("qwen3")
        first, second = (layer.mlp.gate_proj for layer in model.model.layers)
        second.weight = first.weight
        with pytest.raises(SourceError, match=r"layers.0.mlp.gate_proj.weight, .*layers.1.* share memory"):
            open_source(model)

    def test_declared_tie_that_sharding_broke_is_refused(self) -> None:
        model = build("llama")
        fully_shard(model.model)
        with pytest.raises(SourceError, match=r"lm_head.weight and model.embed_tokens.weight are declared as tied but"):
            open_source(fully_shard(model))
