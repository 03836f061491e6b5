"""What vLLM calls in every one of its processes (entry point `vllm.general_plugins`), possibly several times."""

from __future__ import annotations

from twinkle_callbacks.config import BACKEND


def register() -> None:
    """Registers the weight-transfer backend `twinkle`; imports nothing heavy. Idempotent."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:  # register_engine raises on a second call
        WeightTransferEngineFactory.register_engine(
            BACKEND, "twinkle_callbacks.worker.backend", "TwinkleWeightTransferEngine"
        )
