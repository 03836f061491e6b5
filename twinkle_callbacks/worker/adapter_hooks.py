"""Leads vLLM's loading of adapters in a worker to the `AdapterStore` of the model, where there is one.

Replaced are three methods of the classes in `vllm/lora/worker_manager.py`, which is what `add_lora`, `remove_lora` and
every step come through. They look for a store at the manager they are called on, so engines of the same process that
have none behave as vLLM made them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from twinkle_callbacks.worker.adapters import AdapterStore

_ATTRIBUTE = "twinkle_adapter_store"


def attach(manager: Any, make: Callable[[Any], AdapterStore]) -> AdapterStore:
    """The store at this `LoRAModelManager`; the first call makes it."""
    store: AdapterStore | None = getattr(manager, _ATTRIBUTE, None)
    if store is None:
        store = make(manager)
        setattr(manager, _ATTRIBUTE, store)
    return store


def _store(worker_manager: Any) -> AdapterStore | None:
    return getattr(worker_manager._adapter_manager, _ATTRIBUTE, None)


def install() -> None:
    """Replaces the methods. Idempotent."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as Manager

    if getattr(Manager.add_adapter, _ATTRIBUTE, False):
        return
    stock_add, stock_activate, stock_remove = Manager.add_adapter, Manager.set_active_adapters, Manager.remove_adapter

    def add_adapter(self: Any, lora_request: LoRARequest) -> bool:
        store = _store(self)
        return bool(stock_add(self, lora_request)) if store is None else store.add(self, lora_request)

    def set_active_adapters(self: Any, requests: set[LoRARequest], mapping: Any) -> None:
        store = _store(self)
        if store is None:
            stock_activate(self, requests, mapping)
            return
        store.schedule(self, requests, mapping)
        if mapping is not None:
            self._adapter_manager.set_adapter_mapping(mapping)

    def remove_adapter(self: Any, adapter_id: int) -> bool:
        store = _store(self)
        known = store is not None and store.remove(adapter_id)
        return bool(stock_remove(self, adapter_id)) or known

    setattr(add_adapter, _ATTRIBUTE, True)
    Manager.add_adapter = add_adapter
    Manager.set_active_adapters = set_active_adapters
    Manager.remove_adapter = remove_adapter
