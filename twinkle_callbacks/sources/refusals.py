"""What cannot be streamed, and what to do instead. Checked when a source is opened, before training starts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.names import canonical, loaded, peft_wrappers
from twinkle_callbacks.sources.units import Unit


def refuse_wrong_root(module: nn.Module) -> None:
    """Raises `SourceError` where every parameter lies in transformers models below `module`, which is none itself.

    Streamed from here, names would carry a prefix that no checkpoint has.
    """
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    if isinstance(module, pretrained):
        return
    found: dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        if isinstance(child, pretrained) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = child
    held = {id(parameter) for child in found.values() for parameter in child.parameters()}
    if not found or any(id(parameter) not in held for parameter in module.parameters()):
        return
    choices = " or ".join(f"module={canonical(path)!r} ({type(child).__name__})" for path, child in found.items())
    raise SourceError(
        f"{type(module).__name__} is not the policy itself but holds it, so its parameters' names are not those of a "
        f"checkpoint; set {choices}"
    )


def refuse_inner_adapters(module: nn.Module) -> None:
    """Raises `SourceError` where PEFT wraps a part of the policy, whose names it would give a prefix of its own."""
    wrappers = peft_wrappers()
    for path, child in module.named_modules():
        if isinstance(child, wrappers):
            raise SourceError(
                f"{canonical(path)} of {type(module).__name__} is a {type(child).__name__} of its own, so names inside "
                f"it are not those of a checkpoint; set module={canonical(path)!r} if that is the policy, or wrap the "
                f"whole policy with get_peft_model(), with target_modules that match this part"
            )


def refuse_quantized(module: nn.Module) -> None:
    """Raises `SourceError` where transformers quantized the model by a library that nobody here turns back."""
    for path, child in module.named_modules():
        quantizer = getattr(child, "hf_quantizer", None)
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "bitsandbytes")
        method = str(getattr(method, "value", method))
        if method != "bitsandbytes":
            raise SourceError(
                f"{canonical(path) or type(child).__name__} is quantized by {method}, whose weights cannot be turned "
                f"back into those that a rollout loads; load it without quantization, or with bitsandbytes"
            )


def refuse_empty(module: nn.Module, units: Sequence[Unit]) -> None:
    """Raises `SourceError` where there is nothing to stream."""
    buffers = {canonical(name) for name, _ in module.named_buffers()}
    if all(output.name in buffers for unit in units for output in unit.outputs):
        raise SourceError(
            f"{type(module).__name__} has no parameters; pass the module that is trained, or set module=..."
        )
