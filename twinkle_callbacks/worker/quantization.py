"""Which quantized models can be synced: those that vLLM quantizes itself, as it loads weights that are not."""

from __future__ import annotations

from typing import Any

_ONLINE = ("fp8",)
"""Methods of `--quantization` that take a plain checkpoint and go through the layerwise reload, as tests/gpu shows."""


def is_online(model_config: Any) -> bool:
    """Whether vLLM quantizes the plain weights that it is given, at each load anew."""
    hf_config = model_config.hf_text_config
    comes_quantized = getattr(hf_config, "quantization_config", None) or getattr(
        model_config.hf_config, "quantization_config", None
    )
    return model_config.quantization in _ONLINE and not comes_quantized


def obstructive(model_config: Any) -> str | None:
    """The quantization for which a model cannot be synced; None if there is none in the way."""
    if model_config.quantization is None or is_online(model_config):
        return None
    return str(model_config.quantization)
