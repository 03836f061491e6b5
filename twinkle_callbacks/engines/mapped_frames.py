"""What MAPPED frames say of tensors in the sender's own memory, kept for the next stream: mostly it says the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from twinkle_callbacks.buckets.frames import Mapped, MappedEntry, encode, layout_hash
from twinkle_callbacks.buckets.packing import dtype_name
from twinkle_callbacks.engines.backend import Place

LyingTensor = tuple[torch.Tensor, str, Place]
"""A tensor, its name, and where receivers see it."""


class _Frame(NamedTuple):
    """A frame of the stream before: what it told of each tensor, and how that was written."""

    picture: list[tuple[str, torch.dtype, torch.Size, Place]]
    header: bytes
    layout: bytes


class Told(NamedTuple):
    """A frame that was sent, as far as it takes to send it again. It keeps no memory of the tensors on a GPU.

    Attributes:
        layout: hash of its header.
        payload_bytes: of its tensors.
        tensors: how many they are.
        again: what `StreamDigest.add_lasting` returned for them, if digests are computed.
    """

    layout: bytes
    payload_bytes: int
    tensors: int
    again: Any


class MappedFrames:
    """The MAPPED frames of one stream after another."""

    def __init__(self) -> None:
        self._frames: list[_Frame] = []
        self._number = 0
        self._told: list[Told] = []
        self._is_all = False

    def begin_stream(self) -> list[Told]:
        """The next frame is the first of its stream. Returns the frames of the stream before, if they can be repeated.

        There are none if it broke off, had frames of another kind, or tensors that must be looked at for their digests.
        """
        before, self._told = self._told, []
        can_be_repeated = self._is_all and all(told.again is not None for told in before)
        self._number, self._is_all = 0, False
        return before if can_be_repeated else []

    def note(self, told: Told) -> None:
        """A frame was sent."""
        self._told.append(told)

    def end_stream(self, *, nothing_else: bool) -> None:
        """The stream's last frame was sent; whether there was no frame of another kind."""
        self._is_all = nothing_else

    def next(self, tensors: list[LyingTensor]) -> tuple[bytes, bytes]:
        """Header of the frame that tells of these tensors, and its hash."""
        picture = [(name, tensor.dtype, tensor.shape, place) for tensor, name, place in tensors]
        if self._number == len(self._frames) or picture != self._frames[self._number].picture:
            header = _header(tensors)
            self._frames[self._number :] = [_Frame(picture, header, layout_hash(header))]
        frame = self._frames[self._number]
        self._number += 1
        return frame.header, frame.layout


def _header(tensors: list[LyingTensor]) -> bytes:
    tickets = list(dict.fromkeys(place.ticket for _, _, place in tensors))
    numbers = {ticket: number for number, ticket in enumerate(tickets)}
    entries = [
        MappedEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape), numbers[place.ticket], place.offset)
        for tensor, name, place in tensors
    ]
    return encode(Mapped(tickets, entries))
