"""The adapters of one vLLM worker, kept in memory: each version that is loaded, until it is removed.

    put         (background thread) a version arrived from a trainer; build it the way vLLM's file loader does
    add_lora    vLLM's own call: give it a slot, errors go back to the caller
    schedule    vLLM's own step: give every adapter of the batch a slot; never raises
    remove_lora vLLM's own call: forget it

vLLM keeps at most `max_cpu_loras` adapters, drops the least used ones, and drops all when base weights change. It
then loads them again when a request needs them, from the path, in the middle of a step, where an error ends the engine.
Here they come back from memory instead: what was loaded once stays what it was, whatever becomes of its files.

`adapter_hooks.py` leads vLLM's calls here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import RolloutError
from twinkle_callbacks.worker import adapter_hooks
from twinkle_callbacks.worker.adapter_check import (
    Shape,
    check_adapter,
    check_adapter_files,
    peft_helper,
    weights_mapper,
)
from twinkle_callbacks.worker.cpu_lora import correct_cpu_lora
from twinkle_callbacks.worker.ranks import all_ranks_can, raise_on_last_rank

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("vllm.twinkle_callbacks")  # a child of vLLM's logger, so that its configuration shows it


@dataclass(frozen=True)
class _Version:
    """One version of an adapter.

    Attributes:
        name: the adapter's name.
        path: `LoRARequest.lora_path`, which names the version.
        model: vLLM's `LoRAModel` of it, packed for the layers of the model; the one that vLLM holds while it is in use.
        stands_in: whether it changes nothing and stands for a version that could not be loaded.
    """

    name: str
    path: str
    model: Any
    stands_in: bool = False


class AdapterStore:
    """All adapters of one model in one worker; get it with `AdapterStore.of`.

    `put`, `discard`, `check` and `names` may be called on any thread. `add`, `schedule` and `remove` are called on the
    worker's main thread, by vLLM.

    Attributes:
        manager: vLLM's `LoRAModelManager` of the model.
    """

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self._lock = threading.Lock()
        self._waiting: dict[str, _Version] = {}  # name -> what was put and is not loaded yet
        self._loaded: dict[int, _Version] = {}  # lora_int_id -> version

    @classmethod
    def of(cls, model: Any) -> AdapterStore | None:
        """The store of a live model, None if its engine runs without LoRA. The first call takes over vLLM's loading.

        Call it before the worker serves; engines that nobody calls it for go on as vLLM made them.
        """
        manager = getattr(model, "lora_manager", None)
        if manager is None:
            return None
        adapter_hooks.install()
        correct_cpu_lora(manager)
        return adapter_hooks.attach(manager, cls)

    @property
    def max_loras(self) -> int:
        """Adapters that one batch can use; `max_loras` of the engine."""
        return int(self.manager.lora_config.max_loras)

    @property
    def max_lora_rank(self) -> int:
        """The largest rank that the engine takes."""
        return int(self.manager.lora_config.max_lora_rank)

    @property
    def lora_dtype(self) -> torch.dtype:
        """What adapters are computed in."""
        dtype: torch.dtype = self.manager.lora_config.lora_dtype
        return dtype

    def names(self) -> list[str]:
        """Names of the adapters that are loaded, each once."""
        with self._lock:
            return list(dict.fromkeys(v.name for v in self._loaded.values() if not v.stands_in))

    def check(self, name: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
        """Passes if this model can serve the adapter as PEFT computes it; see `check_adapter`.

        Raises:
            RolloutError: lists what does not fit, each with the vLLM flag or the setting to change.
        """
        check_adapter(self.manager, name, config, shapes)

    def put(
        self,
        name: str,
        path: AdapterPath,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Keeps a version until it is loaded by `add_lora`; one of the same name that was not loaded yet is dropped.

        Runs on any thread while the model generates. The tensors are taken over: packing scales lora_B in place.

        Args:
            name: the adapter's name.
            path: of the version, as the `LoRARequest` will carry it.
            config: what PEFT writes into `adapter_config.json`.
            tensors: those of `adapter_model.safetensors`: lora_A [rank, in], lora_B [out, rank], on any device.
            wanted: whether it is still to be kept; called under the lock, so that a `discard` after it turned false
                leaves nothing behind.

        Raises:
            RolloutError: vLLM refuses the adapter, or it is not wanted any more.
        """
        with self._lock:
            _refuse_unwanted(name, wanted)
            self._waiting.pop(name, None)
        try:
            model = _build(self.manager, config, tensors)
        except Exception as error:  # vLLM has no error type of its own for this
            raise RolloutError(f"vLLM refuses adapter {name!r}: {error}") from error
        with self._lock:
            _refuse_unwanted(name, wanted)
            self._waiting[name] = _Version(name, str(path), model)

    def discard(self, name: str) -> None:
        """Drops what was put under a name and will not be loaded; nothing happens if there is nothing."""
        with self._lock:
            self._waiting.pop(name, None)

    def add(self, loader: Any, request: LoRARequest) -> bool:
        """Loads a version and gives it a slot, for vLLM's `add_lora`. A collective of the replica's ranks.

        Versions that are loaded stay; the least used one may lose its slot, and gets one again when it is needed. If
        it fails on any rank, the id is as it was before on all of them.

        Args:
            loader: vLLM's `LRUCacheWorkerLoRAManager`, which reads files.
            request: its `load_inplace` replaces what the id has loaded; else an id that has another path loaded is
                refused.

        Raises:
            Exception: what went wrong, on the last rank only.
        """
        lora_id = request.lora_int_id
        before = self._loaded.get(lora_id)
        failure: Exception | None = None
        version = before
        try:
            if before is None or before.stands_in or request.load_inplace:
                version = self._load(loader, request)
            elif before.path != request.lora_path:
                raise RolloutError(
                    f"adapter id {lora_id} is taken by {before.name!r} ({before.path}), so {request.lora_name!r} "
                    f"({request.lora_path}) needs an id of its own"
                )
        except Exception as error:
            failure = error
        # Before anything is evicted: vLLM wants the same adapters on all ranks.
        if all_ranks_can(failure is None) and version is not None:
            try:
                if version is not before:
                    self.manager.remove_adapter(lora_id)
                self._place(lora_id, version.model, {lora_id})
            except Exception as error:
                failure = error
            if all_ranks_can(failure is None):
                self._keep(lora_id, version)
                return True
            self.manager.remove_adapter(lora_id)
        failure = failure or RolloutError(f"adapter {request.lora_name!r} was not loaded, another rank's log says why")
        logger.error("adapter %r (id %d) was not loaded: %s", request.lora_name, lora_id, failure)
        raise_on_last_rank(failure)
        return False

    def schedule(self, loader: Any, requests: Iterable[LoRARequest | None], mapping: Any) -> None:
        """Gives every adapter of a batch a slot, for vLLM's step. Never raises.

        What is loaded is not loaded again, not even for a request that was made with `load_inplace`. A version that
        was never loaded is loaded now, from files as vLLM does; where that fails the error is logged, and an adapter
        that changes nothing stands in, so that such a request is answered by the base model. Requests through the
        server cannot come to that, since it loads an adapter before it accepts a request for it.

        Args:
            loader: vLLM's `LRUCacheWorkerLoRAManager`, which reads files.
            requests: of the batch. vLLM takes requests of the same name for equal, so of two versions in one batch it
                gives one only.
            mapping: vLLM's `LoRAMapping`, with the id of every row; None if the batch is what `requests` says.
        """
        known = {request.lora_int_id: request for request in requests if request}
        batch = set(known) if mapping is None else _ids(mapping)
        for lora_id in batch:
            try:
                version = self._loaded.get(lora_id)
                if version is None and self.manager.get_adapter(lora_id) is None:
                    version = self._load_late(loader, known[lora_id])
                self._place(lora_id, None if version is None else version.model, batch)
            except Exception:
                request = known.get(lora_id)
                name, path = (request.lora_name, request.lora_path) if request else ("", "")
                logger.exception(
                    "adapter %r (id %d, %s) cannot be loaded; its requests are answered by the base model",
                    name,
                    lora_id,
                    path,
                )
                self._stand_in(lora_id, name, path, batch)

    def remove(self, lora_id: int) -> bool:
        """Forgets an adapter, for vLLM's `remove_lora`, and says whether there was one."""
        known = lora_id in self._loaded
        self._keep(lora_id, None)
        return known

    def _keep(self, lora_id: int, version: _Version | None) -> None:
        with self._lock:
            if version is None:
                self._loaded.pop(lora_id, None)
            else:
                self._loaded[lora_id] = version

    def _load(self, loader: Any, request: LoRARequest) -> _Version:
        path = AdapterPath.parse(request.lora_path)
        if path is not None and path.folder is None:
            model = self._taken(request.lora_path, request.lora_name, path).clone(request.lora_int_id)
        else:
            folder = request.lora_path if path is None else str(path.folder)
            model = _off_its_files(loader._load_adapter(msgspec.structs.replace(request, lora_path=folder)))
            if path is not None:  # what vLLM's own routes load is as vLLM takes it
                check_adapter_files(self.manager, request.lora_name, folder)
        return _Version(request.lora_name, request.lora_path, model)

    def _load_late(self, loader: Any, request: LoRARequest) -> _Version:
        """Loads a version that nobody added before a request used it."""
        version = self._load(loader, request)
        if AdapterPath.parse(request.lora_path) is not None:  # others are read from their files again, as vLLM does
            self._keep(request.lora_int_id, version)
        return version

    def _taken(self, path: str, name: str, parsed: AdapterPath) -> Any:
        with self._lock:
            waiting = next(
                (version for version in self._waiting.values() if (version.path, version.name) == (path, name)), None
            )
            if waiting is not None:
                del self._waiting[waiting.name]
                return waiting.model
            for version in self._loaded.values():  # under another id, as several API servers may give one
                if version.path == path and version.name == name and not version.stands_in:
                    return version.model
        raise RolloutError(
            f"version {parsed.version} of adapter {name!r} ({path}) is not in this worker's memory: it was not sent "
            f"here, or replaced by a newer one, or removed; sync again"
        )

    def _stand_in(self, lora_id: int, name: str, path: str, batch: set[int]) -> None:
        from vllm.lora.lora_model import LoRAModel

        self.manager.remove_adapter(lora_id)
        nothing = LoRAModel(lora_id, 1, {})
        self._keep(lora_id, _Version(name, path, nothing, stands_in=True))
        self._place(lora_id, nothing, batch)

    def _place(self, lora_id: int, model: Any, batch: set[int]) -> None:
        """Registers the adapter with vLLM unless it is, and activates it, in place of others than those of the batch.

        Stock eviction may pick one of the batch, and fails where all others are pinned.
        """
        manager = self.manager
        if manager.get_adapter(lora_id) is None:
            if len(manager) >= manager.capacity:
                manager.remove_adapter(_least_used(manager._registered_adapters, batch))
            if model.loras:
                manager.add_adapter(model)
            else:  # vLLM's way of adding takes the first of its layers
                manager._registered_adapters[lora_id] = model
        if lora_id not in manager.lora_index_to_id:
            if len(manager._active_adapters) >= manager.lora_slots:
                manager.deactivate_adapter(_least_used(manager._active_adapters, batch))
            manager._last_mapping = None  # before 0.32 an unchanged batch keeps the slots it was mapped to
        manager.activate_adapter(lora_id)


def _refuse_unwanted(name: str, wanted: Callable[[], bool]) -> None:
    if not wanted():
        raise RolloutError(f"the trainer of adapter {name!r} has left")


def _ids(mapping: Any) -> set[int]:
    """The adapters that the rows of a batch name; 0 is the base model."""
    return {int(lora_id) for lora_id in {*mapping.index_mapping, *mapping.prompt_mapping} if lora_id > 0}


def _least_used(cache: Any, keep: set[int]) -> int:
    """The adapter that went unused for longest, a pinned one only if all are."""
    return int(min((lora_id for lora_id in cache.order if lora_id not in keep), key=cache.pinned_items.__contains__))


def _off_its_files(model: Any) -> Any:
    """Gives a model that was just read memory of its own.

    Tensors of a safetensors file are that file, mapped into memory: written over in place, it changes the adapter.
    """
    holders = [(lora, ("lora_a", "lora_b")) for lora in model.loras.values()]
    holders += [(whole, ("weight", "bias")) for whole in getattr(model, "modules_to_save", {}).values()]
    for holder, names in holders:
        for name in names:
            tensor = getattr(holder, name)
            if tensor is not None and not tensor.is_pinned():  # pinning has copied it
                setattr(holder, name, tensor.clone())
    return model


def _build(manager: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """A `LoRAModel` as vLLM's file loader makes it, packed as the manager packs it; nothing of the manager changes."""
    from vllm.lora.lora_model import LoRAModel, _is_remote_expert_key

    helper = peft_helper(config)
    helper.validate_legal(manager.lora_config)
    experts = getattr(manager, "moe_ep_load_spec", None)
    dtype = manager.lora_config.lora_dtype
    own = {
        name: tensor.detach().to(device="cpu", dtype=dtype)
        for name, tensor in tensors.items()
        if experts is None or not _is_remote_expert_key(name, experts)
    }
    model = LoRAModel.from_lora_tensors(
        1,  # the id is given when it is loaded
        own,
        helper,
        device="cpu",
        dtype=dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=weights_mapper(manager.model),
        skip_prefixes=getattr(manager.model, "lora_skip_prefixes", None),
    )
    model.is_3d_lora_weight = any(".experts.base_layer.lora_" in name or ".experts.lora_" in name for name in tensors)
    for step in ("_validate_moe_lora_format", "_validate_modules_to_save", "_validate_token_classification_lora"):
        getattr(manager, step, lambda _: None)(model)
    if not model.loras:
        raise ValueError("none of its tensors is for this model")
    manager._create_merged_loras_inplace(model)
    return model
