"""The switch from the old weights to the staged ones, through vLLM's own loader and layerwise reload.

One reload session around the whole set, written in place: CUDA graphs keep their addresses, and MoE layers are not
processed twice (vllm#42821).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def commit(model: Any, model_config: Any, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> None:
    """Loads a complete, checked set of checkpoint tensors into the live model. Runs on the worker's main thread."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    _forget_cpu_moe_kernels(model)
    with torch.device(device):
        initialize_layerwise_reload(model)
        try:
            model.load_weights(tensors)
        finally:
            finalize_layerwise_reload(model, model_config)
    _repack_cpu_heads(model)


def _forget_cpu_moe_kernels(model: Any) -> None:
    """Makes the reload set up the experts' kernels as the first load does.

    On CPU the kernel computes with packed expert weights, but packs them only when it is made: a layerwise reload
    (vLLM 0.32, fused_moe/unquantized_fused_moe_method.py) leaves them unpacked and the output silently wrong. Remove
    this when a Qwen3-MoE passes tests/vllm/test_models.py without it.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_cpu_heads(model: Any) -> None:
    """Packs output heads again whose weight is tied to the embedding.

    On CPU a head computes with a packed copy of its weight. A tied head is loaded through the embedding and gets no
    tensor of its own, so the layerwise reload (vLLM 0.32) leaves that copy stale, and the output silently wrong. Remove
    this when a tied Llama passes tests/vllm/test_models.py without it.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)
