"""FSDP1 (`FullyShardedDataParallel`): each unit's parameters lie flattened, one after another, in a sharded buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.handles import LEADER, Handle, of_other_ranks, ranges, sharded
from twinkle_callbacks.sources.names import canonical, loaded

Place = tuple[int, str]
"""A module's id and the name of one of its parameters."""


def wrapper() -> tuple[type[Any], ...]:
    """The class of the units, for `isinstance`; empty where nobody has imported it."""
    return loaded("torch.distributed.fsdp", "FullyShardedDataParallel")


def handles(modules: Iterable[nn.Module]) -> dict[Place, Handle]:
    """The handles of all parameters that FSDP1 holds for any of `modules`, those of tied ones shared. Local.

    Reads the shard itself (the fp32 one under mixed precision, the one on the CPU if it is offloaded), so nothing is
    unsharded. How it is laid out: torch/distributed/fsdp/_flat_param.py, `FlatParamHandle`.

    Raises:
        SourceError: FSDP1 over tensor parallelism, whose parts are no plain tensors.
    """
    found: dict[Place, Handle] = {}
    for unit in modules:
        if isinstance(unit, wrapper()):
            flat = getattr(unit, "_handle", None)
            if flat is not None:
                found.update(_of_unit(flat))
    return found


def buffer_dtypes(modules: Iterable[nn.Module]) -> dict[int, torch.dtype]:
    """The dtypes that buffers, by their ids, had before FSDP1 cast them to its `buffer_dtype`.

    Its state dicts cast them back; see torch/distributed/fsdp/_state_dict_utils.py.
    """
    found = {}
    for module in modules:
        unit: Any = module
        if isinstance(unit, wrapper()) and unit._is_root and unit.mixed_precision.buffer_dtype is not None:
            for name, buffer in unit.module.named_buffers():
                found[id(buffer)] = unit._buffer_name_to_orig_dtype.get(canonical(name), buffer.dtype)
    return found


def is_flat(parameter: torch.Tensor) -> bool:
    """Whether this is the buffer itself, which is no parameter of the policy."""
    return getattr(parameter, "_is_flat_param", False)


def refuse_part(name: str, parameter: torch.Tensor) -> None:
    """Raises `SourceError` for a flattened parameter whose unit is not at hand: nobody could tell which part it is."""
    if getattr(parameter, "_fsdp_flattened", False) or is_flat(parameter):
        raise SourceError(
            f"{name!r} is a part of a parameter of FSDP1 (FullyShardedDataParallel), whose wrapper is outside of the "
            f"module given; pass the whole wrapped module, and the path of the policy inside it as module=..."
        )


def _of_unit(flat: Any) -> Iterator[tuple[Place, Handle]]:
    parameter = flat.flat_param
    if any(extension is not None for extension in parameter._param_extensions):
        raise SourceError(
            f"{parameter._fqns[0]!r}: FSDP1 (FullyShardedDataParallel) over tensor parallelism cannot be streamed; "
            f"use fully_shard()"
        )
    starts = [start for start, _ in flat._get_flat_param_offsets()]
    spans = [start for start, padding in zip(starts, parameter._is_padding_mask, strict=True) if not padding]
    own: dict[Place, Handle] = {}
    described = zip(parameter._param_infos, parameter._fqns, parameter._shapes, parameter._numels, spans, strict=True)
    for index, (info, fqn, shape, numel, start) in enumerate(described):
        own[id(info.module), info.param_name] = _handle(flat, index, fqn, tuple(shape), start, start + numel)
    yield from own.items()
    for info in parameter._shared_param_infos:
        yield (id(info.module), info.param_name), own[id(info.prim_module), info.prim_param_name]


def _handle(flat: Any, index: int, name: str, shape: tuple[int, ...], start: int, stop: int) -> Handle:
    dtype = _shard(flat).dtype
    if not flat.uses_sharded_strategy:
        return Handle(dtype, shape, lambda: _part(flat, index, start, stop).view(shape))
    ranks = tuple(torch.distributed.get_process_group_ranks(flat.process_group))
    rank = torch.distributed.get_rank()
    if LEADER not in ranks:
        return of_other_ranks(dtype, shape)
    chunk = _shard(flat).numel()
    blocks = ranges(ranks, chunk, start, stop)
    first = max(start, ranks.index(rank) * chunk) - ranks.index(rank) * chunk
    size = blocks[rank].numel if rank in blocks else 0
    return sharded(name, dtype, shape, lambda: _part(flat, index, first, first + size), blocks, (stop - start,))


def _part(flat: Any, index: int, start: int, stop: int) -> torch.Tensor:
    """Elements `start` to `stop` of this rank's shard: the part of the parameter at position `index`."""
    shard, originals = _shard(flat), flat.flat_param._params
    if originals is None or flat.flat_param.data_ptr() != shard.data_ptr():
        return shard[start:stop]
    # The parameter that a user sees. Who assigned its `.data`, as an average of weights does, finds FSDP copying that
    # into the shard, but only before the next forward pass.
    part: torch.Tensor = originals[index].detach()
    return part.reshape(-1)


def _shard(flat: Any) -> torch.Tensor:
    # Set by the first forward pass; until then the parameter is the shard.
    shard: torch.Tensor = getattr(flat.flat_param, "_local_shard", flat.flat_param)
    return shard.detach()
