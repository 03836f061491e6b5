"""The walk over a policy: which tensors its checkpoint has, under which names, and what each is made of.

A survey is local and reads no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import merging, quantized
from twinkle_callbacks.sources.holdings import Holdings
from twinkle_callbacks.sources.names import canonical, checkpoint_alias, loaded, refuse_broken_ties, tied_patterns
from twinkle_callbacks.sources.units import Output, Sent, Unit, Wanted


def survey(module: nn.Module, holdings: Holdings, sent: Sent, *, merge: bool = True) -> list[Unit]:
    """Returns the units whose outputs are the parameters and persistent buffers of a policy, tied ones once.

    The order is that of the module tree, so it is the same on every rank. Of tied names the one is kept that a
    checkpoint has.

    Args:
        module: the unwrapped policy.
        holdings: what each of its modules holds.
        sent: the dtype to send each tensor in.
        merge: whether PEFT's adapters are merged; False leaves out everything that is theirs.

    Raises:
        SourceError: two tensors have the same canonical name, or a transformers model ties other weights than it
            declares as tied.
    """
    units = list(_walk(module, "", holdings, sent, merging.stand_in if merge else merging.own_module))
    identities: dict[str, object] = {}
    aliases: dict[object, list[str]] = {}
    for output in (output for unit in units for output in unit.outputs):
        if identities.setdefault(output.name, output.identity) != output.identity:
            raise SourceError(f"two different tensors are named {output.name!r} once wrappers are left out; rename one")
        names = aliases.setdefault(output.identity, [])
        if output.name not in names:
            names.append(output.name)
    is_transformers = isinstance(module, loaded("transformers.modeling_utils", "PreTrainedModel"))
    if is_transformers:
        refuse_broken_ties(module, identities)
    patterns = tied_patterns(module)
    saved = {checkpoint_alias(names, patterns, is_transformers) for names in aliases.values()}
    saved.difference_update(getattr(module, "_keys_to_ignore_on_save", None) or ())
    return list(_only(units, saved))


def _walk(
    module: nn.Module, path: str, holdings: Holdings, sent: Sent, instead: Callable[[nn.Module], nn.Module | None]
) -> Iterator[Unit]:
    """The units below `path`. `instead` gives the module to walk in the place of one of PEFT's, None for a merge."""
    while merging.is_part(module):
        inner = instead(module)
        if inner is None:
            yield merging.merged(canonical(path).rstrip("."), module, holdings, sent)
            return
        module = inner
    if quantized.is_quantized(module):
        yield quantized.unit_of(canonical(path).rstrip("."), module, list(holdings.tensors(module)), sent)
        return
    for name, handle in holdings.tensors(module):
        if name not in module._non_persistent_buffers_set:
            full = canonical(path + name)
            dtype = sent(full, handle.dtype)
            yield Unit((Output(full, dtype, handle.shape, handle),), (Wanted(handle, dtype),))
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}{name}.", holdings, sent, instead)


def _only(units: list[Unit], names: set[str]) -> Iterator[Unit]:
    """The units with the outputs of these names, each name once."""
    left = set(names)
    for unit in units:
        kept = [position for position, output in enumerate(unit.outputs) if output.name in left]
        left.difference_update(unit.outputs[position].name for position in kept)
        if kept:
            yield unit.only(kept)
