"""Merging on gathered tensors: PEFT's own result, bit for bit, while the trained module stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationMixin  # noqa: F401  (transformers before peft, which loads it otherwise)

import tests.peft_cases as cases
from tests.unit.peft_streams import PlainHoldings, streamed, units_of
from twinkle_callbacks.sources.handles import Handle

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]


def expected(model: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    copied = copy.deepcopy(model)
    reference = cases.quiet(lambda: copied.merge_and_unload(safe_merge=True))
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in reference.state_dict().items()}


def assert_equal(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(made) == sorted(wanted)
    different = [name for name in made if not torch.equal(made[name], wanted[name])]
    assert not different


class Poisoned(PlainHoldings):
    """Gives copies; what the module itself has is NaN by the time of a merge."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
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
    wanted = expected(model, dtype)
    before = snapshot(model)
    assert_equal(streamed(units_of(model)), wanted)
    assert_equal(streamed(units_of(model)), wanted)
    assert snapshot(model) == before


@pytest.mark.parametrize("case", sorted(cases.CASES))
def test_reads_only_what_was_gathered(case: str) -> None:
    model = cases.CASES[case](torch.float32)
    wanted = expected(model)
    held = Poisoned(model)
    units = list(units_of(model, held=held))
    held.poison()
    assert_equal(streamed(iter(units), held.gather), wanted)


def snapshot(model: nn.Module) -> list[Any]:
    """Everything about a module that a merge could change."""
    state: list[Any] = []
    for name, tensor in model.state_dict().items():
        state.append(
            (name, tensor.data_ptr(), tensor._version, tensor.dtype, tensor.double().nan_to_num().sum().item())
        )
    state += [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    for path, module in model.named_modules():
        records = {name: value for name, value in vars(module).items() if type(value) in (list, dict, set, bool)}
        state.append((path, {name: repr(value) for name, value in records.items() if not name.startswith("_modules")}))
    return state
