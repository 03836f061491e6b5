"""The source over an adapter alone: what PEFT saves of it, for rollouts that serve the base and adapters apart."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import nn

from twinkle_callbacks.buckets.digest import first_few
from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.buckets.packing import dtype_name
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import fsdp1
from twinkle_callbacks.sources.base import WeightSource
from twinkle_callbacks.sources.dtypes import sent_as
from twinkle_callbacks.sources.gather import gathered
from twinkle_callbacks.sources.handles import Handle, whole
from twinkle_callbacks.sources.holdings import Holdings
from twinkle_callbacks.sources.merging import Shadows, Slots, is_part, own_module, peft_model
from twinkle_callbacks.sources.names import loaded, select
from twinkle_callbacks.sources.units import Output, Unit, Wanted, gathered_from

_PREFIX = "base_model.model."


class _Place(NamedTuple):
    """A tensor of a module, by its name there."""

    owner: nn.Module
    name: str


class AdapterSource(WeightSource):
    """Streams one adapter, gathered bucket by bucket, under the names that `save_pretrained` of PEFT gives it.

    Names and values are those of `peft.get_peft_model_state_dict` with `save_embedding_layers=False`:
    `base_model.model.<module>.lora_A.weight` and so on, with DoRA's magnitudes and the trained copies of
    `modules_to_save`, which a rollout may refuse (vLLM does: merge those). The base model's embeddings, which PEFT can
    save beside an adapter, are not part of it.

    Args:
        model: the module as the framework wrapped it, with a `PeftModel` in it, or a model that adapters were injected
            into (`inject_adapter_in_model`, `add_adapter` of transformers).
        adapter_name: the adapter; None takes the active one.
        module: path of the policy inside the model.
        dtype: dtype that floating point tensors are cast to; None casts nothing.

    Attributes:
        adapter_name: name of the adapter.

    Raises:
        SourceError: there is no such adapter, or it is of a kind that cannot be streamed alone.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter_name: str | None = None,
        module: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._root = model
        policy = select(model, module)
        self._holder: Any = peft_model(model, policy) or policy
        self._dtype = dtype
        self.adapter_name = _choose(self._holder, adapter_name)
        self._checked: list[Unit] | None = None
        holdings = Holdings(self._root)
        self._places = self._find(holdings)
        carried = {(id(place.owner), place.name) for place in self._places.values() if isinstance(place, _Place)}
        self._scaled = self._scaled_layers()
        self._base = [place for place in _base_parameters(self._holder) if (id(place.owner), place.name) not in carried]
        self._refuse_what_does_not_travel(holdings)
        units = self._units(holdings)
        self._opened = [unit.outputs for unit in units]
        self._specs = _specs(units)
        self._gathered_from: list[str] | None = gathered_from(units)  # for the first handshake; later ones look again

    @classmethod
    def served_as(
        cls, name: str | None, model: nn.Module, *, module: str = "", dtype: torch.dtype | None = None
    ) -> AdapterSource:
        """The source of what rollouts serve as `name`: the adapter that PEFT knows by it, else the active one."""
        policy = select(model, module)
        holder: Any = peft_model(model, policy) or policy
        known = name in (getattr(holder, "peft_config", None) or {})
        return cls(model, adapter_name=name if known else None, module=module, dtype=dtype)

    @property
    def config(self) -> dict[str, Any]:
        """The adapter's configuration, as plain data: what PEFT writes into `adapter_config.json`."""
        config = self._holder.peft_config[self.adapter_name]
        saved = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
        policy = self._holder.get_base_model() if hasattr(self._holder, "get_base_model") else self._holder
        saved["base_model_name_or_path"] = (
            config.base_model_name_or_path or getattr(policy, "name_or_path", None) or None
        )
        saved["inference_mode"] = True
        if config.task_type is None:
            cls = type(policy)
            saved["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
        plain: dict[str, Any] = json.loads(json.dumps(saved, default=str))
        return plain

    def specs(self) -> list[TensorSpec]:
        return list(self._specs)

    def agreement(self) -> list[str]:
        lines, self._gathered_from = self._gathered_from, None
        if lines is None:
            lines = gathered_from(self._units(Holdings(self._root)))
        return super().agreement() + lines

    def check(self) -> None:
        self._checked = self._unchanged()

    @torch.no_grad()
    def stream(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        units, self._checked = self._checked or self._unchanged(), None
        with closing(gathered(units)) as arriving:
            for unit, tensors in arriving:
                yield unit.outputs[0].name, tensors[0]

    def _find(self, holdings: Holdings) -> dict[str, _Place | Handle]:
        """Where each tensor is, by its name: PEFT picks and names those of a model that has the same parts, on meta."""
        from peft import get_peft_model_state_dict

        slots = Slots(self._holder, holdings)
        metas = [torch.empty(handle.shape, dtype=handle.dtype, device="meta") for handle in slots.handles]
        shadows = Shadows(slots, metas)
        shadow = shadows.of(self._holder)
        state = shadow.state_dict(keep_vars=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            saved = get_peft_model_state_dict(
                shadow, state_dict=state, adapter_name=self.adapter_name, save_embedding_layers=False
            )
        owners = {
            id(getattr(shadows.of(owner), name)): _Place(owner, name)
            for owner in self._holder.modules()
            for name in slots.of[id(owner)]
        }
        prefix = _PREFIX if _is_injected(self._holder) else ""
        places: dict[str, _Place | Handle] = {}
        for name, tensor in saved.items():
            if id(tensor) in owners:
                places[prefix + name] = owners[id(tensor)]
            elif tensor.device.type != "meta":
                places[prefix + name] = whole(tensor)  # a setting, such as the indices of SHiRA
            else:
                raise SourceError(
                    f"adapter {self.adapter_name!r}: PEFT computes {name!r} from other tensors when it saves, so it "
                    f"cannot be streamed alone; sync merged weights, or switch that off (save_only_topk_weights of "
                    f"VB-LoRA, rank_pattern of AdaLoRA)"
                )
        return places

    def _scaled_layers(self) -> list[Any]:
        """The layers of plain LoRA, whose scale rollouts take from the configuration."""
        if self._holder.peft_config[self.adapter_name].peft_type.value != "LORA":
            return []
        lora: Any = loaded("peft.tuners.lora.layer", "LoraLayer")
        layers: list[Any] = [module for module in self._holder.modules() if isinstance(module, lora)]
        return [layer for layer in layers if self.adapter_name in layer.scaling]

    def _refuse_what_does_not_travel(self, holdings: Holdings) -> None:
        """Raises `SourceError` if the policy would differ from the base that rollouts hold with this adapter on it."""
        name = self.adapter_name
        train = [holdings.name(*place) for place in self._base if _trains(place)]
        if train:
            raise SourceError(
                f"{len(train)} parameters of the base train beside adapter {name!r} ({first_few(train)}), and the "
                f"adapter alone travels; set merge_and_sync=True, or freeze them with requires_grad_(False)"
            )
        config = self._holder.peft_config[name]
        for layer in self._scaled:
            divisor = math.sqrt(layer.r[name]) if getattr(config, "use_rslora", False) else layer.r[name]
            if not math.isclose(layer.scaling[name], layer.lora_alpha[name] / divisor):
                raise SourceError(
                    f"a layer of adapter {name!r} has scale {layer.scaling[name]:g}, while its configuration, by which "
                    f"rollouts compute, gives {layer.lora_alpha[name] / divisor:g} (set_scale(), scale_layer()?); set "
                    f"merge_and_sync=True, or change lora_alpha"
                )

    def _units(self, holdings: Holdings) -> list[Unit]:
        units = []
        for name, place in self._places.items():
            handle = holdings.handle(*place) if isinstance(place, _Place) else place
            dtype = sent_as(handle.dtype, self._dtype)
            units.append(Unit((Output(name, dtype, handle.shape, name),), (Wanted(handle, dtype),)))
        return units

    def _unchanged(self) -> list[Unit]:
        """The adapter's units as they are now. Values and tensors may be others, names, shapes and dtypes not."""
        holdings = Holdings(self._root)
        gone = [
            name for name, place in self._places.items() if isinstance(place, _Place) and place.owner not in holdings
        ]
        if self.adapter_name not in self._holder.peft_config or gone:
            raise SourceError(
                f"adapter {self.adapter_name!r} was deleted or replaced since the source was opened"
                f"{f' ({gone[0]} is gone)' if gone else ''}; keep it while it is synced, or open a new source"
            )
        self._refuse_what_does_not_travel(holdings)
        units = self._units(holdings)
        for unit, before in zip(units, self._opened, strict=True):
            if unit.outputs != before:
                (was,), (now,) = before, unit.outputs
                raise SourceError(
                    f"{was.name} was {dtype_name(was.dtype)}{list(was.shape)} when the source was opened and is "
                    f"{dtype_name(now.dtype)}{list(now.shape)}; open a new source"
                )
        return units


def _base_parameters(module: nn.Module) -> Iterator[_Place]:
    """The parameters that the policy would have without PEFT; those that FSDP1 lays into one are not told apart."""
    while is_part(module):
        module = own_module(module)
    for name, parameter in module._parameters.items():
        if parameter is not None and not fsdp1.is_flat(parameter):
            yield _Place(module, name)
    for child in module._modules.values():
        if child is not None:
            yield from _base_parameters(child)


def _trains(place: _Place) -> bool:
    parameter = place.owner._parameters.get(place.name)
    return parameter is not None and parameter.requires_grad


def _choose(holder: Any, wanted: str | None) -> str:
    """The name of the adapter to stream.

    Raises:
        SourceError: there is none of that name, several are active, or it is of a kind that has no weights of its own.
    """
    known: dict[str, Any] = getattr(holder, "peft_config", None) or {}
    if not known or isinstance(holder, loaded("peft.mixed_model", "PeftMixedModel")):
        raise SourceError(
            f"{type(holder).__name__} holds no adapter that PEFT can save alone; wrap the policy with "
            f"get_peft_model(), or sync whole weights (merge_and_sync=True)"
        )
    names = [wanted] if wanted is not None else _active(holder)
    listed = ", ".join(map(repr, known))
    if len(names) != 1:
        raise SourceError(
            f"{len(names)} adapters are active ({', '.join(map(repr, names)) or 'none'}), and one can be streamed "
            f"alone; choose with adapter_name: {listed}"
        )
    if names[0] not in known:
        raise SourceError(f"there is no adapter {names[0]!r}; those that exist are {listed}")
    if known[names[0]].is_prompt_learning:
        raise SourceError(
            f"adapter {names[0]!r} is {known[names[0]].peft_type.value}, which trains a prompt and no weights, so "
            f"there is nothing to stream; train with LoRA, or sync weights that are trained in full"
        )
    return names[0]


def _active(holder: Any) -> list[str]:
    if not _is_injected(holder):
        return list(holder.active_adapters)
    parts: Any = (module for module in holder.modules() if is_part(module))
    return list(dict.fromkeys(name for part in parts for name in part.active_adapters))


def _is_injected(holder: Any) -> bool:
    return not isinstance(holder, loaded("peft.peft_model", "PeftModel"))


def _specs(units: list[Unit]) -> list[TensorSpec]:
    outputs = [output for unit in units for output in unit.outputs]
    return [TensorSpec(output.name, dtype_name(output.dtype), output.shape) for output in outputs]
