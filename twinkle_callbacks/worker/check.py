"""Before a commit: would vLLM's own loader take exactly these tensors, all of them, in these shapes?

The question is put to the loader itself: a second instance of the model on the meta device, which has no memory, loads
meta tensors of the staged names and shapes, and every write into a parameter is counted. Nothing of the live model is
touched, so a refusal leaves it as it is. The answer holds as long as the names and shapes stay the same.

What the loader leaves out without a word is logged. An output head is refused there: the server would go on with its
embeddings in the head's place.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twinkle_callbacks.buckets.digest import first_few
from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.buckets.packing import dtype_name, dtype_of
from twinkle_callbacks.errors import WeightMismatchError
from twinkle_callbacks.worker.quantization import is_online

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.twinkle_callbacks")
NamedTensors = Iterable[tuple[str, torch.Tensor]]
HEAD = "lm_head.weight"


class WriteCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Counts the elements written into each storage, and refuses copies between different shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._written: dict[int, int] = {}
        self.writes = 0

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
            self.writes += 1
        return func(*args, **(kwargs or {}))


class LoadCheck:
    """Checks staged names and shapes against one model. Runs on the worker's main thread."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._passed: tuple[TensorSpec, ...] | None = None
        self._left_out_heads: list[str] = []

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Passes if the loader takes these tensors and they fill the model.

        Raises:
            WeightMismatchError: lists what is unexpected, of another shape, and missing.
        """
        specs = tuple(TensorSpec(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items())
        if specs != self._passed:
            self._load(specs)
            self._passed = specs
        for name in self._left_out_heads:
            if not _has_twin(name, tensors):
                raise WeightMismatchError(
                    f"{name} was sent, but vLLM ties the output head of its model to the embeddings and leaves it out; "
                    f"serve a configuration with tie_word_embeddings=False, or tie them in the trainer"
                )

    @property
    def depends_on_values(self) -> bool:
        """Whether the tensors that passed last may not pass with other values: one has to equal another."""
        return bool(self._left_out_heads)

    def _load(self, specs: tuple[TensorSpec, ...]) -> None:
        with shadow_model(self._vllm_config) as model:
            counter = WriteCounter()
            refused: list[str] = []
            silent: list[str] = []
            try:
                with counter:
                    model.load_weights(_noting_silent(_meta_tensors(specs), counter, silent))
            except Exception:  # the loaders have no error type of their own; `_refusals` finds out which tensors it was
                counter = WriteCounter()
                refused = _refusals(model, specs, counter)
            missing = [
                f"{name} ({counter.written(parameter) / parameter.numel():.0%} of it sent)"
                for name, parameter in model.named_parameters()
                if counter.written(parameter) < parameter.numel()
            ]
            # One at a time, for a loader that had only put them aside.
            retried = () if refused else specs
            left_out = [spec.name for spec in retried if spec.name in silent and _writes_nothing(model, spec)]
        if refused or missing:
            raise WeightMismatchError(_explain(refused, missing, specs))
        self._left_out_heads = [name for name in left_out if name.endswith(HEAD)]
        if left_out:
            logger.warning("vLLM's loader leaves out %d of %d: %s", len(left_out), len(specs), first_few(left_out))


def _noting_silent(
    tensors: NamedTensors, counter: WriteCounter, silent: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors; adds to `silent` the names of those after which nothing was written."""
    for name, tensor in tensors:
        before = counter.writes
        yield name, tensor
        if counter.writes == before:
            silent.append(name)


def _writes_nothing(model: Any, spec: TensorSpec) -> bool:
    counter = WriteCounter()
    # A loader complains here about the head of tied embeddings, which it left out when the embeddings came with it.
    with contextlib.suppress(Exception), counter:
        model.load_weights(_meta_tensors([spec]))
    return counter.writes == 0


def _has_twin(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether another tensor has the same values, as embeddings that are tied and sent twice have."""
    tensor = tensors[name]
    others = (other for key, other in tensors.items() if key != name and other.shape == tensor.shape)
    return any(torch.equal(tensor, other) for other in others)


def _refusals(model: Any, specs: Sequence[TensorSpec], counter: WriteCounter) -> list[str]:
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
    if not refused and len(missing) == 1 and missing[0].startswith(HEAD):
        parts.append("does the trainer tie it to the embeddings? Serve a configuration with tie_word_embeddings=True")
    else:
        parts.append("is it the same model, and does `module` name the policy inside the trained module?")
    return "; ".join(parts)


def _meta_tensors(specs: Iterable[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in specs:
        yield spec.name, torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device="meta")


@contextmanager
def shadow_model(vllm_config: VllmConfig) -> Iterator[Any]:
    """A second instance of the model with all parameters on meta, in the loader's layout.

    One that vLLM quantizes online has the layout of the plain model, and quantizing does not run on meta.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = copy.copy(vllm_config)
    compilation = copy.copy(config.compilation_config)
    compilation.static_forward_context = {}  # the live model's layers are registered there under the same names
    if hasattr(compilation, "static_all_moe_layers"):
        compilation.static_all_moe_layers = []
    config.compilation_config = compilation
    if is_online(config):
        config.quant_config = None
    with set_current_vllm_config(config), torch.device("meta"), set_default_torch_dtype(config.model_config.dtype):
        yield initialize_model(config)
