"""Tiny random models of each kind that the tests train and serve, small enough to load in milliseconds.

Sizes are those that vLLM's CPU attention accepts: head_dim 32 (16 is refused).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.buckets.packing import dtype_name

VOCAB = 64
KINDS = ("qwen3", "llama", "gpt2", "qwen3_moe", "mixtral")

_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    **_TOKENS,
}


def build(kind: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Returns a float32 model in evaluation mode with random weights; the same seed gives the same weights.

    Every parameter is random, norms and biases too, so that no two tensors are equal by chance.

    Args:
        kind: one of `KINDS`: `qwen3` (untied), `llama` (tied embeddings), `gpt2` (tied), `qwen3_moe`, `mixtral`.
        seed: of the weights; the global random state is left as it was.
        config: overrides of the configuration, such as `num_hidden_layers=1`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _create(kind, config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return model


def specs_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[TensorSpec]:
    """What a source of these tensors says of them."""
    return [TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors]


def saved_tensors(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Saves a model into `folder` and returns every tensor of the checkpoint by name."""
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _create(kind: str, config: dict[str, Any]) -> PreTrainedModel:
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**{**_SHAPE, "tie_word_embeddings": False, **config}))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, "tie_word_embeddings": True, **config}))
    if kind == "gpt2":
        shape = {"vocab_size": VOCAB, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, **_TOKENS}
        return GPT2LMHeadModel(GPT2Config(**{**shape, **config}))
    if kind == "qwen3_moe":
        experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_SHAPE, **experts, "tie_word_embeddings": False, **config}))
    if kind == "mixtral":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        return MixtralForCausalLM(MixtralConfig(**{**_SHAPE, **experts, "tie_word_embeddings": False, **config}))
    raise ValueError(f"kind={kind!r}: known are {', '.join(KINDS)}")
