"""DeepSpeed ZeRO-3: each parameter is flattened, padded, and cut into one range for each rank."""

from __future__ import annotations

from typing import Any

import torch

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.handles import LEADER, Handle, of_other_ranks, ranges, sharded


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 (or `zero.Init`) holds this parameter."""
    return hasattr(parameter, "ds_id") and hasattr(parameter, "ds_tensor")


def handle(name: str, parameter: Any) -> Handle:
    """The handle of a parameter of ZeRO-3. Local: reads the partition itself, so nothing is gathered by DeepSpeed.

    How partitions are laid out: deepspeed/runtime/zero/partition_parameters.py, `_partition_param`.

    Raises:
        SourceError: the partition is on disk (NVMe offload), or not as large as its group says.
    """
    part, shape, numel = parameter.ds_tensor, tuple(parameter.ds_shape), int(parameter.ds_numel)
    status = getattr(getattr(part, "status", None), "name", "AVAILABLE")
    if status != "AVAILABLE":
        raise SourceError(
            f"{name!r}: its partition is not in memory ({status}), as with parameters offloaded to NVMe; offload to "
            f"cpu or not at all"
        )
    if hasattr(part, "ds_quant_scale"):
        raise SourceError(
            f"{name!r} is quantized by DeepSpeed, whose codes are no weights; "
            f"set zero_quantized_nontrainable_weights to false"
        )
    ranks = tuple(torch.distributed.get_process_group_ranks(parameter.ds_process_group))
    rank = torch.distributed.get_rank()
    if LEADER not in ranks:
        return of_other_ranks(part.dtype, shape)
    chunk = part.numel()
    if not numel <= chunk * len(ranks) < numel + len(ranks):
        raise SourceError(
            f"{name!r}: rank {rank} holds {chunk} of {numel} elements, which is not its share among ranks {ranks} "
            f"(as with MiCS); use plain ZeRO-3"
        )
    blocks = ranges(ranks, chunk, 0, numel)
    size = blocks[rank].numel if rank in blocks else 0
    return sharded(name, part.dtype, shape, lambda: parameter.ds_tensor.detach().view(-1)[:size], blocks, (numel,))
