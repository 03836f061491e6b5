"""What MAPPED frames say of tensors in the sender's own memory, kept for the next stream: mostly it says the same."""

from __future__ import annotations

from typing import NamedTuple

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


class MappedFrames:
    """The MAPPED frames of one stream after another."""

    def __init__(self) -> None:
        self._frames: list[_Frame] = []
        self._number = 0

    def begin_stream(self) -> None:
        """The next frame is the first of its stream."""
        self._number = 0

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
