"""Which adapters can be merged or left out, said before training starts, and what to do about the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.merging import (
    active_adapters,
    base_of,
    chain,
    is_part,
    own_module,
    stand_in,
    tuner_layer,
)
from twinkle_callbacks.sources.names import canonical, loaded, peft_wrappers
from twinkle_callbacks.sources.quantized import plain_class

_INSTEAD = "train with LoRA, or sync weights that are trained in full"

_INPUT_DEPENDENT = {
    "ADAPTION_PROMPT": "it adds prompts to attentions",
    "LILY": "its experts are chosen for each input",
    "POLY": "its skills are routed for each task",
    "SHADOW": "it runs a second model beside the layers",
    "XLORA": "its adapters are scaled for each input",
}
"""Kinds whose effect is no change of weights, and why."""

_UNMERGEABLE_VARIANTS = {"ALoraLinearVariant": "aLoRA", "ArrowLinearVariant": "Arrow", "QALoraLinearVariant": "QALoRA"}

_UNTIE = "set ensure_weight_tying=True in its configuration, adapt none of them, or load with tie_word_embeddings=False"


def check_mergeable(module: nn.Module) -> None:
    """Raises `SourceError` where PEFT holds what cannot be merged into the weights of `module`, or not rightly.

    Args:
        module: the policy, a `PeftModel` or one that PEFT has put adapters into; anything else passes.
    """
    for child in module.modules():
        for name, config in _configs(child).items():
            _check_kind(name, config)
    parts = _parts(module)
    _check_unmerged(parts)
    _check_states(parts)
    for path, part in parts:
        for layer in chain(tuner_layer(part)):
            if isinstance(layer, loaded("peft.tuners.tuners_utils", "BaseTunerLayer")) and active_adapters(layer):
                _check_merge(path, layer)
                _check_adapters(path, layer)
    _check_ties(module)


def check_separable(module: nn.Module) -> None:
    """Raises `SourceError` where the weights of `module` cannot be told from what PEFT added to them.

    Args:
        module: as for `check_mergeable`.
    """
    # Listing the modules also makes PEFT put back the parameters that an attention of torch lost in a forward pass.
    for child in module.modules():
        if isinstance(child, loaded("peft.tuners.adaption_prompt.layer", "_BaseAdaptedAttention")):
            raise SourceError(
                f"adaption prompts replace whole attentions, so the base model's own names are lost; {_INSTEAD}"
            )
    _check_unmerged(_parts(module))


def _configs(module: nn.Module) -> dict[str, Any]:
    """The configurations of the adapters that are active in a `PeftModel` or tuner, none for other modules."""
    holders = peft_wrappers()
    tuners = loaded("peft.tuners.tuners_utils", "BaseTuner") + loaded(
        "peft.tuners.adaption_prompt", "AdaptionPromptModel"
    )
    if not isinstance(module, holders + tuners):
        return {}
    holder: Any = module
    active = holder.active_adapter
    names = [active] if isinstance(active, str) else list(active or ())
    unknown = [name for name in names if name not in holder.peft_config]
    if unknown:
        raise SourceError(
            f"adapter {unknown[0]!r} is active but does not exist; those that do are "
            f"{', '.join(map(repr, holder.peft_config)) or 'none'}; choose one with set_adapter()"
        )
    return {name: holder.peft_config[name] for name in names}


def _check_kind(name: str, config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise SourceError(
            f"adapter {name!r} is {kind}, which trains a prompt and no weights, so there is nothing to merge; "
            f"{_INSTEAD}"
        )
    if kind in _INPUT_DEPENDENT:
        raise SourceError(
            f"adapter {name!r} is {kind}, which cannot be merged into weights: {_INPUT_DEPENDENT[kind]}; {_INSTEAD}"
        )


def _parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of PEFT's outermost parts."""
    return [(path, child) for path, child in _leaves(module, "") if is_part(child)]


def _leaves(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of a tree, those of PEFT without what is in them; a shared module once for each path."""
    yield path, module
    if not is_part(module):
        for name, child in module._modules.items():
            if child is not None:
                yield from _leaves(child, canonical(f"{path}.{name}" if path else name))


def _check_unmerged(parts: list[tuple[str, nn.Module]]) -> None:
    """Checks that no adapter is merged into the module itself."""
    for path, part in parts:
        for layer in chain(tuner_layer(part)):
            if layer.merged_adapters:
                raise SourceError(
                    f"{path}: adapter {', '.join(layer.merged_adapters)} is merged into the module that trains, whose "
                    f"weights are then no longer those of the base model and drift with each cycle; call "
                    f"unmerge_adapter() before training starts: a sync needs no merge in the module itself"
                )


def _check_states(parts: list[tuple[str, nn.Module]]) -> None:
    """Checks what one layer alone does not tell: adapters that are unknown, or active on some layers only."""
    known: set[str] = set()
    wanted: dict[str, str] = {}
    disabled: dict[bool, str] = {}
    for path, part in parts:
        held: Any = part
        for layer in chain(tuner_layer(held)):
            known.update(layer._get_available_adapters())
            for name in layer.active_adapters:
                wanted.setdefault(name, path)
            disabled.setdefault(bool(layer.disable_adapters), path)
    if len(disabled) == 2:
        raise SourceError(
            f"adapters are disabled on {disabled[True]} but enabled on {disabled[False]}; enable or disable them "
            f"everywhere, with enable_adapter_layers() or disable_adapter_layers()"
        )
    for name, path in wanted.items():
        if name not in known:
            raise SourceError(
                f"{path}: adapter {name!r} is active but does not exist; those that do are "
                f"{', '.join(map(repr, sorted(known))) or 'none'}; choose one with set_adapter()"
            )


def _check_merge(path: str, layer: Any) -> None:
    """Checks that PEFT has a merge for a tuner layer."""
    base: Any = base_of(layer)
    if plain_class(type(layer)).merge is loaded("peft.tuners.tuners_utils", "BaseTunerLayer")[0].merge:
        raise SourceError(
            f"{path}: PEFT has no merge for its {type(layer).__name__} on a {type(base).__name__}; {_INSTEAD}, on a "
            f"base that is not quantized or quantized by bitsandbytes"
        )
    if getattr(base, "groups", 1) > 1 and isinstance(layer, loaded("peft.tuners.lora.layer", "_ConvNd")):
        raise SourceError(f"{path}: PEFT cannot merge LoRA into a convolution with groups={base.groups}; leave it out")
    for name in active_adapters(layer):
        variant = type(getattr(layer, "lora_variant", {}).get(name)).__name__
        if variant in _UNMERGEABLE_VARIANTS:
            raise SourceError(
                f"{path}: adapter {name!r} is {_UNMERGEABLE_VARIANTS[variant]}, which PEFT cannot merge; {_INSTEAD}"
            )
        beft = isinstance(layer, loaded("peft.tuners.beft.layer", "BeftLayer"))
        if (beft or getattr(layer, "lora_bias", {}).get(name)) and getattr(base, "bias", None) is None:
            raise SourceError(
                f"{path}: adapter {name!r} trains a bias, but the {type(base).__name__} there has none to merge it "
                f"into; leave it out of target_modules, or train without a bias"
            )


def _check_adapters(path: str, layer: Any) -> None:
    """Checks that the active adapters of a tuner layer can be so together."""
    active = active_adapters(layer)
    if len(active) > 1 and isinstance(layer, loaded("peft.tuners.ln_tuning.layer", "LNTuningLayer")):
        raise SourceError(f"{path}: only one adapter of LN tuning can be active, not {', '.join(active)}; set one")
    if isinstance(layer, loaded("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")):
        try:
            layer._check_overlapping_tokens(active)
        except ValueError as error:
            raise SourceError(f"{path}: {error}; set one adapter, or give them different tokens") from error


class _End(NamedTuple):
    """One of the places where a tied tensor is used, and what PEFT does to it there."""

    name: str
    what: str
    treatment: object


def _check_ties(module: nn.Module) -> None:
    """Checks that PEFT treats a tensor that is used in several places alike in all of them."""
    ends: dict[int, list[_End]] = {}
    for path, child in _leaves(module, ""):
        if is_part(child):
            what, treatment = _treatment(child)
            held = _parameters(own_module(child), path)
        else:
            what, treatment = "nothing", None
            held = ((f"{path}.{name}", tensor) for name, tensor in child._parameters.items() if tensor is not None)
        for name, tensor in held:
            ends.setdefault(id(tensor), []).append(_End(name, what, treatment))
    for tied in ends.values():
        if len({end.treatment for end in tied}) > 1:
            raise SourceError(
                f"{' and '.join(sorted({end.name for end in tied}))} are one tensor, but PEFT adds "
                f"{', '.join(f'{end.what} to {end.name}' for end in tied)}, so they would be different tensors after a "
                f"merge, which a tied model cannot load; {_UNTIE}"
            )


def _parameters(module: nn.Module, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical names and parameters of a module at `path`."""
    for name, parameter in module.named_parameters():
        yield canonical(f"{path}.{name}"), parameter


def _treatment(part: Any) -> tuple[str, object]:
    """What a part does to its module, in words, and something that is equal where it is the same."""
    instead = stand_in(part)
    own = own_module(part)
    if instead is not None:
        copied = [id(parameter) for parameter in instead.parameters()]
        return ("nothing", None) if copied == [id(p) for p in own.parameters()] else ("a trained copy", tuple(copied))
    layer = tuner_layer(part)
    if isinstance(layer, loaded("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")):
        return "trainable tokens", id(layer.trainable_tokens_delta)  # tied wrappers share it
    kind = f"{type(layer).__name__} ({', '.join(active_adapters(layer))})"
    base = {id(parameter) for parameter in own.parameters()}
    adapter = [parameter for parameter in layer.parameters() if id(parameter) not in base]
    dtensor = loaded("torch.distributed.tensor", "DTensor")
    if any(isinstance(parameter, dtensor) or not parameter.numel() for parameter in adapter):
        return kind, id(layer)  # sharded, and then trained apart even where `ensure_weight_tying` tied them
    return kind, frozenset(parameter.data_ptr() for parameter in adapter)
