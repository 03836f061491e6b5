"""Bytes of tensors and tensors of bytes: views, never copies, except where a tensor is not contiguous."""

from __future__ import annotations

import math

import torch

from twinkle_callbacks.errors import ProtocolError


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's elements as a flat uint8 tensor; copies only when it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def memory(buffer: torch.Tensor) -> memoryview:
    """The memory of a flat uint8 CPU tensor."""
    return memoryview(buffer.numpy())  # type: ignore[arg-type]  # an array is a buffer; numpy 2.3's stubs do not say so


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype on the wire, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name such as `bfloat16`.

    Raises:
        ProtocolError: this torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ProtocolError(f"the sender's dtype {name!r} does not exist in torch {torch.__version__} on this side")
    return dtype


def nbytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor of this dtype and shape."""
    return math.prod(shape) * dtype.itemsize


def view_at(buffer: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The bytes of `buffer` from `offset` on, seen as a tensor of this dtype and shape; `offset` must be aligned."""
    return buffer[offset : offset + nbytes_of(dtype, shape)].view(dtype).view(shape)
