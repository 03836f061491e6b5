"""Streams of tensors of every dtype, shape and memory layout, for hypothesis, and their comparison bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from hypothesis import strategies as st

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)
LAYOUTS = ("plain", "transposed", "strided", "offset", "expanded")


class Recipe(NamedTuple):
    """How to make a tensor: everything but its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str

    def make(self, seed: int) -> torch.Tensor:
        return lay_out(random_tensor(self.dtype, self.shape, seed), self.layout)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bits, NaNs and denormals of all kinds included; a bool has only two values."""
    values = torch.Generator().manual_seed(seed)
    nbytes = math.prod(shape) * dtype.itemsize
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (nbytes,), dtype=torch.uint8, generator=values)
    return bits.view(dtype).view(shape)


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor of the same values that lies otherwise in memory."""
    if tensor.dtype.itemsize == 1:  # torch copies the bytes of some dtypes only
        return _lay_out(tensor.view(torch.uint8), layout).view(tensor.dtype)
    return _lay_out(tensor, layout)


def _lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.dim() >= 1:
        room = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1]))
        room[..., ::2] = tensor
        return room[..., ::2]
    if layout == "offset":
        room = tensor.new_empty(tensor.numel() + 3)[3:].view(tensor.shape)
        return room.copy_(tensor)
    if layout == "expanded" and tensor.dim() >= 1 and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    return tensor


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements in order, whatever its layout; written without the package's own helpers."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    plain = plain.view(torch.uint8) if plain.dtype.itemsize == 1 else plain
    flat = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain).view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def picture(stream: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.dtype, tuple[int, ...], bytes]]:
    """All that a receiver must get, in a form that `==` compares bit for bit."""
    return [(name, tensor.dtype, tuple(tensor.shape), bits(tensor)) for name, tensor in stream]


def recipes(max_side: int = 12) -> st.SearchStrategy[Recipe]:
    shapes = st.lists(st.integers(0, max_side), max_size=3).map(tuple)
    names = st.sampled_from(["model.embed_tokens.weight", "lm_head.weight", "a", "", "gewicht.ß", "b" * 300])
    return st.builds(Recipe, names, st.sampled_from(DTYPES), shapes, st.sampled_from(LAYOUTS))


@st.composite
def stream_series(draw: st.DrawFn) -> list[list[tuple[Recipe, int]]]:
    """Consecutive streams made from a few recipes, so that they repeat, shorten, lengthen and diverge."""
    pool = draw(st.lists(recipes(), min_size=1, max_size=5))
    picks = st.lists(st.integers(0, len(pool) - 1), max_size=9)
    series = draw(st.lists(picks, min_size=1, max_size=4))
    if draw(st.booleans()):
        series += [series[0], series[0]]
    return [[(pool[i], 1000 * n + k) for k, i in enumerate(stream)] for n, stream in enumerate(series)]


def make_stream(stream: list[tuple[Recipe, int]]) -> list[tuple[str, torch.Tensor]]:
    return [(recipe.name, recipe.make(seed)) for recipe, seed in stream]
