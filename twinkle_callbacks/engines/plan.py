"""The plan of a stream: where each tensor goes in the buckets; kept, since the next stream is mostly like it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from twinkle_callbacks.buckets.frames import Entry
from twinkle_callbacks.buckets.layout import Chunk


class Step(NamedTuple):
    """One tensor of the plan: what it looks like, and where in the buckets it goes.

    `view` is its place and `data` the memory of it, if it goes there in one piece.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    entries: list[Entry]
    chunks: list[Chunk]
    view: torch.Tensor | None
    data: memoryview | None


class Outline(NamedTuple):
    """A bucket of the stream before: what announces it, should the stream go on like that one."""

    layout: bytes
    payload_bytes: int
    entries: int


class Bucket:
    """The bucket being filled; `announced` if its control block is on the wire already."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.side = number % 2
        self.announced: Outline | None = None
        self.steps: list[Step] = []
        self.entries: list[Entry] = []
        self.used = 0
        self.undigested_bytes = 0
        self.pieces_sent = 0
