"""What PEFT holds, merged on gathered tensors by PEFT's own code, while the trained module stays as it is.

    tuner layer  --its modules, copied without their tensors-->  shadow  <--  gathered tensors
                                                                   |  merge(safe_merge=True), PEFT's own
                                                                   v
                                                        the base layer's tensors, merged

Merging and unmerging the module itself would be simpler, but in bfloat16 each cycle leaves an error behind, and on
shards PEFT's merge does nothing, or something else. A shadow shares settings with its layer and nothing that can be
written to, so each merge starts from the trained values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import quantized
from twinkle_callbacks.sources.handles import Handle
from twinkle_callbacks.sources.holdings import Holdings
from twinkle_callbacks.sources.names import canonical, loaded, peft_wrappers, unwrap
from twinkle_callbacks.sources.units import Output, Sent, Unit, Wanted


def peft_model(root: nn.Module, policy: nn.Module) -> nn.Module | None:
    """The `PeftModel` around `policy` in the tree of `root`, if there is one."""
    wrappers = peft_wrappers()
    for module in root.modules():
        if isinstance(module, wrappers):
            holder: Any = module
            base = holder.get_base_model() if hasattr(holder, "get_base_model") else holder.base_model.model
            if policy in (holder, unwrap(holder), unwrap(base)):
                found: nn.Module = holder
                return found
    return None


def is_part(module: nn.Module) -> bool:
    """Whether `module` is one of PEFT's, standing where the policy has a module of its own."""
    return isinstance(module, _tuner_classes() + loaded("peft.utils.other", "AuxiliaryTrainingWrapper"))


def stand_in(module: nn.Module) -> nn.Module | None:
    """The module whose tensors are what the PEFT module `module` computes with; None where they must be merged.

    That is the trained copy of `modules_to_save` and of LN tuning, or the policy's own module where no adapter is
    active. It may be wrapped, or a part itself.
    """
    part: Any = module
    if isinstance(part, loaded("peft.utils.other", "ModulesToSaveWrapper")):
        active = (
            [] if part.disable_adapters else [name for name in part.active_adapters if name in part.modules_to_save]
        )
        copied: nn.Module = part.modules_to_save[active[0]] if active else part.original_module
        return copied
    layer = tuner_layer(part)
    if not any(active_adapters(one) for one in chain(layer)):
        base: nn.Module = layer.get_base_layer()
        return base
    if isinstance(layer, loaded("peft.tuners.ln_tuning.layer", "LNTuningLayer")):
        trained: nn.Module = layer.ln_tuning_layers[active_adapters(layer)[0]]
        return trained
    return None


def own_module(module: nn.Module) -> nn.Module:
    """The policy's own module at the place of the PEFT module `module`, below everything that PEFT put on it.

    It may be wrapped, or have parts inside.
    """
    part: Any = module
    if isinstance(part, loaded("peft.utils.other", "ModulesToSaveWrapper")):
        original: nn.Module = part.original_module
        return original
    return base_of(tuner_layer(part))


def merged(path: str, module: nn.Module, held: Holdings, sent: Sent) -> Unit:
    """The unit of a PEFT module that `stand_in` has no answer for: the base layer's tensors with its adapters merged.

    Bit for bit what `merge_and_unload(safe_merge=True)` of PEFT makes of the gathered tensors, then cast.

    Args:
        path: canonical path of the module.
        module: the module.
        held: handles of every tensor in it.
        sent: the dtype of each output.
    """
    layer = tuner_layer(module)
    slots = Slots(layer, held, left_out=_of_inactive_adapters(layer))
    places = dict(_places(layer, slots))
    packed = [place for place in places.values() if place.is_packed]
    written = [place for place in places.values() if not place.is_packed and _writes_in_place(layer)]
    copied = {place.position for place in written}
    outputs = []
    for name, place in places.items():
        full_name = f"{path}.{name}"
        handle = slots.handles[place.position]
        dtype, shape = handle.dtype, handle.shape
        if place.is_packed:
            quantized.check_packed(path, place.owner, handle)
            dtype, shape = quantized.dtype_of(place.owner), quantized.shape_of(place.owner)
        identity: object = ("merged", handle) if place.merged else handle
        outputs.append(Output(full_name, sent(full_name, dtype), shape, identity))

    def build(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        shadows = Shadows(slots, [one.clone() if at in copied else one for at, one in enumerate(tensors)])
        for place in packed:
            quantized.make_plain(place.owner, shadows.of(place.owner))
        for one in chain(shadows.of(layer)) if packed else ():
            quantized.make_tuner_plain(one)
        _merge(path, layer, shadows.of(layer))
        made = []
        for output, place in zip(outputs, places.values(), strict=True):
            tensor = shadows.tensor(place.owner, place.name) if place.merged else tensors[place.position]
            tensor = quantized.as_saved(place.owner, tensor) if place.is_packed else tensor
            made.append(tensor.detach().to(output.dtype))
        return made

    return Unit(tuple(outputs), tuple(Wanted(handle, handle.dtype) for handle in slots.handles), build)


def tuner_layer(part: Any) -> Any:
    """The tuner layer that a part is, or that it has in it (`trainable_token_indices`)."""
    return part.token_adapter if isinstance(part, loaded("peft.utils.other", "TrainableTokensWrapper")) else part


def chain(layer: Any) -> list[Any]:
    """A tuner layer and those nested in it, outermost first: one for each parameter, or for each kind in a mix."""
    layers = [layer]
    while isinstance(inner := _inside(getattr(layers[-1], "base_layer", None)), _tuner_classes()):
        layers.append(inner)
    return layers


def active_adapters(layer: Any) -> list[str]:
    """The adapters that take part in what this tuner layer computes."""
    if layer.disable_adapters:
        return []
    available = layer._get_available_adapters()
    return [name for name in layer.active_adapters if name in available]


def base_of(layer: Any) -> nn.Module:
    """The policy's own module below a tuner layer, without wrappers."""
    base: nn.Module = _inside(layer.get_base_layer())
    return base


def _tuner_classes() -> tuple[type[Any], ...]:
    return loaded("peft.tuners.tuners_utils", "BaseTunerLayer")


def _inside(module: Any) -> Any:
    """What is below the wrappers that stand at the place of `module`."""
    while isinstance(module, nn.Module):
        inner = [child for name, child in module._modules.items() if child is not None and not canonical(name)]
        if not inner:
            break
        module = inner[0]
    return module


class _Place(NamedTuple):
    """Where an output comes from: a tensor of a module of the base layer, and its position in what is gathered."""

    owner: nn.Module
    name: str
    position: int
    merged: bool

    @property
    def is_packed(self) -> bool:
        return self.name == quantized.WEIGHT and quantized.is_quantized(self.owner)


_Owned = tuple[int, str]
"""The id of a module and the name of a tensor in it."""


class Slots:
    """The tensors of a tree of modules, each once, and which module owns which.

    Attributes:
        handles: the tensors.
        of: for each module (by id), the position in `handles` of each tensor that it owns, by its name there.
    """

    def __init__(
        self, root: nn.Module, held: Holdings, left_out: set[_Owned] | frozenset[_Owned] = frozenset()
    ) -> None:
        positions: dict[Handle, int] = {}
        self.of = {
            id(module): {
                name: positions.setdefault(handle, len(positions))
                for name, handle in held.tensors(module)
                if (id(module), name) not in left_out
            }
            for module in root.modules()
        }
        self.handles = list(positions)


def _of_inactive_adapters(layer: Any) -> set[_Owned]:
    """The tensors in a tuner layer of adapters that take no part, which need not be gathered."""
    found: set[_Owned] = set()
    for one in chain(layer):
        active = active_adapters(one)
        for attribute in (*one.adapter_layer_names, *one.other_param_names):
            container = getattr(one, attribute, None)
            if isinstance(container, nn.ModuleDict):
                others = [module for name, module in container.items() if name not in active]
                found |= {
                    (id(inner), name) for other in others for inner in other.modules() for name in _own_names(inner)
                }
            elif isinstance(container, nn.Module):  # a dictionary of tensors, by adapter
                found |= {(id(container), name) for name in _own_names(container) if name not in active}
    return found


def _own_names(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]


def _places(layer: Any, slots: Slots) -> Iterator[tuple[str, _Place]]:
    """Name in the base layer, and place, of each tensor that is sent."""
    changed = _changed_by(layer)
    for prefix, owner in _owners(base_of(layer), ""):
        for name, position in slots.of[id(owner)].items():
            if name not in owner._non_persistent_buffers_set:
                yield prefix + name, _Place(owner, name, position, changed is None or prefix + name in changed)


def _owners(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a base layer and the prefixes of their tensors. LoRA puts tuner layers into an attention's own."""
    module = base_of(module) if isinstance(module, _tuner_classes()) else module
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _owners(_inside(child), f"{prefix}{name}.")


def _changed_by(layer: Any) -> set[str] | None:
    """Names in the base layer that the merge changes; None where PEFT's code would have to be read to know."""
    changed = set()
    for one in chain(layer):
        if _is_lora(one, "ParamWrapper"):
            changed.add(one.parameter_name)
        elif _is_lora(one, "Linear", "Embedding", "_ConvNd"):
            changed.add("weight")
            changed |= {"bias" for name in active_adapters(one) if one.lora_bias.get(name)}
        elif isinstance(one, loaded("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")):
            changed.add("weight")
        else:
            return None
    return changed


def _is_lora(layer: Any, *names: str) -> bool:
    cls = quantized.plain_class(type(layer))
    return any(issubclass(cls, loaded("peft.tuners.lora.layer", name)) for name in names)


def _writes_in_place(layer: Any) -> bool:
    """Whether the merge may write into the base's tensors. HiRA does, although asked not to, and KaSA may."""
    return _changed_by(layer) is None or any(
        type(variant).__name__.startswith("Kasa")
        for one in chain(layer)
        for variant in getattr(one, "lora_variant", {}).values()
    )


def _merge(path: str, layer: Any, shadow: Any) -> None:
    """Merges in the shadow of a tuner layer, as `merge_and_unload` does, which has ways of its own for attentions."""
    _, *nested = chain(shadow)
    with torch.autocast(next(shadow.parameters()).device.type, enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice to who merges by hand; sparse tensors are in beta
        try:
            for one in nested:
                one.merge(safe_merge=True)
            if not nested and hasattr(shadow, "unload_and_optionally_merge_module"):
                shadow.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                shadow.merge(safe_merge=True)
        except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise SourceError(
                f"{path}: PEFT cannot merge {', '.join(active_adapters(layer))} ({type(layer).__name__}) into it: "
                f"{error}; see whether merge_and_unload(safe_merge=True) works on a copy of the model"
            ) from error


class Shadows:
    """Modules of the same classes and settings as those of a tree, which own other tensors. Wrappers are left out.

    Args:
        slots: the tensors of the tree.
        tensors: those to own instead, in the same order.
    """

    def __init__(self, slots: Slots, tensors: Sequence[torch.Tensor]) -> None:
        self._slots = slots.of
        self._tensors = tensors
        self._parameters: dict[int, nn.Parameter] = {}
        self._made: dict[int, Any] = {}

    def of(self, module: nn.Module) -> Any:
        """The shadow of a module, always the same one."""
        module = _inside(module)
        if id(module) not in self._made:
            # Not by copy.copy(), which goes through what FSDP2 and others put in the way of copying.
            self._made[id(module)] = shadow = object.__new__(type(module))
            shadow.__dict__.update(self._state(module))
            shadow._modules = {
                name: None if child is None else self.of(child) for name, child in module._modules.items()
            }
        return self._made[id(module)]

    def tensor(self, owner: nn.Module, name: str) -> torch.Tensor:
        """The tensor that the shadow of `owner` has now."""
        tensor: torch.Tensor = getattr(self.of(owner), name)
        return tensor

    def _state(self, module: nn.Module) -> dict[str, Any]:
        slots = self._slots[id(module)]
        # Hooks, and what was put in the place of `forward`, are those of training and lead to the trained module.
        state = {
            name: {} if name.endswith(_HOOKS) and isinstance(value, dict) else _copied(value)
            for name, value in vars(module).items()
            if name not in slots and name not in ("forward", "_compiled_call_impl")
        }
        if "_base_weight_before_merge" in state:
            state["_base_weight_before_merge"] = None  # HiRA and others leave it behind
        state["_parameters"] = {name: None for name, value in module._parameters.items() if value is None}
        state["_buffers"] = {name: self._tensors[slots[name]] for name in module._buffers if name in slots}
        state["_parameters"] |= {
            name: self._parameter(index) for name, index in slots.items() if name not in state["_buffers"]
        }
        return state

    def _parameter(self, index: int) -> nn.Parameter:
        if index not in self._parameters:
            self._parameters[index] = nn.Parameter(self._tensors[index], requires_grad=False)
        return self._parameters[index]


_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def _copied(value: Any) -> Any:
    """Settings and records of a module: what it can write to, `merged_adapters` above all, is copied."""
    return copy.copy(value) if type(value) in (dict, list, set) else value
