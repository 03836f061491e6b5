"""Bases that bitsandbytes quantized (QLoRA): dequantized on the way to the rollouts, never quantized again.

PEFT's own merge into such a base quantizes the sum again, which loses most of what was trained: the adapter's change is
smaller than a step of the quantization. Here the sum is what is sent. It is exactly what PEFT makes of a plain layer
that holds the dequantized weight:

    packed weight  --bitsandbytes-->  weight in `dtype_of`  --PEFT's merge, in that dtype-->  cast to what is sent

4 bits dequantize to the dtype that the weight had before (`quant_state.dtype`, mostly bfloat16), 8 bits to float32, in
which bitsandbytes scales them; a cast to the rollout's dtype comes last. Rollouts that serve this must run unquantized.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.handles import Handle
from twinkle_callbacks.sources.names import loaded
from twinkle_callbacks.sources.units import Output, Sent, Unit, Wanted

WEIGHT = "weight"
"""The one tensor of a quantized module that is packed."""


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a linear layer or an embedding whose weight bitsandbytes has packed."""
    layer: Any = module
    if _is(layer, "Linear4bit", "Embedding4bit"):
        return _state_4bit(layer) is not None
    return _is(layer, "Linear8bitLt", "Embedding8bit") and layer.weight.dtype == torch.int8


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that the weight of a quantized module dequantizes to."""
    state = _state_4bit(module)
    dtype: torch.dtype = torch.float32 if state is None else state.dtype
    return dtype


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weight of a quantized module in its checkpoint."""
    layer: Any = module
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    shape = (layer.out_features, layer.in_features)
    return shape[::-1] if _was_conv1d(module) else shape


def as_saved(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The unpacked weight of a quantized module, merged or not, as its checkpoint has it."""
    return weight.T if _was_conv1d(module) else weight


def check_packed(path: str, module: nn.Module, handle: Handle) -> None:
    """Raises `SourceError` where the packed weight of a quantized module cannot be dequantized in one place.

    Args:
        path: of the module, for the message.
        module: a quantized module.
        handle: of its packed weight.
    """
    if handle.is_sharded:
        raise SourceError(
            f"{path}.{WEIGHT} is quantized by bitsandbytes and sharded over ranks, so no rank has the scales of all of "
            f"it; sync the adapter alone (merge_and_sync=False), or load the base without quantization"
        )
    state = _state_4bit(module)
    if getattr(state, "packing_format_for_cpu", False):
        raise SourceError(
            f"{path}.{WEIGHT} was packed again by bitsandbytes for inference on this CPU, which cannot be dequantized; "
            f"load the model again, and call train() before its first forward pass"
        )
    if state is None and _scales_8bit(module) is None:
        raise SourceError(f"{path}.{WEIGHT} has 8 bits but no scales (SCB); load the model again")


def unit_of(path: str, module: nn.Module, tensors: Sequence[tuple[str, Handle]], sent: Sent) -> Unit:
    """The unit of a quantized module without adapters: its weight dequantized, and its bias if there is one.

    Args:
        path: canonical path of the module.
        module: the module.
        tensors: its own tensors, as `Holdings.tensors` gives them.
        sent: the dtype of each output.

    Raises:
        SourceError: the weight cannot be dequantized.
    """
    outputs, needs = [], []
    for name, handle in tensors:
        dtype, shape = handle.dtype, handle.shape
        if name == WEIGHT:
            check_packed(path, module, handle)
            dtype, shape = dtype_of(module), shape_of(module)
        full = f"{path}.{name}"
        outputs.append(Output(full, sent(full, dtype), shape, handle))
        needs.append(Wanted(handle, handle.dtype if name == WEIGHT else outputs[-1].dtype))

    def build(gathered: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            (as_saved(module, dequantized(module, tensor)) if name == WEIGHT else tensor).to(output.dtype)
            for (name, _), output, tensor in zip(tensors, outputs, gathered, strict=True)
        ]

    return Unit(tuple(outputs), tuple(needs), build)


def dequantized(module: nn.Module, packed: torch.Tensor) -> torch.Tensor:
    """The weight of a quantized module, in a tensor of its own, in the layout of the layer.

    Args:
        module: the module, for its scales.
        packed: its packed weight.
    """
    import bitsandbytes as bnb

    state = _state_4bit(module)
    if state is not None:
        weight: torch.Tensor = bnb.functional.dequantize_4bit(packed, state)
    else:
        weight = bnb.functional.int8_vectorwise_dequant(packed, _scales_8bit(module).to(packed.device))
    return weight


def make_plain(module: nn.Module, copied: Any) -> None:
    """Turns `copied`, a shadow of a quantized module, into the plain layer that has its weight dequantized."""
    weight = dequantized(module, copied.weight.data)
    copied.__class__ = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    copied.weight = nn.Parameter(weight, requires_grad=False)
    if getattr(copied, "bias", None) is not None:  # some merges need both in one dtype
        copied.bias = nn.Parameter(copied.bias.data.to(weight.dtype), requires_grad=False)


def make_tuner_plain(copied: Any) -> None:
    """Turns `copied`, a shadow of a tuner layer, into the kind that PEFT puts on a plain layer."""
    copied.__class__ = plain_class(type(copied))
    copied.__dict__.setdefault("fan_in_fan_out", False)
    copied.quantization_backend = None


def plain_class(cls: type[Any]) -> type[Any]:
    """The class that PEFT uses on plain layers where it uses `cls` on quantized ones; mostly the same."""
    for base in cls.__mro__:
        package, _, name = base.__module__.rpartition(".")
        if package.startswith("peft.tuners.") and name == "bnb":
            plain: type[Any] = getattr(
                sys.modules[f"{package}.layer"], "SVDLinear" if base.__name__.startswith("SVD") else "Linear"
            )
            return plain
    return cls


def _is(layer: Any, *names: str) -> bool:
    return isinstance(layer, tuple(cls for name in names for cls in loaded("bitsandbytes.nn.modules", name)))


def _was_conv1d(module: nn.Module) -> bool:
    """Whether transformers put the module in the place of a `Conv1D`, as GPT-2 has it, whose weight is transposed."""
    source = getattr(module, "source_cls", None)
    return source is not None and issubclass(source, loaded("transformers.pytorch_utils", "Conv1D"))


def _state_4bit(module: Any) -> Any:
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def _scales_8bit(module: Any) -> Any:
    # They move from the parameter to the module's state in the first forward pass.
    scales = getattr(module.weight, "SCB", None)
    return scales if scales is not None else getattr(getattr(module, "state", None), "SCB", None)
