"""Bytes of tensors and tensors of bytes: views, never copies, except where a tensor is not contiguous."""

from __future__ import annotations

import math
from typing import Any

import torch

from twinkle_callbacks.errors import ProtocolError


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's elements as a flat uint8 tensor; copies only when they do not lie in order."""
    flat = copyable(tensor.detach()).resolve_conj().resolve_neg().contiguous().reshape(-1)
    # A single element counts as contiguous whatever its stride, but can be viewed as bytes only with stride 1.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, seen as uint8 where its elements have one byte: torch views all such dtypes, but copies only some."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def memory(buffer: torch.Tensor) -> Any:
    """What the digest of a flat uint8 tensor is computed from: a memoryview of it; on a GPU the tensor itself."""
    if buffer.is_cuda:
        return buffer
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
