"""A plain module tree that did not change is not surveyed again, and every change is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import module as module_source
from twinkle_callbacks.sources import open_source


def policy() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))
    model.register_buffer("table", torch.arange(3.0))
    return model


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows with each survey."""
    made: list[object] = []
    survey = module_source.survey

    def counted(*arguments: object, **options: object) -> object:
        made.append(arguments)
        return survey(*arguments, **options)

    monkeypatch.setattr(module_source, "survey", counted)
    return made


def streamed(source: object) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in source.stream()}


def test_an_unchanged_module_is_surveyed_once_and_its_new_values_are_streamed(surveys: list[object]) -> None:
    model = policy()
    source = open_source(model)
    opened = len(surveys)
    for value in (1.0, 2.0):
        with torch.no_grad():
            model[0].weight.fill_(value)
            model[2][0].bias.data = torch.full((2,), value)
        source.check()
        got = streamed(source)
        assert (got["0.weight"] == value).all()
        assert (got["2.0.bias"] == value).all()
    assert len(surveys) == opened


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.full((4, 4), 7.0))


def replace_layer(model: nn.Sequential) -> None:
    model[0] = nn.Linear(4, 4)
    nn.init.constant_(model[0].weight, 7.0)


def replace_data(model: nn.Sequential) -> None:
    model[0].weight.data = torch.full((4, 4), 7.0)


@pytest.mark.parametrize("change", [replace_parameter, replace_layer, replace_data])
def test_what_took_the_place_of_a_parameter_is_streamed(change: Callable[[nn.Sequential], None]) -> None:
    model = policy()
    source = open_source(model)
    change(model)
    source.check()
    assert (streamed(source)["0.weight"] == 7.0).all()


def grow(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2))


def rename(model: nn.Sequential) -> None:
    model._modules["head"] = model._modules.pop("2")


def recast(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data.double()


def reshape(model: nn.Sequential) -> None:
    model[2][0].bias.data = torch.zeros(3)


def forget(model: nn.Sequential) -> None:
    model._non_persistent_buffers_set.add("table")


def tie(model: nn.Sequential) -> None:
    model[1].bias = model[0].bias


@pytest.mark.parametrize("change", [grow, rename, recast, reshape, forget, tie])
def test_a_tree_of_another_kind_is_refused(change: Callable[[nn.Sequential], None]) -> None:
    model = policy()
    source = open_source(model)
    source.check()
    change(model)
    with pytest.raises(SourceError, match="changed since the source was opened"):
        source.check()


def move(model: nn.Sequential) -> None:
    model[2][0].bias.data = model[2][0].bias.data.clone()


def transpose(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data.t()


def negate(model: nn.Sequential) -> None:
    model[0].weight.data = torch._neg_view(model[0].weight.data)


@pytest.mark.parametrize("change", [replace_parameter, replace_layer, replace_data, move, transpose, negate])
def test_an_arrangement_lasts_while_all_lies_where_it_lay(change: Callable[[nn.Sequential], None]) -> None:
    model = policy()
    source = open_source(model)
    source.check()
    first = source.arrangement
    assert first is not None
    for value in (1.0, 2.0):
        with torch.no_grad():
            model[0].weight.fill_(value)
        source.check()
        assert source.arrangement == first
    change(model)
    source.check()
    second = source.arrangement
    assert second not in (None, first)
    source.check()
    assert source.arrangement == second


class Odd(nn.Parameter):
    """Of a kind that this package does not know."""


def test_what_is_more_than_its_identity_has_no_arrangement() -> None:
    model = policy()
    model[0].weight = Odd(torch.zeros(4, 4))
    source = open_source(model)
    for _ in range(2):
        source.check()
        assert source.arrangement is None


def test_lasting_is_what_lies_in_the_modules_own_memory() -> None:
    model = policy()
    source = open_source(model)
    source.check()
    assert all(source.lasts(tensor) for _, tensor in source.stream())
    assert not source.lasts(torch.zeros(4))
    cast = open_source(model, dtype=torch.bfloat16)
    cast.check()
    assert not any(cast.lasts(tensor) for _, tensor in cast.stream() if tensor.dtype is torch.bfloat16)
