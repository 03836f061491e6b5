"""What cannot be streamed, and what to do instead. Checked when a source is opened, before training starts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.names import canonical, loaded

_WORKS = "what works in this version: plain modules, DDP, FSDP2 (fully_shard) and DeepSpeed ZeRO-1/2"


def refuse_sharding(root: nn.Module) -> None:
    """Raises `SourceError` for FSDP1 and ZeRO-3, whose parameters are only pieces outside of their own contexts."""
    fsdp1 = loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    flat = loaded("torch.distributed.fsdp", "FlatParameter")
    if any(isinstance(child, fsdp1) for child in root.modules()):
        raise SourceError(f"the module is sharded by FSDP1 (FullyShardedDataParallel); {_WORKS}")
    for name, parameter in root.named_parameters():
        if isinstance(parameter, flat):
            raise SourceError(f"parameter {name!r} is a FlatParameter of FSDP1; {_WORKS}")
        if hasattr(parameter, "ds_id"):
            raise SourceError(f"parameter {name!r} is sharded by DeepSpeed ZeRO-3 (or zero.Init); {_WORKS}")


def refuse_adapters(module: nn.Module) -> None:
    """Raises `SourceError` where PEFT holds part of the policy's weights."""
    kinds = loaded("peft", "PeftModel") + loaded("peft.tuners.tuners_utils", "BaseTunerLayer")
    for path, child in module.named_modules():
        if isinstance(child, kinds):
            raise SourceError(
                f"{canonical(path) or 'the module'} is a PEFT {type(child).__name__}: LoRA merging is not available in "
                f"this version; merge it yourself with merge_and_unload(), or train full weights"
            )


def refuse_wrong_root(module: nn.Module) -> None:
    """Raises `SourceError` where every parameter lies in transformers models below `module`, which is none itself.

    Streamed from here, names would carry a prefix that no checkpoint has.
    """
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    if isinstance(module, pretrained):
        return
    found: dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        if isinstance(child, pretrained) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = child
    held = {id(parameter) for child in found.values() for parameter in child.parameters()}
    if not found or any(id(parameter) not in held for parameter in module.parameters()):
        return
    choices = " or ".join(f"module={canonical(path)!r} ({type(child).__name__})" for path, child in found.items())
    raise SourceError(
        f"{type(module).__name__} is not the policy itself but holds it, so its parameters' names are not those of a "
        f"checkpoint; set {choices}"
    )


def refuse_missing_values(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises `SourceError` where there are no parameters, or some have no values yet."""
    if next(module.parameters(), None) is None:
        raise SourceError(
            f"{type(module).__name__} has no parameters; pass the module that is trained, or set module=..."
        )
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise SourceError(f"{name!r} is not initialized yet; run one forward pass before training starts")
        if tensor.device.type == "meta":
            raise SourceError(
                f"{name!r} is on the meta device and has no values; load the weights first (parameters that accelerate "
                f"offloads to CPU or disk by hooks cannot be streamed)"
            )
