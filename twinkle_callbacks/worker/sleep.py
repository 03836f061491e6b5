"""Whether vLLM sleeps: its tensors then have addresses, but no memory behind them."""

from __future__ import annotations

from twinkle_callbacks.errors import RolloutError


def require_awake() -> None:
    """Refuses a sync into an engine that sleeps, as a write would go to memory that is not there.

    Looks at the blocks of the allocator that vLLM (0.26 to 0.32) makes with `enable_sleep_mode`; costs nothing without.

    Raises:
        RolloutError: the weights sleep.
    """
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance
    if allocator is None:
        return
    if any(block.is_asleep and block.tag == "weights" for block in allocator.pointer_to_data.values()):
        raise RolloutError(
            "vLLM sleeps, so its weights have no memory; wake them before the push, with "
            "wake_up(tags=['weights']) or POST /wake_up?tags=weights, and its cache after it; "
            "LocalRollout.sleep() does both by itself"
        )
