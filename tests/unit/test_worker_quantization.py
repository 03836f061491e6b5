"""Which quantized models are taken for what vLLM quantizes itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from twinkle_callbacks.worker.quantization import is_online, obstructive


def config(
    quantization: str | None,
    checkpoint: Any = None,
    text: Any = None,
    ranks: int = 1,
    replicas: int = 1,
    lora: Any = None,
) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            quantization=quantization,
            hf_config=SimpleNamespace(quantization_config=checkpoint),
            hf_text_config=SimpleNamespace(quantization_config=text),
        ),
        parallel_config=SimpleNamespace(world_size=ranks, data_parallel_size=replicas),
        lora_config=lora,
    )


@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_tensor"])
def test_fp8_of_a_plain_checkpoint_is_in_nobodys_way(quantization: str) -> None:
    assert is_online(config(quantization))
    assert obstructive(config(quantization)) is None


def test_without_quantization_nothing_is_quantized_or_in_the_way() -> None:
    assert not is_online(config(None))
    assert obstructive(config(None)) is None


@pytest.mark.parametrize(
    "vllm_config",
    [
        config("fp8", checkpoint={"quant_method": "fp8"}),
        config("fp8", text={"quant_method": "fp8"}),
        config("awq", checkpoint={"quant_method": "awq"}),
        config("bitsandbytes"),
        config("fp8", ranks=2),
        config("fp8", replicas=2),
        config("fp8", lora=object()),
    ],
)
def test_checkpoints_that_come_quantized_other_methods_ranks_and_lora_are_refused_by_name(vllm_config: Any) -> None:
    assert not is_online(vllm_config)
    assert obstructive(vllm_config) == vllm_config.model_config.quantization
