"""Where the weights come from: a trained module, sharded or not, or a checkpoint folder.

A `WeightSource` yields `(checkpoint name, full tensor)` pairs in the names and layouts that vLLM's loader expects.
`open_source` makes one over whatever the trainer holds, with PEFT's adapters merged or, by `merge=False`, without them;
`AdapterSource` is one over an adapter alone, `CheckpointSource` one over files. The way of a tensor:

    holdings.py   which module holds what     dtensor.py | fsdp1.py | zero3.py   which rank holds which part: handles.py
    survey.py     what the checkpoint has     merging.py | quantized.py          what each of it is made of: units.py
    gather.py     the parts come to rank 0    conversions.py                     names and layouts of the checkpoint
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.base import WeightSource

if TYPE_CHECKING:
    import torch
    from torch import nn

    from twinkle_callbacks.sources.adapter import AdapterSource
    from twinkle_callbacks.sources.checkpoint import CheckpointSource

__all__ = ["AdapterSource", "CheckpointSource", "WeightSource", "open_source"]


def open_source(
    model: nn.Module | WeightSource, *, module: str = "", dtype: torch.dtype | None = None, merge: bool = True
) -> WeightSource:
    """Opens a source over what the trainer holds. Runs on every trainer rank, without communication.

    Args:
        model: the module as the framework wrapped it (DDP, FSDP1, FSDP2, TP, DeepSpeed, PEFT, compiled), or a
            `WeightSource`, which is returned as it is, whatever the other arguments.
        module: path of the policy inside `model`, such as `net` or `policy.model`; wrappers on the way do not count.
        dtype: dtype that floating point tensors are cast to before they are gathered; None sends each in its own.
        merge: whether PEFT's active adapters are merged on the way; False streams the base model's own weights, as they
            are below the adapters, for rollouts that get those from an `AdapterSource`. The same without adapters.

    Raises:
        SourceError: `model` cannot be streamed; the message says why and what to do.
    """
    if isinstance(model, WeightSource):
        return model
    from torch import nn

    from twinkle_callbacks.sources.module import ModuleSource

    if not isinstance(model, nn.Module):
        raise SourceError(
            f"a torch.nn.Module or a WeightSource is needed, got {type(model).__name__} {model!r:.80}; "
            f"for a checkpoint folder use CheckpointSource(path)"
        )
    return ModuleSource(model, module=module, dtype=dtype, merge=merge)


def __getattr__(name: str) -> object:
    # Torch is loaded only when a source is used, so that `--help` stays fast.
    if name == "AdapterSource":
        from twinkle_callbacks.sources.adapter import AdapterSource

        return AdapterSource
    if name == "CheckpointSource":
        from twinkle_callbacks.sources.checkpoint import CheckpointSource

        return CheckpointSource
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
