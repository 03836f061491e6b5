"""Which dtype a tensor is sent in."""

from __future__ import annotations

import torch

# 8-bit floats are not cast: they mean nothing without the scales beside them.
_CASTABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def sent_as(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Returns the dtype that a tensor of `dtype` is cast to where `wanted` is the source's; None casts nothing."""
    return dtype if wanted is None or dtype not in _CASTABLE else wanted
