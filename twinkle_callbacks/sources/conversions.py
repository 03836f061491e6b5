"""From the names and layouts of a module to those of its checkpoint.

transformers 5 trains in layouts of its own, such as all experts of a layer fused into one parameter, and converts them
back when it saves. vLLM loads the checkpoint's layout, so a push has to convert as well, but without ever holding the
whole model: a plan made from names alone says which tensors a conversion needs together, and each such group is
converted, by transformers itself, as soon as its last tensor has come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.names import canonical, loaded

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class ConversionPlan:
    """The plan of a module that needs no conversion: everything passes through unchanged.

    Attributes:
        largest_group: the largest number of tensors that are held at a time.
    """

    largest_group = 1

    def stream(self, named: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Converts a module's tensors, given in any order, to those of its checkpoint. Meta tensors are fine."""
        yield from named


def plan_conversions(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> ConversionPlan:
    """Plans how the named tensors of `module` become those of its checkpoint. Local, and without touching values.

    Args:
        module: the unwrapped module.
        tensors: its tensors by canonical name, as meta tensors of the full shape.

    Raises:
        SourceError: the installed transformers cannot convert this model back to its checkpoint.
    """
    if not isinstance(module, loaded("transformers.modeling_utils", "PreTrainedModel")):
        return ConversionPlan()
    try:
        return _TransformersPlan(module, tensors)
    except ImportError as error:
        raise SourceError(
            f"transformers is too old to stream from ({error}); install transformers 5.17 or later"
        ) from error
    except SourceError:
        raise
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise SourceError(
            f"transformers cannot convert {type(module).__name__} back to its checkpoint layout: "
            f"{type(error).__name__}: {error}; see whether save_pretrained() works on it"
        ) from error


class _TransformersPlan(ConversionPlan):
    """Groups the names that one converter of transformers needs together."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        from transformers.core_model_loading import WeightConverter, dot_natural_key, revert_weight_conversion

        self._revert = revert_weight_conversion
        self._skeleton = _skeleton(module)
        conversions = _conversions(module, self._skeleton)
        self._skeleton._weight_conversions = conversions
        self._skeleton.get_parameter = tensors.__getitem__  # some conversions compare with the parameter's shape
        reverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
        converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in reverse if not isinstance(entry, WeightConverter)]
        self._renamed: dict[str, str] = {}
        self._group_of: dict[str, str] = {}
        self._members: dict[str, list[str]] = {}
        for name in sorted(tensors, key=dot_natural_key):  # the order that transformers applies stateful renamings in
            group = _rename(name, converters, first_only=True)
            if group is None:
                self._renamed[name] = _rename(name, renamings, first_only=False) or name
            else:
                self._group_of[name] = group
                self._members.setdefault(group, []).append(name)
        self.largest_group = max(map(len, self._members.values()), default=1)
        self._check(type(module).__name__, tensors, bool(conversions))

    def _check(self, model: str, tensors: Mapping[str, torch.Tensor], converts: bool) -> None:
        """Compares with transformers' own conversion of the whole model, on meta tensors."""
        whole = self._revert(self._skeleton, dict(tensors)) if converts else tensors
        wanted = {(name, tuple(tensor.shape), tensor.dtype) for name, tensor in whole.items()}
        planned = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.stream(tensors.items())]
        if len(planned) != len(wanted) or set(planned) != wanted:
            odd = sorted({name for name, _, _ in wanted.symmetric_difference(planned)}) or ["repeated names"]
            raise SourceError(
                f"converting {model} in parts gives other tensors than converting it at once ({', '.join(odd[:5])}); "
                f"this version of transformers is not supported for this model"
            )

    def stream(self, named: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        pending: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in named:
            if name in self._renamed:
                yield self._renamed[name], tensor
            else:
                key = self._group_of[name]
                pending.setdefault(key, {})[name] = tensor
                if len(pending[key]) == len(self._members[key]):
                    with torch.no_grad():
                        reverted = self._revert(self._skeleton, pending.pop(key))
                    yield from reverted.items()
                    del reverted
            del tensor  # before the next one is gathered, not after


def _rename(name: str, transforms: list[Any], *, first_only: bool) -> str | None:
    """Applies the renaming half of transforms: the first that matches, or all in turn. None where none matches."""
    matched = False
    for transform in transforms:
        name, pattern = transform.rename_source_key(name)
        matched = matched or pattern is not None
        if matched and first_only:
            break
    return name if matched else None


def _conversions(module: nn.Module, skeleton: Any) -> list[Any]:
    """The conversions that loading made, or those that it would make if the model was not loaded."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    used: list[Any] | None = getattr(module, "_weight_conversions", None)
    if used is not None and not _loaded_an_adapter(used):
        return list(used)
    # As save_pretrained does: a model that was not loaded has no prefix that loading took away.
    mapping = get_model_conversion_mapping(skeleton, add_legacy=False)
    return [conversion for conversion in mapping if not isinstance(conversion, PrefixChange)]


def _loaded_an_adapter(used: list[Any]) -> bool:
    """Whether these are PEFT's renamings. transformers' `load_adapter` leaves them in place of the model's own."""
    return any(pattern.startswith("base_model.") for conversion in used for pattern in conversion.source_patterns)


def _skeleton(module: nn.Module) -> Any:
    """The transformers models inside `module`, without contents, at canonical paths and of their original classes.

    transformers looks its conversions up by path and by class. Wrappers change the paths, and `fully_shard` changes the
    class into one that transformers takes for custom code, which has no conversions.
    """
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    root = _empty(module)
    for path, child in module.named_modules():
        if not path or not isinstance(child, pretrained):
            continue
        *parents, name = canonical(path).split(".")
        node = root
        for part in parents:
            node = node._modules.setdefault(part, nn.Module())
        node._modules[name] = _empty(child)
    return root


def _empty(module: nn.Module) -> Any:
    original: Any = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch."))
    empty = original.__new__(original)
    nn.Module.__init__(empty)
    empty.config = module.config
    return empty
