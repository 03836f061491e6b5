"""Policies with an adapter, on the base that the servers of the tests hold, and what a fresh vLLM answers with them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import torch

from tests.tiny_models import build
from tests.vllm.engines import Answers, answers, make_llm

RANK = 8
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
SHARED_PREFIX = [3 + number % 50 for number in range(70)]
PROMPTS = [[3, 4, 5], [9, 8, 7, 6], [*SHARED_PREFIX, 7], [*SHARED_PREFIX, 9, 11]]


def adapted(base_seed: int = 0, base: dict[str, Any] | None = None, **config: Any) -> peft.PeftModel:
    """A tiny Qwen3 with an adapter of rank 8 that changes nothing yet; `base` are settings of the Qwen3."""
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS, **config}
    module = build("qwen3", seed=base_seed, **(base or {}))
    if "of_ours" in settings["target_modules"]:  # a layer that vLLM's model does not have
        module.model.layers[0].of_ours = torch.nn.Linear(8, 8)
    model: peft.PeftModel = peft.get_peft_model(module, peft.LoraConfig(**settings))
    return model


def train(policy: peft.PeftModel, seed: int) -> None:
    """Stands for optimizer steps: gives the adapter values that depend on the seed alone, and are felt."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)


class Reference:
    """A vLLM without this package's backend, which loads every adapter from files that PEFT saved."""

    def __init__(self, base: Path) -> None:
        self._llm = make_llm(base, synced=False, enable_lora=True, max_lora_rank=RANK, max_model_len=128)
        self._ids = itertools.count(1)

    def base(self) -> Answers:
        return answers(self._llm, PROMPTS)

    def adapter(self, folder: Path) -> Answers:
        from vllm.lora.request import LoRARequest

        number = next(self._ids)
        return answers(self._llm, PROMPTS, LoRARequest(f"reference-{number}", number, str(folder)))
