"""The staged copy of a push: whole tensors in host memory, until the commit, beside the model that goes on serving."""

from __future__ import annotations

import torch

from twinkle_callbacks.buckets.digest import StreamDigest, first_few
from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.buckets.packing import as_bytes, dtype_name, memory
from twinkle_callbacks.errors import DigestMismatchError


class Stage:
    """Tensors of one push in the order in which they came. Owned by one thread at a time."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps a copy; `tensor` is a view into a wire bucket that will be used again."""
        self.tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)

    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in self.tensors.items())

    def verify(self, sent_digests: bytes) -> str:
        """Compares the digest of every staged tensor with the sender's and returns that of the stream.

        Returns an empty string when the sender computed none.

        Raises:
            DigestMismatchError: names the tensors that are not what was sent.
        """
        if not sent_digests:
            return ""
        digest = StreamDigest()
        digest.add_tensors(self.tensors, (memory(as_bytes(tensor)) for tensor in self.tensors.values()))
        differing = digest.differing(sent_digests)
        if differing:
            raise DigestMismatchError(
                f"{len(differing)} of {len(self.tensors)} staged tensors are not what the trainer sent: {first_few(differing)}"
            )
        return digest.hexdigest()
