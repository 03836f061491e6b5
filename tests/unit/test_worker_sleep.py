"""A worker that sleeps is told from one that is awake by the blocks of vLLM's allocator."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from twinkle_callbacks.errors import RolloutError
from twinkle_callbacks.worker.sleep import CACHE, WEIGHTS, require_awake


def test_only_what_is_asked_for_must_be_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = SimpleNamespace(instance=None)
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", SimpleNamespace(CuMemAllocator=allocator))
    require_awake(WEIGHTS, CACHE)  # without sleep mode there is no allocator
    weights, cache = SimpleNamespace(tag="weights", is_asleep=False), SimpleNamespace(tag="kv_cache", is_asleep=False)
    allocator.instance = SimpleNamespace(pointer_to_data={0: weights, 1: weights, 2: cache})
    require_awake(WEIGHTS, CACHE)
    cache.is_asleep = True
    require_awake(WEIGHTS)
    with pytest.raises(RolloutError, match="no memory for kv_cache; wake it up"):
        require_awake(WEIGHTS, CACHE)
    weights.is_asleep = True
    with pytest.raises(RolloutError, match="no memory for weights; "):
        require_awake(WEIGHTS)
