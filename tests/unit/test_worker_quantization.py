"""Which quantized models are taken for what vLLM quantizes itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from twinkle_callbacks.worker.quantization import is_online, obstructive


def config(quantization: str | None, checkpoint: Any = None, text: Any = None) -> Any:
    return SimpleNamespace(
        quantization=quantization,
        hf_config=SimpleNamespace(quantization_config=checkpoint),
        hf_text_config=SimpleNamespace(quantization_config=text),
    )


def test_fp8_of_a_plain_checkpoint_is_in_nobodys_way() -> None:
    assert is_online(config("fp8"))
    assert obstructive(config("fp8")) is None
    assert not is_online(config(None))
    assert obstructive(config(None)) is None


@pytest.mark.parametrize(
    "model_config",
    [
        config("fp8", checkpoint={"quant_method": "fp8"}),
        config("fp8", text={"quant_method": "fp8"}),
        config("awq", checkpoint={"quant_method": "awq"}),
        config("bitsandbytes"),
    ],
)
def test_checkpoints_that_come_quantized_and_other_methods_are_named(model_config: Any) -> None:
    assert not is_online(model_config)
    assert obstructive(model_config) == model_config.quantization
