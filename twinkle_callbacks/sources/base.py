"""The seam between a trainer's weights and everything that sends them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from twinkle_callbacks.buckets.layout import TensorSpec

if TYPE_CHECKING:
    import torch


class WeightSource(ABC):
    """A repeatable stream of the policy's weights under their checkpoint names.

    Lifecycle: opened once, on every trainer rank, when training starts; `specs()` for the handshake; then one
    `stream()` a push, each to its end, none overlapping an optimizer step or another stream of the same weights.

    Which process runs what: opening and `specs()` are local and never communicate. `stream()` is collective where the
    weights are sharded: every rank must request every tensor, also ranks that only throw them away.

    Guaranteed: names, dtypes, shapes and order are those of `specs()`, the same on every rank and in every stream, each
    name once. Tensors are detached, full, and exactly the values of the checkpoint that saving the policy now would
    write, cast to the source's dtype. The weights are never changed.

    Not guaranteed: that tensors are contiguous, that they are copies (those of an unsharded module are views of it), or
    that they live on one device. Each is valid only until the next is requested.
    """

    @property
    def is_collective(self) -> bool:
        """Whether `stream()` communicates, so that a rank that stops early leaves the others waiting for it."""
        return False

    @abstractmethod
    def specs(self) -> list[TensorSpec]:
        """Returns name, dtype and full shape of every tensor that `stream()` yields, in its order."""

    @abstractmethod
    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields `(checkpoint name, full tensor)`. The consumer's autograd mode is not affected.

        Raises:
            SourceError: the weights are not those the source was opened on, or cannot be read.
        """
