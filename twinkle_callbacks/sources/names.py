"""Canonical names: what a parameter is called in a checkpoint, whatever wraps the module that holds it.

Wrappers of a whole module are peeled off by type. Wrappers inside add one component to the path of what they wrap, and
that component is dropped, as a whole component only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from twinkle_callbacks.errors import SourceError

_WRAPPER_COMPONENTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})


def loaded(module: str, name: str) -> tuple[type[Any], ...]:
    """The class `name` of `module` as an argument for `isinstance`, without importing anything.

    Where the module has not been imported yet there are no instances, and the tuple is empty.
    """
    cls = getattr(sys.modules.get(module), name, None)
    return (cls,) if isinstance(cls, type) else ()


def unwrap(module: nn.Module) -> nn.Module:
    """Peels wrappers of a whole module off, as many as there are."""
    while (inner := _wrapped_by(module)) is not None:
        module = inner
    return module


def _wrapped_by(module: nn.Module) -> nn.Module | None:
    deepspeed = any(cls.__name__ == "DeepSpeedEngine" for cls in type(module).__mro__)
    if deepspeed or isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        attribute = "module"
    elif isinstance(module, loaded("torch._dynamo.eval_frame", "OptimizedModule")):
        attribute = "_orig_mod"
    elif isinstance(module, loaded("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper")):
        attribute = "_checkpoint_wrapped_module"
    else:
        return None
    inner = getattr(module, attribute)
    return inner if isinstance(inner, nn.Module) else None


def select(root: nn.Module, path: str) -> nn.Module:
    """Returns the submodule at the dotted `path`, looking through wrappers before, between and after its parts.

    Raises:
        SourceError: there is no such submodule; lists the children at the point where the path ends.
    """
    current, walked = unwrap(root), type(unwrap(root)).__name__
    for part in path.split(".") if path else ():
        children = {name: child for name, child in current._modules.items() if child is not None}
        if part not in children:
            known = ", ".join(repr(name) for name in children) or "none"
            raise SourceError(f"module={path!r}: {walked} has no submodule {part!r}; its submodules are {known}")
        current, walked = unwrap(children[part]), f"{walked}.{part}"
    return current


def canonical(path: str) -> str:
    """Drops the components that wrappers add to a dotted path."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPER_COMPONENTS)


def checkpoint_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and persistent buffers of an unwrapped module under canonical names, tied ones once.

    The order is that of the module tree, so it is the same on every rank. Of tied names the one is kept that a
    checkpoint has.

    Raises:
        SourceError: two tensors have the same canonical name, or a transformers model ties other weights than it
            declares as tied.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in _walk(module):
        if tensors.setdefault(name, tensor) is not tensor:
            raise SourceError(f"two different tensors are named {name!r} once wrappers are left out; rename one")
        aliases = names.setdefault(id(tensor), [])
        if name not in aliases:
            aliases.append(name)
    patterns = _tied_patterns(module)
    strict = isinstance(module, loaded("transformers.modeling_utils", "PreTrainedModel"))
    if strict:
        _refuse_broken_ties(module, tensors)
    kept = {_checkpoint_alias(aliases, patterns, strict) for aliases in names.values()}
    unsaved = getattr(module, "_keys_to_ignore_on_save", None) or ()
    return {name: tensor for name, tensor in tensors.items() if name in kept and name not in unsaved}


def _walk(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in child._parameters.items():
            if parameter is not None:
                yield canonical(prefix + name), parameter
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield canonical(prefix + name), buffer


def _tied_patterns(module: nn.Module) -> list[re.Pattern[str]]:
    """Patterns of the names that transformers leaves out of a checkpoint where they share memory with another."""
    patterns = []
    for path, child in module.named_modules():
        prefix = f"{canonical(path)}." if canonical(path) else ""
        patterns += [re.compile(prefix + key) for key in getattr(child, "_tied_weights_keys", None) or ()]
    return patterns


def _refuse_broken_ties(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    declared: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    for name, source in declared.items():
        if name in tensors and source in tensors and tensors[name] is not tensors[source]:
            raise SourceError(
                f"{name} and {source} are declared as tied but are two parameters now, which train apart while "
                f"rollouts use one for both; put them into one fully_shard() unit, or tie_weights() before sharding"
            )


def _checkpoint_alias(aliases: list[str], patterns: list[re.Pattern[str]], strict: bool) -> str:
    if len(aliases) == 1:
        return aliases[0]
    free = [name for name in aliases if not any(pattern.search(name) for pattern in patterns)]
    if strict and len(free) > 1:
        raise SourceError(
            f"{', '.join(free)} share memory, but the model does not declare them as tied, so no checkpoint can hold "
            f"them; set the configuration's tie flag (such as tie_word_embeddings=True) or untie them"
        )
    return free[0] if free else max(aliases)
