"""A weight source that reports each tensor's bytes as they are taken, for a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch

from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.buckets.packing import dtype_of, nbytes_of
from twinkle_callbacks.sources import WeightSource


class CountedSource(WeightSource):
    """Yields what `source` yields and calls `taken(nbytes)` when the consumer is done with a tensor."""

    def __init__(self, source: WeightSource, taken: Callable[[int], object]) -> None:
        self._source = source
        self._taken = taken

    def specs(self) -> list[TensorSpec]:
        return self._source.specs()

    def stream(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        for name, tensor in self._source.stream():
            nbytes = tensor.nbytes
            yield name, tensor
            self._taken(nbytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of one whole stream."""
        return sum(nbytes_of(dtype_of(spec.dtype), spec.shape) for spec in self.specs())
