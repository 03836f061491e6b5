"""The staged copy of a push: whole tensors in host memory, until the commit, beside the model that goes on serving."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from twinkle_callbacks.buckets.digest import Digests, StreamDigest, digests_of, first_few
from twinkle_callbacks.buckets.packing import as_bytes, copyable, dtype_name, memory
from twinkle_callbacks.errors import DigestMismatchError, WeightMismatchError


class Stage:
    """Tensors of one push in the order in which they came. Owned by one thread at a time.

    Args:
        verify: compute the digest of every tensor, from its staged copy.
        announced: shape of each tensor that may come, by its name; None if any may.
    """

    def __init__(self, *, verify: bool, announced: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.digests: Digests = {}  # of the tensors, once they were wanted
        self._digest = StreamDigest() if verify else None
        self._announced = announced

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps a copy; `tensor` is a view into a wire bucket that will be used again.

        Raises:
            WeightMismatchError: it was not announced, not with this shape, or came before.
        """
        if self._announced is not None:
            self._refuse_unannounced(self._announced, name, tuple(tensor.shape))
        source = copyable(tensor)
        staged = torch.empty(source.shape, dtype=source.dtype).copy_(source).view(tensor.dtype)
        self.tensors[name] = staged
        if self._digest is not None:
            self._digest.add_tensors([name], [memory(as_bytes(staged))])

    def _refuse_unannounced(self, announced: Mapping[str, tuple[int, ...]], name: str, shape: tuple[int, ...]) -> None:
        if name in self.tensors:
            raise WeightMismatchError(f"{name} was sent twice")
        if announced.get(name) != shape:
            said = f"with the shape {list(announced[name])}" if name in announced else "without it"
            raise WeightMismatchError(
                f"{name} {list(shape)} was sent, but its trainer announced the adapter {said} when it joined"
            )

    def missing(self) -> list[str]:
        """Names that were announced and did not come."""
        return [name for name in self._announced or () if name not in self.tensors]

    def digest_each(self) -> None:
        """Fills `digests`, from what was computed for `verify` if it was."""
        if self._digest is None:
            self.digests = digests_of(self.tensors.items())
            return
        computed = zip(self.tensors.items(), self._digest.values, strict=True)
        self.digests = {name: (dtype_name(tensor.dtype), f"{value:016x}") for (name, tensor), value in computed}

    def verify(self, sent_digests: bytes) -> str:
        """Compares the digest of every staged tensor with the sender's and returns that of the stream.

        Returns an empty string when they are off.

        Raises:
            DigestMismatchError: names the tensors that are not what was sent.
        """
        if self._digest is None:
            return ""
        differing = self._digest.differing(sent_digests)
        if differing:
            raise DigestMismatchError(
                f"{len(differing)} of {len(self.tensors)} staged tensors are not what was sent: {first_few(differing)}"
            )
        return self._digest.hexdigest()
