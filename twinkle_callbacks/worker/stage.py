"""The stage of a push: all its tensors, until the commit, beside the model that goes on serving.

They are copies in host memory, but for tensors that the trainer shows in its own memory until the push has ended.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch

from twinkle_callbacks.buckets.device_digest import digest_for, digestible
from twinkle_callbacks.buckets.digest import Digests, StreamDigest, digests_of, first_few
from twinkle_callbacks.buckets.packing import copyable, dtype_name
from twinkle_callbacks.errors import DigestMismatchError, WeightMismatchError
from twinkle_callbacks.worker.recorded import Layouts

DIGESTED_TOGETHER = 128
"""Tensors that stay, of which the digests are computed by one kernel on a GPU."""


class Stage:
    """Tensors of one push in the order in which they came. Owned by one thread at a time.

    Attributes:
        tensors: by name, in the order in which they came.
        digests: of the tensors, once they were wanted.
        layouts: of the tensors, once all are there.
        fits: whether the model is known to take them.
        is_shown: whether all of them so far are the trainer's own, so that none is a copy.

    Args:
        verify: compute the digest of every tensor: from its staged copy, on a GPU from what is copied.
        announced: shape of each tensor that may come, by its name; None if any may.
    """

    def __init__(self, *, verify: bool, announced: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.digests: Digests = {}
        self.layouts: Layouts = {}
        self.fits = False
        self.is_shown = True
        self._verify = verify
        self._digest: StreamDigest | None = None  # once the first tensor tells where they are
        self._undigested: list[tuple[str, torch.Tensor]] = []
        self._announced = announced

    def add(self, name: str, tensor: torch.Tensor, *, stays: bool = False) -> None:
        """Keeps a copy, since `tensor` is a view into a wire bucket that will be used again; itself if it `stays`.

        Raises:
            WeightMismatchError: it was not announced, not with this shape, or came before.
        """
        if self._announced is not None:
            self._refuse_unannounced(self._announced, name, tuple(tensor.shape))
        staged = self.tensors[name] = tensor if stays else _host_copy(tensor)
        self.is_shown &= stays
        if not self._verify:
            return
        if stays:
            self._undigested.append((name, tensor))
            if len(self._undigested) == DIGESTED_TOGETHER:  # while the sender computes its own
                self._digest_rest()
            return
        self._digest_rest()
        given = tensor if tensor.is_cuda else staged
        self._digest_on(given.device).add_tensors([name], [digestible(given)])

    def _digest_rest(self) -> None:
        undigested, self._undigested = self._undigested, []
        if undigested:
            names, tensors = zip(*undigested, strict=True)
            self._digest_on(tensors[0].device).add_lasting(names, map(digestible, tensors))

    def _digest_on(self, device: torch.device) -> StreamDigest:
        self._digest = self._digest or digest_for(device)
        return self._digest

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

    def shows(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these, if there are any, are the very tensors that it holds, all of them the trainer's own."""
        if not (tensors and self.is_shown and list(tensors) == list(self.tensors)):
            return False
        return all(map(operator.is_, tensors.values(), self.tensors.values()))

    def digest_each(self) -> None:
        """Fills `digests`, from what was computed for `verify` if it was."""
        if type(self._digest) is not StreamDigest:  # there is none, or it is a GPU's own
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
        if not self._verify:
            return ""
        self._digest_rest()
        digest = self._digest_on(torch.device("cpu"))  # unless there is one: nothing was sent
        differing = digest.differing(sent_digests)
        if differing:
            raise DigestMismatchError(
                f"{len(differing)} of {len(self.tensors)} staged tensors are not what was sent: {first_few(differing)}"
            )
        return digest.hexdigest()


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    source = copyable(tensor)
    return torch.empty(source.shape, dtype=source.dtype).copy_(source).view(tensor.dtype)
