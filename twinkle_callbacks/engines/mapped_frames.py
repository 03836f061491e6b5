"""What MAPPED frames say of tensors in the sender's own memory, kept for the next stream: mostly it says the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from twinkle_callbacks.buckets.frames import Mapped, MappedEntry, encode, layout_hash
from twinkle_callbacks.buckets.packing import dtype_name
from twinkle_callbacks.engines.backend import Place

LyingTensor = tuple[torch.Tensor, str, Place]
"""A tensor, its name, and where receivers see it."""


@dataclass(eq=False)
class Frame:
    """A frame of the stream before. It keeps no memory of the tensors on a GPU.

    Attributes:
        picture: what it told of each tensor.
        header: how that was written.
        layout: the header's hash.
        payload_bytes: of its tensors.
        again: what `StreamDigest.add_lasting` returned for them, if digests are computed.
    """

    picture: list[tuple[str, torch.dtype, torch.Size, Place]]
    header: bytes
    layout: bytes
    payload_bytes: int
    again: Any = ()


class MappedFrames:
    """The MAPPED frames of one stream after another."""

    def __init__(self) -> None:
        self._frames: list[Frame] = []
        self._number = 0
        self._is_all = False

    def begin_stream(self, *, repeats: bool) -> list[Frame]:
        """The next frame is the first of its stream. Returns the frames of the stream before, if it can be repeated.

        There are none unless it `repeats`, nor if that before broke off, had frames of another kind, or tensors that
        must be looked at for their digests.
        """
        before = self._frames[: self._number] if repeats and self._is_all else []
        if before and all(frame.again is not None for frame in before):
            return before
        self._number, self._is_all = 0, False
        return []

    def end_stream(self, *, nothing_else: bool) -> None:
        """The stream's last frame was sent; whether there was no frame of another kind."""
        self._is_all = nothing_else

    def next(self, tensors: list[LyingTensor]) -> Frame:
        """The frame that tells of these tensors."""
        picture = [(name, tensor.dtype, tensor.shape, place) for tensor, name, place in tensors]
        if self._number == len(self._frames) or picture != self._frames[self._number].picture:
            header, nbytes = _header(tensors), sum(tensor.nbytes for tensor, _, _ in tensors)
            self._frames[self._number :] = [Frame(picture, header, layout_hash(header), nbytes)]
        frame = self._frames[self._number]
        self._number += 1
        return frame


def _header(tensors: list[LyingTensor]) -> bytes:
    tickets = list(dict.fromkeys(place.ticket for _, _, place in tensors))
    numbers = {ticket: number for number, ticket in enumerate(tickets)}
    entries = [
        MappedEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape), numbers[place.ticket], place.offset)
        for tensor, name, place in tensors
    ]
    return encode(Mapped(tickets, entries))
