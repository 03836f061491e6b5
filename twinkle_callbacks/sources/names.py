"""Canonical names: what a parameter is called in a checkpoint, whatever wraps the module that holds it.

Wrappers of a whole module are peeled off by type. Wrappers inside add one component to the path of what they wrap, and
that component is dropped, as a whole component only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from twinkle_callbacks.errors import SourceError

WRAPPER_COMPONENTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})


def loaded(module: str, name: str) -> tuple[type[Any], ...]:
    """The class `name` of `module` as an argument for `isinstance`, without importing anything.

    Where the module has not been imported yet there are no instances, and the tuple is empty.
    """
    cls = getattr(sys.modules.get(module), name, None)
    return (cls,) if isinstance(cls, type) else ()


def peft_wrappers() -> tuple[type[Any], ...]:
    """PEFT's classes that wrap a whole model, for `isinstance`; empty where nobody has imported it."""
    return loaded("peft.peft_model", "PeftModel") + loaded("peft.mixed_model", "PeftMixedModel")


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
    elif isinstance(module, loaded("torch.distributed.fsdp", "FullyShardedDataParallel")):
        attribute = "_fsdp_wrapped_module"
    elif isinstance(module, loaded("peft", "PeftModel")):
        base: nn.Module = module.get_base_model()
        return base
    elif isinstance(module, loaded("peft", "PeftMixedModel")):
        mixed: Any = module
        inner_model: nn.Module = mixed.base_model.model
        return inner_model
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
    return ".".join(part for part in path.split(".") if part not in WRAPPER_COMPONENTS)


def tied_patterns(module: nn.Module) -> list[re.Pattern[str]]:
    """Patterns of the names that transformers leaves out of a checkpoint where they share memory with another."""
    patterns = []
    for path, child in module.named_modules():
        prefix = f"{canonical(path)}." if canonical(path) else ""
        patterns += [re.compile(prefix + key) for key in getattr(child, "_tied_weights_keys", None) or ()]
    return patterns


def refuse_broken_ties(module: nn.Module, identities: Mapping[str, object]) -> None:
    """Raises `SourceError` where a transformers model ties other weights than it declares as tied."""
    declared: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    for name, source in declared.items():
        if name in identities and source in identities and identities[name] != identities[source]:
            raise SourceError(
                f"{name} and {source} are declared as tied but are two parameters now, which train apart while "
                f"rollouts use one for both; put them into one fully_shard() unit, or tie_weights() before sharding"
            )


def checkpoint_alias(aliases: list[str], patterns: list[re.Pattern[str]], strict: bool) -> str:
    """Of the names of one tensor, the one that a checkpoint has.

    Args:
        aliases: the names, in the order of the module tree.
        patterns: those of `tied_patterns`.
        strict: whether ties that are not declared are an error, as they are for transformers.

    Raises:
        SourceError: no checkpoint can hold this tensor under one name.
    """
    if len(aliases) == 1:
        return aliases[0]
    free = [name for name in aliases if not any(pattern.search(name) for pattern in patterns)]
    if strict and len(free) > 1:
        raise SourceError(
            f"{', '.join(free)} share memory, but the model does not declare them as tied, so no checkpoint can hold "
            f"them; set the configuration's tie flag (such as tie_word_embeddings=True) or untie them"
        )
    return free[0] if free else max(aliases)
