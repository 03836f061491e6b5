"""The policies that `bench_gather.py` gathers: about 70 M parameters each, in float32 and with random weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 32_000
LAYERS = {"dense": 16, "adapter": 16, "moe": 8}
_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


class Policy(NamedTuple):
    """A policy, and a twin without values that transformers recognizes whatever wraps the policy."""

    module: nn.Module
    twin: Any
    is_adapter: bool


def build(case: str, layers: int | None = None, vocab: int = VOCAB) -> Policy:
    """Builds a policy; the same on every rank.

    Args:
        case: `dense`, `adapter` (the dense one with LoRA on every linear layer) or `moe` (fused experts).
        layers: number of layers; None is that of the case.
        vocab: size of the vocabulary, which makes the largest tensor.
    """
    settings = {**_SHAPE, "num_hidden_layers": LAYERS[case] if layers is None else layers, "vocab_size": vocab}
    torch.manual_seed(0)
    module: Any
    if case == "moe":
        config: Any = Qwen3MoeConfig(**settings, **_EXPERTS)
        module, made = Qwen3MoeForCausalLM(config), Qwen3MoeForCausalLM
    else:
        config = Qwen3Config(**settings)
        module, made = Qwen3ForCausalLM(config), Qwen3ForCausalLM
    with torch.device("meta"):
        twin = made(config)
    if case == "adapter":
        module = peft.get_peft_model(module, peft.LoraConfig(**_LORA))
    return Policy(module, twin, case == "adapter")
