"""Before a commit: would vLLM's own loader take exactly these tensors, all of them, in these shapes?

The question is put to the loader itself: a second instance of the model on the meta device, which has no memory, loads
meta tensors of the staged names and shapes, and every write into a parameter is counted. Nothing of the live model is
touched, so a refusal leaves it as it is. The answer holds as long as the names and shapes stay the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twinkle_callbacks.buckets.digest import first_few
from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.buckets.packing import dtype_of
from twinkle_callbacks.errors import WeightMismatchError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class _WriteCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Counts the elements written into each storage, and refuses copies between different shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._written: dict[int, int] = {}

    def written(self, tensor: torch.Tensor) -> int:
        return self._written.get(tensor.untyped_storage()._cdata, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default):
            target = args[0]
            if func is aten.copy_.default and target.shape != args[1].shape:
                raise ValueError(f"{tuple(args[1].shape)} does not fit {tuple(target.shape)}")
            key = target.untyped_storage()._cdata
            self._written[key] = self._written.get(key, 0) + target.numel()
        return func(*args, **(kwargs or {}))


class LoadCheck:
    """Checks staged names and shapes against one model. Runs on the worker's main thread."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._passed: tuple[TensorSpec, ...] | None = None

    def __call__(self, specs: tuple[TensorSpec, ...]) -> None:
        """Passes if the loader takes these tensors and they fill the model.

        Raises:
            WeightMismatchError: lists what is unexpected, of another shape, and missing.
        """
        if specs == self._passed:
            return
        with _shadow_model(self._vllm_config) as model:
            counter = _WriteCounter()
            refused: list[str] = []
            try:
                with counter:
                    model.load_weights(_meta_tensors(specs))
            except Exception:  # the loaders have no error type of their own; `_refusals` finds out which tensors it was
                counter = _WriteCounter()
                refused = _refusals(model, specs, counter)
            missing = [
                f"{name} ({counter.written(parameter) / parameter.numel():.0%} of it sent)"
                for name, parameter in model.named_parameters()
                if counter.written(parameter) < parameter.numel()
            ]
        if refused or missing:
            raise WeightMismatchError(_explain(refused, missing, specs))
        self._passed = specs


def _refusals(model: Any, specs: Sequence[TensorSpec], counter: _WriteCounter) -> list[str]:
    """Loads one tensor at a time to find all that the loader refuses."""
    refused = []
    for spec in specs:
        try:
            with counter:
                model.load_weights(_meta_tensors([spec]))
        except Exception as error:  # any refusal of a loader belongs in the list, whatever its type
            reason = str(error)
            unknown = isinstance(error, KeyError) or "no module or parameter named" in reason
            why = (
                "unexpected"
                if unknown
                else f"another shape: {reason.splitlines()[0] if reason else type(error).__name__}"
            )
            refused.append(f"{spec.name} {spec.shape} ({why})")
    return refused


def _explain(refused: list[str], missing: list[str], specs: Sequence[TensorSpec]) -> str:
    parts = [
        f"the {len(specs)} tensors sent do not fit the model that vLLM runs, which goes on serving its old weights"
    ]
    if refused:
        parts.append(f"{len(refused)} refused: {first_few(refused)}")
    if missing:
        parts.append(f"{len(missing)} parameters missing: {first_few(missing)}")
    parts.append("is it the same model, and does `module` name the policy inside the trained module?")
    return "; ".join(parts)


def _meta_tensors(specs: Iterable[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in specs:
        yield spec.name, torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device="meta")


@contextmanager
def _shadow_model(vllm_config: VllmConfig) -> Iterator[Any]:
    """A second instance of the model with all parameters on meta, in the loader's layout."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = copy.copy(vllm_config)
    compilation = copy.copy(config.compilation_config)
    compilation.static_forward_context = {}  # the live model's layers are registered there under the same names
    if hasattr(compilation, "static_all_moe_layers"):
        compilation.static_all_moe_layers = []
    config.compilation_config = compilation
    with set_current_vllm_config(config), torch.device("meta"), set_default_torch_dtype(config.model_config.dtype):
        yield initialize_model(config)
