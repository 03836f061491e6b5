"""Which quantized models can be synced: those that vLLM quantizes itself, as it loads weights that are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ONLINE = ("fp8", "fp8_per_tensor")
"""Values of `--quantization` that take a plain checkpoint and go through the layerwise reload, as tests/gpu shows."""


def is_online(config: VllmConfig) -> bool:
    """Whether vLLM quantizes the plain weights that it is given, at each load anew, and a commit is one load or more.

    Not with several ranks, which vLLM lets agree on scales at each load: they would have to load equally often. And not
    with LoRA.
    """
    model, parallel = config.model_config, config.parallel_config
    checkpoints = (model.hf_config, model.hf_text_config)
    is_plain = not any(getattr(each, "quantization_config", None) for each in checkpoints)
    is_alone = parallel.world_size == parallel.data_parallel_size == 1
    return model.quantization in _ONLINE and is_plain and is_alone and config.lora_config is None


def obstructive(config: VllmConfig) -> str | None:
    """The quantization for which a model cannot be synced; None if there is none in the way."""
    quantization = config.model_config.quantization
    return None if quantization is None or is_online(config) else str(quantization)
