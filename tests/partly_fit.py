"""A model of which some layers hold only what was loaded, and others make something out of it afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def copy_whole(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
    param.data.copy_(loaded_weight)


def copy_rows(param: torch.nn.Parameter, loaded_weight: torch.Tensor, first_row: int) -> None:
    param.data.narrow(0, first_row, loaded_weight.shape[0]).copy_(loaded_weight)


class Packs:
    """A quantization method that transposes the weight."""

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = torch.nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)


class Derives:
    """Attention that derives a buffer from the weights of a layer inside it and of one elsewhere."""

    def fill(self, elsewhere: torch.nn.Linear, shared: torch.nn.Parameter) -> None:
        self.kv_b = torch.nn.Linear(4, 4, bias=False)
        self.correction = shared
        self.register_buffer("derived", torch.zeros(4, 4))  # type: ignore[attr-defined]
        self.__dict__["elsewhere"] = elsewhere

    def process_weights_after_loading(self, act_dtype: Any) -> None:
        self.derived.copy_(self.kv_b.weight @ self.elsewhere.weight[:4])  # type: ignore[attr-defined]


class PartlyFit(torch.nn.Module):
    """Loads as vLLM's models do.

    Fit are `qkv`, `norm` and `router`, whose weight the attention shares; not fit are `packed` and `attention`.

    Args:
        method: base class of the quantization method of `packed`.
        attention: base class of `attention`.
    """

    def __init__(self, method: type = object, attention: type = torch.nn.Module) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(4, 8, bias=False)
        self.norm = torch.nn.LayerNorm(4)
        self.packed = torch.nn.Linear(3, 4, bias=False)
        self.packed.quant_method = type("Packs", (Packs, method), {})()
        self.router = torch.nn.Linear(4, 2, bias=False)
        deriving = type("Derives", (Derives, attention), {"__init__": torch.nn.Module.__init__})
        self.attention = deriving()
        self.attention.fill(self.qkv, self.router.weight)
        self.requires_grad_(False)
        for parameter in self.parameters():
            parameter.weight_loader = copy_whole  # type: ignore[attr-defined]
        self.qkv.weight.weight_loader = copy_rows  # type: ignore[assignment]
        self.given: list[list[str]] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.given.append([])
        parameters: dict[str, Any] = dict(self.named_parameters())
        for name, tensor in weights:
            self.given[-1].append(name)
            self.load(parameters, name, tensor)

    def load(self, parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        if name in ("q", "k", "v"):
            fused = parameters["qkv.weight"]
            fused.weight_loader(fused, tensor, {"q": 0, "k": 4, "v": 6}[name])
        elif name in parameters:
            parameters[name].weight_loader(parameters[name], tensor)


LOADED = ["packed.weight", "attention.kv_b.weight", "router.weight"]
"""What goes through the loader: the last since the attention shares it."""


def weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (4, 4), "packed.weight": (4, 3), "k": (2, 4), "norm.weight": (4,), "attention.kv_b.weight": (4, 4)}
    shapes |= {"v": (2, 4), "norm.bias": (4,), "router.weight": (2, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def values(model: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def memory(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors}


def loaded(kind: type[PartlyFit], tensors: Weights) -> PartlyFit:
    """A new model, loaded and processed once, as at the start of a server."""
    model = kind()
    model.load_weights(tensors.items())
    with torch.no_grad():
        model.packed.quant_method.process_weights_after_loading(model.packed)
        model.attention.process_weights_after_loading(None)
    return model


@contextmanager
def shadow(kind: type[PartlyFit] = PartlyFit) -> Iterator[PartlyFit]:
    with torch.device("meta"):
        yield kind()
