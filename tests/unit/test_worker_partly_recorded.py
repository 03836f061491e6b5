"""Commits of which some layers are recorded copies and others go through the loader, on toy models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from tests.partly_fit import LOADED, PartlyFit, Weights, copy_whole, loaded, memory, shadow, values, weights
from twinkle_callbacks.worker import commit as commit_module
from twinkle_callbacks.worker.commit import Committer
from twinkle_callbacks.worker.layers import UnfitLayer
from twinkle_callbacks.worker.recorded import Layouts, layouts_of
from twinkle_callbacks.worker.routes import find_routes

CPU = torch.device("cpu")
UNFIT = ["packed", "attention"]


def reload(
    model: Any,
    model_config: Any,
    tensors: Iterable[tuple[str, torch.Tensor]],
    device: torch.device,
    reloaded: Sequence[torch.nn.Module] | None = None,
) -> None:
    """Stands in for the layerwise reload, which needs vLLM."""
    modules = [module for layer in ([model] if reloaded is None else reloaded) for module in layer.modules()]
    kernels = {module: module.weight for module in modules if hasattr(module, "quant_method")}
    for module in kernels:
        module.weight = torch.nn.Parameter(torch.full((4, 3), torch.nan), requires_grad=False)
        module.weight.weight_loader = copy_whole
    model.load_weights(tensors)
    for module, kernel in kernels.items():
        module.quant_method.process_weights_after_loading(module)
        module.weight = torch.nn.Parameter(kernel.data.copy_(module.weight), requires_grad=False)
        module._parameters["weight"] = kernel
    for module in modules:
        if hasattr(module, "process_weights_after_loading"):
            module.process_weights_after_loading(None)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_module, "commit", reload)


def committer(model: PartlyFit, **settings: Any) -> Committer:
    settings = {"shadow": partial(shadow, type(model)), "obstacle": lambda model: "", **settings}
    return Committer(model, None, CPU, **settings)


def assert_all_is_loaded(committing: Committer, model: PartlyFit, kind: type[PartlyFit]) -> None:
    """Two commits through the loader, each of which leaves the values of a model of this kind that was just loaded."""
    for seed in range(2):
        committing.commit(weights(seed))
        assert committing.last_way == "loader"
        assert values(model) == values(loaded(kind, weights(seed)))


def test_only_the_layers_that_hold_more_than_copies_go_through_the_loader(caplog: pytest.LogCaptureFixture) -> None:
    model = loaded(PartlyFit, weights(9))
    before = memory(model)
    committing = committer(model)
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        for seed in range(4):
            model.given.clear()
            committing.commit(weights(seed))
            assert committing.last_way == ("partly recorded" if seed else "loader")
            assert values(model) == values(loaded(PartlyFit, weights(seed)))
            if seed:
                assert model.given == [LOADED]
    assert memory(model) == before
    assert [record.message for record in caplog.records] == [
        "the next commits are recorded copies: 5 writes, 0.000 GB, 0 of them in one kernel; 3 of 8 tensors go through "
        "vLLM's loader, for layers that may derive something from weights after loading: 1 Packs, 1 Derives"
    ]


def test_the_second_model_is_made_once_for_tensors_of_the_same_layouts() -> None:
    made = []

    def counting() -> Any:
        made.append(1)
        return shadow()

    committing = committer(loaded(PartlyFit, weights(9)), shadow=counting)
    for seed in range(3):
        committing.commit(weights(seed))
    assert len(made) == 1


@pytest.mark.parametrize("moved", ["qkv", "packed"])
def test_parameters_that_moved_are_loaded_and_recorded_anew(moved: str) -> None:
    model = loaded(PartlyFit, weights(9))
    committing = committer(model)
    committing.commit(weights(0))
    weight = model.get_submodule(moved).weight
    weight.data = weight.data.clone()
    ways = []
    for seed in (1, 2):
        committing.commit(weights(seed))
        ways.append(committing.last_way)
        assert values(model) == values(loaded(PartlyFit, weights(seed)))
    assert ways == ["loader", "partly recorded"]


def test_after_a_reload_that_fails_the_next_commit_goes_through_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(PartlyFit, weights(9))
    committing = committer(model)
    committing.commit(weights(0))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(commit_module, "commit", full)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            committing.commit(weights(1))
    committing.commit(weights(2))
    assert committing.last_way == "loader"
    assert values(model) == values(loaded(PartlyFit, weights(2)))


class NeedsAll(PartlyFit):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors = dict(weights)
        if len(tensors) < 8:
            raise ValueError("where is the rest?")
        super().load_weights(tensors.items())


class NeedsAllNow(PartlyFit):
    """The second model finds nothing of it: it takes all that it is given."""

    def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        if name == "norm.weight" and not tensor.is_meta and "packed.weight" not in self.given[-1]:
            raise ValueError("packed.weight belongs before norm.weight")
        super().load(parameters, name, tensor)


class WritesElsewhere(PartlyFit):
    """With the values that the layer holds already."""

    def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        super().load(parameters, name, tensor)
        if name == "q" and not tensor.is_meta:
            self.attention.derived.fill_(0)


class TakesNothing(PartlyFit):
    def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        if name != "k" or tensor.is_meta or "packed.weight" in self.given[-1]:
            super().load(parameters, name, tensor)


@pytest.mark.parametrize(
    ("kind", "why"),
    {
        NeedsAll: "where is the rest",
        NeedsAllNow: "packed.weight belongs before",
        WritesElsewhere: "writes into a layer that is reloaded",
        TakesNothing: "the loader took nothing of k",
    }.items(),
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_loader_that_treats_parts_otherwise_is_given_all(
    kind: type[PartlyFit], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(kind, weights(9))
    committing = committer(model)
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        assert_all_is_loaded(committing, model, PartlyFit)
    assert len(caplog.records) == 1
    assert why in caplog.text


def test_a_reload_that_leaves_a_layer_out_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Although the layer holds the right values when it is tried."""

    def idle(model: Any, config: Any, tensors: Any, device: Any, reloaded: Any = None) -> None:
        reload(model, config, tensors, device, reloaded and [layer for layer in reloaded if layer is not model.packed])

    class Waits(PartlyFit):
        def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
            if name != "packed.weight" or parameters[name].shape == tensor.shape:
                super().load(parameters, name, tensor)

    monkeypatch.setattr(commit_module, "commit", idle)
    model = loaded(Waits, weights(9))
    committing = committer(model)
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        assert_all_is_loaded(committing, model, PartlyFit)
    assert "leaves other values in 1 of 7 tensors: packed.weight" in caplog.text


def test_a_loader_that_leaves_a_fit_layer_to_the_recorded_copies_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Its tensor cannot be followed, so it is loaded with those of other layers; then nothing is made of it."""

    class Computes(PartlyFit):
        def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
            if name == "norm.bias":
                tensor = tensor * 2
                if "q" not in self.given[-1]:
                    return
            super().load(parameters, name, tensor)

    model = loaded(Computes, weights(9))
    committing = committer(model)
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        assert_all_is_loaded(committing, model, Computes)
    assert "leaves other values in 1 of 7 tensors: norm.bias" in caplog.text


def test_tensors_that_the_loader_computes_with_are_loaded() -> None:
    class Computes(PartlyFit):
        def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
            super().load(parameters, name, tensor * 2 if name == "norm.bias" else tensor)

    model = loaded(Computes, weights(9))
    committing = committer(model)
    for seed in range(3):
        committing.commit(weights(seed))
        assert committing.last_way == ("partly recorded" if seed else "loader")
        assert values(model) == values(loaded(Computes, weights(seed)))
    assert "norm.bias" in model.given[-1]


class Scaled(PartlyFit):
    """Has a scale that only processing makes."""

    def __init__(self, **bases: type) -> None:
        super().__init__(**bases)
        self.stale = False
        method = self.packed.quant_method
        process = method.process_weights_after_loading

        def process_and_scale(layer: Any) -> None:
            process(layer)
            if not hasattr(layer, "scale"):
                layer.register_buffer("scale", torch.zeros(()))
            elif self.stale:
                return
            layer.scale.fill_(layer.weight.abs().max())

        method.process_weights_after_loading = process_and_scale


@pytest.mark.parametrize("stale", [False, True])
def test_what_only_processing_makes_has_to_be_made_anew_by_the_reload(
    stale: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(Scaled, weights(0))
    model.stale = stale
    committing = committer(model)
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        committing.commit(weights(0))
    assert values(model) == values(loaded(Scaled, weights(0)))
    assert ("repeating the copies leaves other values in 1 of" in caplog.text) == stale
    committing.commit(weights(1))
    assert committing.last_way == ("loader" if stale else "partly recorded")
    if not stale:
        assert values(model) == values(loaded(Scaled, weights(1)))


def test_a_reload_that_replaces_a_parameter_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def replacing(model: Any, config: Any, tensors: Any, device: Any, reloaded: Any = None) -> None:
        reload(model, config, tensors, device, reloaded)
        if reloaded is not None:
            model.packed.weight = torch.nn.Parameter(model.packed.weight.clone(), requires_grad=False)

    monkeypatch.setattr(commit_module, "commit", replacing)
    model = loaded(PartlyFit, weights(9))
    before = memory(model)
    committing = committer(model)
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        committing.commit(weights(0))
    assert "replaced or added tensors: packed.weight" in caplog.text
    assert memory(model) == before
    assert values(model) == values(loaded(PartlyFit, weights(0)))


def test_tensors_in_the_memory_of_the_model_are_not_lost_in_a_proof(caplog: pytest.LogCaptureFixture) -> None:
    model = loaded(PartlyFit, weights(9))
    tensors = weights(0) | {"attention.kv_b.weight": model.attention.kv_b.weight.data}
    committing = committer(model)
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        committing.commit(tensors)
    assert "lie in the memory of the model" in caplog.text
    mixed = weights(0) | {"attention.kv_b.weight": weights(9)["attention.kv_b.weight"]}
    assert values(model) == values(loaded(PartlyFit, mixed))


def elsewhere(tensors: Weights, name: str) -> Layouts:
    """Their layouts, as if one was staged in other memory."""
    layouts = layouts_of(tensors)
    return layouts | {name: (*layouts[name][:3], torch.device("cuda", 0))}


def test_tensors_for_the_loader_may_be_staged_elsewhere_but_no_others(caplog: pytest.LogCaptureFixture) -> None:
    model = loaded(PartlyFit, weights(9))
    committing = committer(model)
    for seed, way in ((0, "loader"), (1, "partly recorded")):
        committing.commit(weights(seed), elsewhere(weights(seed), "packed.weight"))
        assert committing.last_way == way
        assert values(model) == values(loaded(PartlyFit, weights(seed)))
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        other = committer(loaded(PartlyFit, weights(9)))
        for seed in (0, 1):
            other.commit(weights(seed), elsewhere(weights(seed), "norm.weight"))
    assert other.last_way == "loader"
    assert "norm.weight is staged on cuda:0" in caplog.text


def test_where_nothing_is_left_to_record_all_is_loaded_once(caplog: pytest.LogCaptureFixture) -> None:
    model = loaded(PartlyFit, weights(9))
    committing = committer(model, unfit_layers=lambda model: [UnfitLayer("", model, "Whole")])
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        for seed in range(2):
            model.given.clear()
            committing.commit(weights(seed))
            assert committing.last_way == "loader"
            assert model.given == [list(weights(seed))]
    assert [record.message for record in caplog.records] == [
        "commits go through vLLM's loader: all tensors are for layers that may derive something from weights after "
        "loading: 1 Whole"
    ]


def test_a_second_model_that_cannot_be_made_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Any:
        raise NotImplementedError("no meta device")

    model = loaded(PartlyFit, weights(9))
    committing = committer(model, shadow=broken)
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        committing.commit(weights(0))
    assert committing.last_way == "loader"
    assert "commits go through vLLM's loader: no meta device" in caplog.text
    assert values(model) == values(loaded(PartlyFit, weights(0)))


def routed(kind: type[PartlyFit], layers: list[str] = UNFIT) -> tuple[set[str], set[str], set[str]]:
    with shadow(kind) as model:
        routes = find_routes(model, layers, layouts_of(weights(0) | {"left.out": torch.ones(2)}))
    return set(routes.into), set(routes.past), set(routes.filled)


@pytest.mark.parametrize("inference", [True, False])
def test_tensors_go_where_the_loader_copies_them(inference: bool) -> None:
    with torch.inference_mode(inference):
        into, past, filled = routed(PartlyFit)
    assert into == {*LOADED, "left.out"}
    assert past == {"q", "k", "v", "norm.weight", "norm.bias"}
    assert filled == {*LOADED, "qkv.weight", "norm.weight", "norm.bias", "attention.correction"}


def test_a_parameter_that_is_filled_in_part_is_not_filled() -> None:
    class LeavesOut(PartlyFit):
        def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
            if name != "v":
                super().load(parameters, name, tensor)

    into, past, filled = routed(LeavesOut)
    assert "v" in into
    assert {"q", "k"} < past
    assert "qkv.weight" not in filled


def test_a_layer_that_the_second_model_lacks_is_an_error() -> None:
    with pytest.raises(AttributeError, match="added_later"):
        routed(PartlyFit, ["added_later"])


@pytest.mark.parametrize("how", ["computes", "casts", "keeps", "gathers", "changes", "reassigns"])
def test_tensors_whose_way_cannot_be_followed_are_loaded(how: str) -> None:
    class Lost(PartlyFit):
        def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
            if name in ("norm.weight", "norm.bias"):
                ways = {
                    "computes": lambda: tensor + 1,
                    "casts": lambda: tensor.double(),
                    "keeps": lambda: torch.empty_like(tensor).copy_(tensor),
                    "gathers": lambda: torch.stack([tensor, tensor])[0],
                    "changes": lambda: tensor.mul_(2),
                    "reassigns": lambda: tensor,
                }
                tensor = ways[how]()
                if how == "reassigns":
                    parameters[name].data = tensor
                    return
            super().load(parameters, name, tensor)

    into, past, _ = routed(Lost)
    assert past == {"q", "k", "v"}
    assert {"norm.weight", "norm.bias"} < into


def test_a_tensor_for_both_kinds_of_layers_is_loaded() -> None:
    class Both(PartlyFit):
        def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
            super().load(parameters, name, tensor)
            if name == "q":
                self.attention.derived.copy_(tensor)

    into, past, _ = routed(Both)
    assert "q" in into
    assert {"k", "v"} < past
