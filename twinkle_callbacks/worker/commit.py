"""The switch from the old weights to the staged ones: through vLLM's own loader and layerwise reload, or its copies.

One reload session around the whole set, written in place: CUDA graphs keep their addresses, and MoE layers are not
processed twice (vllm#42821). The layers where that proves to be nothing but copies are recorded, and later commits are
their replay, and a reload session of the other layers alone: see `recorded.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch

from twinkle_callbacks.buckets.digest import first_few
from twinkle_callbacks.errors import EngineError
from twinkle_callbacks.worker import layers, recorded
from twinkle_callbacks.worker.copies import Tensors, wait_for
from twinkle_callbacks.worker.layers import UnfitLayer
from twinkle_callbacks.worker.recorded import Digest, Layouts, NotRecordedError, RecordedCopies, Rest
from twinkle_callbacks.worker.routes import find_routes

logger = logging.getLogger("vllm.twinkle_callbacks")


class Committer:
    """Commits to one live model, by recorded copies where they are all that loading is. On the worker's main thread.

    Args:
        shadow: makes a second instance of the model on the meta device, as its loader fills it.
        digest: of one tensor, for the proof of a record; see `RecordedCopies.record`.
        obstacle: tells why nothing of this model is to be recorded, empty if some of it may be.
        unfit_layers: which layers of this model are not to be recorded.

    Attributes:
        last_way: how the last commit went that was whole.
    """

    last_way: Literal["", "loader", "recorded", "partly recorded"] = ""

    def __init__(
        self,
        model: Any,
        model_config: Any,
        device: torch.device,
        *,
        shadow: Callable[[], AbstractContextManager[Any]],
        digest: Digest = recorded.host_digest,
        obstacle: Callable[[Any], str] = layers.obstacle,
        unfit_layers: Callable[[Any], list[UnfitLayer]] = layers.unfit_layers,
    ) -> None:
        self._model, self._model_config, self._device = model, model_config, device
        self._shadow, self._digest, self._obstacle, self._unfit_layers = shadow, digest, obstacle, unfit_layers
        self._record: RecordedCopies | None = None
        self._refused: Layouts | None = None
        self._told = ""

    def commit(self, tensors: Tensors, layouts: Layouts | None = None) -> None:
        """Brings a complete, checked set of checkpoint tensors into the model; `layouts` are theirs, if known.

        Raises:
            Exception: as `commit` does, and then the next commit goes through the loader.
        """
        layouts = recorded.layouts_of(tensors) if layouts is None else layouts
        record, self._record = self._record, None
        unfit = "" if record is None else record.fits(layouts)
        if record is not None and not unfit:
            record.replay(tensors)
            self._record, self.last_way = record, "recorded" if record.is_whole else "partly recorded"
            return
        if unfit:
            self._tell(f"the recorded copies no longer fit: {unfit}")
        self._load(tensors)
        why_not = self._obstacle(self._model)
        if why_not:
            self._tell(f"commits go through vLLM's loader: {why_not}")
        elif self._refused != layouts:
            self._try_to_record(tensors, layouts)
        self.last_way = "loader"

    def _load(self, tensors: Tensors) -> None:
        commit(self._model, self._model_config, tensors.items(), self._device)

    def _try_to_record(self, tensors: Tensors, layouts: Layouts) -> None:
        try:
            rest = self._rest(layouts)
        except Exception as error:  # a loader's own, or a model's that cannot be made twice; this one is as it was
            self._refuse(layouts, error)
            return
        try:
            with torch.device(self._device):
                self._record = RecordedCopies.record(self._model, tensors, self._digest, layouts, rest)
        except Exception as error:  # a loader's own, or what the watching or the replay found
            self._refuse(layouts, error)
            self._load(tensors)
        else:
            self._tell(f"the next commits are recorded copies: {self._record}")
            if self._device.type != "cpu":
                torch.get_device_module(self._device).empty_cache()  # of the layers that the loader made, for good

    def _rest(self, layouts: Layouts) -> Rest | None:
        """What cannot be recorded. None if all can; an error if nothing can."""
        elsewhere = {name: layout[3] for name, layout in layouts.items() if layout[3].type != self._device.type}
        unfit = self._unfit_layers(self._model) if len(elsewhere) < len(layouts) else []
        if not unfit:
            self._require_here(layouts, elsewhere)
            return None
        with self._shadow() as shadow:
            routes = find_routes(shadow, [layer.name for layer in unfit], layouts)
        derive = f"layers that may derive something from weights after loading: {layers.counted(unfit)}"
        if not routes.past:
            raise NotRecordedError(f"all tensors are for {derive}")
        self._require_here(routes.past, elsewhere)
        reason = f"{len(routes.into)} of {len(layouts)} tensors go through vLLM's loader, for {derive}"
        return Rest(routes.into, [layer.layer for layer in unfit], routes.filled, routes.known, self._reload, reason)

    def _require_here(self, names: Iterable[str], elsewhere: Mapping[str, torch.device]) -> None:
        name = next((name for name in names if name in elsewhere), None)
        if name is not None:
            way = f"the way from there to {self._device} takes longer"
            raise NotRecordedError(f"{name} is staged on {elsewhere[name]}, and {way}")

    def _reload(self, tensors: Sequence[tuple[str, torch.Tensor]], modules: Sequence[torch.nn.Module]) -> None:
        commit(self._model, self._model_config, tensors, self._device, modules)

    def _refuse(self, layouts: Layouts, error: Exception) -> None:
        self._refused = layouts
        self._tell(f"commits go through vLLM's loader: {str(error) or type(error).__name__}")

    def _tell(self, what: str) -> None:
        if what != self._told:
            logger.info("%s", what)
            self._told = what


def commit(
    model: Any,
    model_config: Any,
    tensors: Iterable[tuple[str, torch.Tensor]],
    device: torch.device,
    reloaded: Sequence[torch.nn.Module] | None = None,
) -> None:
    """Loads checked checkpoint tensors into the live model. Runs on the worker's main thread.

    Args:
        model: runs in this worker.
        model_config: vLLM's, of the model.
        tensors: of the whole model, or for the layers that are reloaded; others are written where they are loaded to.
        device: of the model.
        reloaded: layers that are loaded and processed anew, with all inside them; None for the whole model.

    Raises:
        Whatever a loader raises; some layers then have new values and some old ones, but each has its own tensors
        again, so that a later commit can put everything in order.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialized = [model] if reloaded is None else reloaded
    _forget_cpu_moe_kernels(initialized)
    before = [_Registered.of(layer) for layer in model.modules()]
    try:
        with torch.device(device):
            for layer in initialized:
                initialize_layerwise_reload(layer)
            model.load_weights(tensors)
            finalize_layerwise_reload(model, model_config)  # passes over layers that were not initialized
        _repack_cpu_heads(model)
        _check_nothing_on_meta(model)
        wait_for(device)
    except BaseException:
        for registered in before:
            registered.put_back()
        _end_layerwise_reload(model)
        raise


class _Registered(NamedTuple):
    """The tensors of one layer, as they were before the reload put others on the meta device in their place."""

    layer: torch.nn.Module
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    non_persistent: set[str]

    @classmethod
    def of(cls, layer: torch.nn.Module) -> _Registered:
        kept = dict(layer._parameters), dict(layer._buffers), set(layer._non_persistent_buffers_set)
        return cls(layer, *kept)

    def put_back(self) -> None:
        for now, kept in ((self.layer._parameters, self.parameters), (self.layer._buffers, self.buffers)):
            now.clear()
            now.update(kept)
        self.layer._non_persistent_buffers_set.clear()
        self.layer._non_persistent_buffers_set.update(self.non_persistent)


def _end_layerwise_reload(model: torch.nn.Module) -> None:
    """Ends a reload that broke off. vLLM 0.32 keeps what it had loaded so far and would go on from there."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        get_layerwise_info(layer).reset()


def _check_nothing_on_meta(model: torch.nn.Module) -> None:
    """A layer whose earlier reload broke off can be left without memory although this one raised nothing."""
    lost = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if lost:
        raise EngineError(
            f"after the commit {len(lost)} tensors have no memory: {first_few(lost)}; restart this server"
        )


def _forget_cpu_moe_kernels(reloaded: Iterable[torch.nn.Module]) -> None:
    """Makes the reload set up the experts' kernels as the first load does.

    On CPU the kernel computes with packed expert weights, but packs them only when it is made: a layerwise reload
    (vLLM 0.32, fused_moe/unquantized_fused_moe_method.py) leaves them unpacked and the output silently wrong. Remove
    this when a Qwen3-MoE passes tests/vllm/test_models.py without it.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in (module for layer in reloaded for module in layer.modules()):
        method = getattr(module, "quant_method", None)
        if method is not None and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_cpu_heads(model: Any) -> None:
    """Packs output heads again whose weight is tied to the embedding.

    On CPU a head computes with a packed copy of its weight. A tied head is loaded through the embedding and gets no
    tensor of its own, so the layerwise reload (vLLM 0.32) leaves that copy stale, and the output silently wrong. Remove
    this when a tied Llama passes tests/vllm/test_models.py without it.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)
