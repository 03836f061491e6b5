"""Which layers of a live model hold only what was loaded, so that a commit to them is copies, and which may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Classes of vLLM (0.26 to 0.32) whose `process_weights_after_loading` makes nothing out of weights on CUDA, and when:
# not where it sets the scales of a quantized cache.
_PASSIVE: dict[str, Callable[[Any], bool]] = {
    "QuantizeMethodBase": lambda method: True,
    "UnquantizedLinearMethod": lambda method: True,
    "UnquantizedEmbeddingMethod": lambda method: True,
    "Attention": lambda layer: getattr(layer, "kv_cache_dtype", "") in ("auto", "float16", "bfloat16", "float32"),
    "AttentionImpl": lambda implementation: True,
    "AttentionImplBase": lambda implementation: True,
    "FlashInferImpl": lambda implementation: getattr(implementation, "sinks", "unknown") is None,  # else converts them
    "MMEncoderAttention": lambda layer: not getattr(layer, "fp8_enabled", True),
}


class UnfitLayer(NamedTuple):
    """A layer that may hold more than copies: the class named may derive something from weights after loading."""

    name: str
    layer: Any
    deriving: str


def obstacle(model: Any) -> str:
    """Why no commit to any layer of this model can be copies; empty if some may be."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return f"on {current_platform.device_type} vLLM may compute with other tensors than those that it loads"
    return obstacle_in_model(model)


def obstacle_in_model(model: Any) -> str:
    """The part of `obstacle` that the model alone tells."""
    if getattr(model, "lora_manager", None) is not None:
        return "the model runs with LoRA"
    if getattr(model, "_do_torchao_reload", False):
        return "torchao reloads all layers of the model whenever some are loaded"
    return ""


def unfit_layers(model: Any) -> list[UnfitLayer]:
    """The layers that may hold more than copies, without those that lie inside another such layer."""
    found: list[UnfitLayer] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        deriving = "" if id(module) in inside else _deriving_class(module)
        if deriving:
            found.append(UnfitLayer(name, module, deriving))
            inside.update(map(id, module.modules()))
    return found


def counted(layers: Sequence[UnfitLayer]) -> str:
    """`48 UnquantizedFusedMoEMethod, 1 MLAAttention`, for messages."""
    return ", ".join(f"{count} {name}" for name, count in Counter(layer.deriving for layer in layers).items())


def _deriving_class(module: Any) -> str:
    for processed in (module, getattr(module, "quant_method", None), getattr(module, "impl", None)):
        owner = _processing_class(processed)
        if owner and not _PASSIVE.get(owner, lambda unknown: False)(processed):
            return owner
    return ""


def _processing_class(processed: Any) -> str:
    """Name of the class that defines `process_weights_after_loading` for this object; empty if none does."""
    owners = (c.__name__ for c in type(processed).__mro__ if "process_weights_after_loading" in vars(c))
    return next(owners, "")
