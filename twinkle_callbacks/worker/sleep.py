"""Whether vLLM sleeps: its tensors then have addresses, but no memory behind them."""

from __future__ import annotations

from twinkle_callbacks.errors import RolloutError

WEIGHTS, CACHE = "weights", "kv_cache"  # vLLM's tags for memory


def require_awake(*memory: str) -> None:
    """Refuses to write into an engine that sleeps, or to let it generate: the memory is not there.

    Looks at the blocks of the allocator that vLLM (0.26 to 0.32) makes with `enable_sleep_mode`; costs nothing without.
    Knows nothing of a `sleep_mode_backend` that another package brings.

    Args:
        memory: the tags of what must be awake.

    Raises:
        RolloutError: some of it sleeps.
    """
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance
    if allocator is None:
        return
    blocks = list(allocator.pointer_to_data.values())  # which the main thread may be adding to
    asleep = [tag for tag in memory if any(block.is_asleep and block.tag == tag for block in blocks)]
    if asleep:
        raise RolloutError(
            f"vLLM sleeps, so there is no memory for {' and '.join(asleep)}; wake it up before the push (by POST "
            f"/wake_up or LLM.wake_up()), or put it to sleep with LocalRollout.sleep(), which the next push ends"
        )
