"""Would vLLM serve this adapter as PEFT computes it? Asked of its LoRA manager, before anything is sent.

vLLM refuses some adapters with a reason, takes others in part without a word (modules it has no LoRA layer for, sizes
that are smaller than the layer's), and dies on a third kind. All are refused here, with what to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from twinkle_callbacks.buckets.digest import first_few
from twinkle_callbacks.errors import RolloutError

Shape = tuple[int, ...]
_MERGE = "set merge_and_sync=True"


def check_adapter(manager: Any, name: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Passes if the manager's model can serve the adapter. Reads only; runs on any thread.

    Args:
        manager: vLLM's `LoRAModelManager`.
        name: the adapter's name, for the message.
        config: what PEFT writes into `adapter_config.json`.
        shapes: shape of each tensor, under the names of `adapter_model.safetensors`: lora_A [rank, in], lora_B
            [out, rank].

    Raises:
        RolloutError: lists all that does not fit, each with the setting to change.
    """
    problems = list(_config_problems(manager.lora_config, config))
    if not problems:
        problems = list(_tensor_problems(manager, config, shapes))
    if problems:
        raise RolloutError(f"vLLM cannot serve adapter {name!r}: {'; '.join(problems)}")


def check_adapter_files(manager: Any, name: str, folder: str) -> None:
    """As `check_adapter`, of the files that vLLM has just loaded from `folder`; reads no values.

    Args:
        manager: vLLM's `LoRAModelManager`.
        name: the adapter's name, for the message.
        folder: on this host, or a repository of the Hugging Face hub.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    files = Path(get_adapter_absolute_path(folder))
    config = json.loads((files / "adapter_config.json").read_text())
    check_adapter(manager, name, config, _shapes_in(files))


def _shapes_in(files: Path) -> dict[str, Shape]:
    from safetensors import safe_open

    if (tensors := files / "adapter_model.safetensors").is_file():
        with safe_open(tensors, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  # no dict
    old = next(path for path in (files / "adapter_model.bin", files / "adapter_model.pt") if path.is_file())
    loaded = torch.load(old, map_location="meta", weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in loaded.items()}


def peft_helper(config: Mapping[str, Any]) -> Any:
    """Reads an adapter's configuration as vLLM does.

    Raises:
        ValueError: a required entry is missing or has no sense.
    """
    from vllm.lora.peft_helper import PEFTHelper

    return PEFTHelper.from_dict(dict(config))


def _config_problems(lora_config: Any, config: Mapping[str, Any]) -> Iterator[str]:
    kind = str(config.get("peft_type") or "LORA")
    if kind != "LORA":
        yield f"it is {kind}, and vLLM computes plain LoRA only; {_MERGE}"
        return
    try:
        helper = peft_helper(config)
    except ValueError as error:
        yield f"{error}; is this the configuration that PEFT saves?"
        return
    rank, limit = max([helper.r, *(config.get("rank_pattern") or {}).values()]), lora_config.max_lora_rank
    if rank > limit:
        enough = next((choice for choice in _rank_choices() if choice >= rank), None)
        cure = _MERGE if enough is None else f"start the server with --max-lora-rank {enough}"
        yield f"rank {rank} is above max_lora_rank={limit}; {cure}, or train with a lower r"
    refused = list(helper._validate_features())
    if config.get("bias", "none") != "none":
        refused.append(f"Adapter bias (bias={config['bias']!r}) is not supported.")
    if not hasattr(helper, "rank_pattern") and (config.get("rank_pattern") or config.get("alpha_pattern")):
        refused.append("This version of vLLM ignores rank_pattern and alpha_pattern.")
    refused += [f"vLLM does not compute {key}." for key in _UNREAD if config.get(key)]
    yield from (f"{reason.rstrip('.')}; {_MERGE}" for reason in refused)


_UNREAD = ("arrow_config", "kasa_config", "monteclora_config")
"""Settings of PEFT that change what an adapter computes, and that vLLM does not read."""


def _rank_choices() -> tuple[int, ...]:
    from vllm.config.lora import MaxLoRARanks

    return get_args(MaxLoRARanks)


class _Target(NamedTuple):
    """Where a module of the adapter goes: vLLM's layer, and which of the modules packed in it, None if not packed."""

    layer: Any
    position: int | None = None
    parts: int = 1


def _tensor_problems(manager: Any, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Iterator[str]:
    sides, foreign = _by_module(manager, shapes)
    if foreign:
        yield f"{len(foreign)} tensors are neither lora_A nor lora_B ({first_few(foreign)}); {_MERGE}"
    if not sides and not foreign:
        yield "it has no tensors; does its target_modules match anything?"
    helper = peft_helper(config)
    layers = _Layers(manager)
    unserved: list[str] = []
    fused: list[str] = []
    for module, (tensor_a, tensor_b) in sides.items():
        if tensor_a is None or tensor_b is None:
            yield f"{tensor_a or tensor_b} has no counterpart, lora_A and lora_B go together"
        elif layers.elsewhere(module):
            continue
        elif (target := layers.target(module)) is None:
            unserved.append(module)
        else:
            if _is_fused(module) and not _takes_fused(manager, target.layer):
                fused.append(module)
            rank = helper.get_rank_and_scaling(_peft_name(tensor_a))[0] if hasattr(helper, "rank_pattern") else helper.r
            yield from _size_problems(target, rank, {tensor_a: shapes[tensor_a], tensor_b: shapes[tensor_b]})
    if fused:
        yield f"experts in one tensor ({first_few(fused)}); start the server with --enable-mixed-moe-lora-format"
    if unserved:
        yield _unserved(manager, unserved)


def _by_module(manager: Any, shapes: Mapping[str, Shape]) -> tuple[dict[str, tuple[str | None, str | None]], list[str]]:
    """The names of each module's lora_A and lora_B by vLLM's name of the module, and the tensors that are neither."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.utils import is_base_embedding_weights, parse_fine_tuned_lora_name

    mapper, skipped = weights_mapper(manager.model), getattr(manager.model, "lora_skip_prefixes", None)
    sides: dict[str, tuple[str | None, str | None]] = {}
    foreign = []
    for name in shapes:
        if is_base_embedding_weights(name) or (skipped and LoRAModel._should_skip_module(name, skipped)):
            continue
        try:
            module, is_a = parse_fine_tuned_lora_name(name, mapper)
        except ValueError:
            foreign.append(name)
            continue
        if module in ("score", "classifier"):  # trained in full, which `put` has vLLM check
            continue
        a, b = sides.get(module, (None, None))
        sides[module] = (name, b) if is_a else (a, name)
    return sides, foreign


def weights_mapper(model: Any) -> Any:
    """How vLLM's loader renames a checkpoint's modules to those of the model, None if it does not."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    renames = getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper  # the latter in vLLM 0.26
    return renames()


def _peft_name(tensor: str) -> str:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    return str(parse_fine_tuned_lora_name(tensor)[0])


def _is_fused(module: str) -> bool:
    """Whether the module is all experts of a layer at once, as PEFT's `target_parameters` trains them."""
    return module.endswith((".experts", ".experts.base_layer"))


def _takes_fused(manager: Any, layer: Any) -> bool:
    from vllm.lora.layers import FusedMoE3DWithLoRA

    return isinstance(layer, FusedMoE3DWithLoRA) or bool(getattr(manager, "_enable_mixed_moe_lora_format", False))


class _Layers:
    """The modules of one model that have a LoRA layer on this rank."""

    def __init__(self, manager: Any) -> None:
        from vllm.model_executor.models.utils import PPMissingLayer

        self._layers = manager.modules
        self._prefixes = ("", "model.") if manager.is_pooling_model else ("",)
        self._packed = {
            part: _Target(manager.modules[whole], index, len(parts))
            for whole, parts in manager.packed_modules.items()
            for index, part in enumerate(parts)
        }
        self._missing = [name for name, part in manager.model.named_modules() if isinstance(part, PPMissingLayer)]

    def elsewhere(self, module: str) -> bool:
        """Whether another pipeline-parallel rank has the module."""
        return any(module == name or module.startswith(f"{name}.") for name in self._missing)

    def target(self, module: str) -> _Target | None:
        for prefix in self._prefixes:
            if (found := self._packed.get(prefix + module)) is not None:
                return found
            # Experts in one tensor: PEFT calls the gate and up projections `experts.base_layer`.
            layer = self._layers.get(prefix + module.removesuffix(".base_layer"))
            if layer is not None:
                return _Target(layer)
        return None


def _size_problems(target: _Target, rank: int, pair: Mapping[str, Shape]) -> Iterator[str]:
    for (tensor, shape), wanted in zip(pair.items(), _wanted(target, rank), strict=True):
        if wanted is None:
            continue
        if len(shape) != len(wanted) or any(w is not None and w != s for w, s in zip(wanted, shape, strict=True)):
            sizes = ", ".join("?" if size is None else str(size) for size in wanted)
            yield f"{tensor} is {list(shape)}, and the model served needs [{sizes}]; is it the same model?"


def _wanted(target: _Target, rank: int) -> tuple[tuple[int | None, ...] | None, tuple[int | None, ...] | None]:
    """Shapes of lora_A and lora_B over all ranks, with None for a size that is not known; None for experts."""
    from vllm.lora.layers import FusedMoEWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA

    layer = target.layer
    if isinstance(layer, FusedMoEWithLoRA):
        return None, None
    if isinstance(layer, LogitsProcessorWithLoRA):
        return (rank, layer.hidden_size), (layer.vocab_size, rank)
    base = layer.base_layer
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return (rank, base.org_vocab_size), (base.embedding_dim, rank)
    return (rank, getattr(base, "input_size", None)), (_output_size(target, base), rank)


def _output_size(target: _Target, base: Any) -> int | None:
    """Outputs of the base layer, or of one of the modules packed in it, before it is split among ranks."""
    sizes = getattr(base, "output_sizes", None)
    if hasattr(base, "total_num_kv_heads"):  # where keys and values are replicated, `output_sizes` counts each copy
        keys = base.total_num_kv_heads
        sizes = [
            base.total_num_heads * base.head_size,
            keys * base.head_size,
            keys * getattr(base, "v_head_size", base.head_size),
        ]
    if target.position is None:
        return sum(sizes) if sizes else getattr(base, "output_size", None)
    return sizes[target.position] if sizes and len(sizes) == target.parts else None


def _unserved(manager: Any, modules: list[str]) -> str:
    chosen = manager.lora_config.target_modules
    endings = sorted({module.rsplit(".", 1)[-1] for module in modules})
    known = {ending for whole in manager.supported_lora_modules for ending in (whole, *_parts(manager, whole))}
    named = f"it adapts {first_few(modules)}, for which the server has no LoRA layer"
    if chosen is not None and known.issuperset(endings):
        wanted = " ".join(dict.fromkeys([*chosen, *endings]))
        return f"{named}; start it with --lora-target-modules {wanted}, or {_MERGE}"
    return f"{named} (those it can adapt: {first_few(sorted(known), limit=20)}); {_MERGE}"


def _parts(manager: Any, whole: str) -> list[str]:
    return list(manager.packed_modules_mapping.get(whole, [])) if whole != "experts" else []
