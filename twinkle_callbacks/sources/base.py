"""The seam between a trainer's weights and everything that sends them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import TYPE_CHECKING

from twinkle_callbacks.buckets.layout import TensorSpec

if TYPE_CHECKING:
    import torch


class WeightSource(ABC):
    """A repeatable stream of the policy's weights under their checkpoint names.

    Lifecycle: opened once, on every trainer rank, when training starts; `agreement()` for the handshake; then for each
    push `check()` and one `stream()`, none overlapping an optimizer step or another stream of the same weights.

    Which process runs what: opening, `specs()`, `agreement()` and `check()` are local: they never communicate, and
    succeed or fail on each rank by themselves. `stream()` is collective where the weights are sharded. Every rank goes
    through it; only rank 0, which sends them on, gets tensors, while the others get none and give theirs. A rank that
    fails, or closes its stream early, must still do its part for the others to come to their end, and raise afterwards.

    Guaranteed: names, dtypes, shapes and order are those of `specs()`, the same on every rank and in every stream, each
    name once. Tensors are detached, full, and exactly the values of the checkpoint that saving the policy now would
    write, cast to the source's dtype. The weights are never changed, though FSDP2 modules may be resharded.

    Not guaranteed: that tensors are contiguous, that they are copies (those of an unsharded module are views of it), or
    that they live on one device. Each is valid only until the next is requested.
    """

    @abstractmethod
    def specs(self) -> list[TensorSpec]:
        """Returns name, dtype and full shape of every tensor that `stream()` yields, in its order."""

    def agreement(self) -> list[str]:
        """Returns what has to be equal on all ranks, a line each: what is streamed, and what it is gathered from."""
        return [f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in self.specs()]

    def check(self) -> None:
        """Says whether `stream()` can begin: on rank 0 before anything is sent, and on the others too.

        Raises:
            SourceError: the weights are not those the source was opened on.
        """
        return  # nothing can change where nothing is trained

    def lasts(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of the stream stays as it is until the push has ended: the module's own memory."""
        return False

    @property
    def arrangement(self) -> int | None:
        """A number that changes with each `check()` that found more changed than values; None where none can tell.

        While it is the same, each tensor of the stream that lasts lies where it lay.
        """
        return None

    @abstractmethod
    def stream(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yields `(checkpoint name, full tensor)` on rank 0, nothing elsewhere.

        Raises:
            SourceError: the weights are not those the source was opened on, or cannot be read.
        """
