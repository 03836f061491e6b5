"""Tensors as bytes and back: views where possible, exact always."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from tests.unit.engine_streams import DTYPES, LAYOUTS, Recipe, bits, lay_out, random_tensor, recipes
from twinkle_callbacks.buckets.packing import as_bytes, dtype_name, dtype_of, memory, nbytes_of, view_at
from twinkle_callbacks.errors import ProtocolError


@given(recipes())
def test_bytes_of_a_tensor_are_its_elements_in_order(recipe: Recipe) -> None:
    tensor = recipe.make(0)
    flat = as_bytes(tensor)
    assert flat.dtype is torch.uint8
    assert flat.dim() == 1
    assert memory(flat).tobytes() == bits(tensor)
    assert nbytes_of(tensor.dtype, tuple(tensor.shape)) == flat.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (1, 1), (5, 1), (1, 5), (0, 3), (3, 0), (4, 5)], ids=str)
def test_no_shape_or_layout_is_an_exception(shape: tuple[int, ...], layout: str) -> None:
    for dtype in DTYPES:
        tensor = lay_out(random_tensor(dtype, shape, 0), layout)
        assert memory(as_bytes(tensor)).tobytes() == bits(tensor), dtype


def test_contiguous_tensor_is_not_copied() -> None:
    tensor = torch.randn(3, 4, requires_grad=True)
    flat = as_bytes(tensor)
    assert flat.data_ptr() == tensor.data_ptr()
    assert not flat.requires_grad


@pytest.mark.parametrize("size", [1, 5])
def test_lazily_conjugated_and_negated_tensors_are_resolved(size: int) -> None:
    values = torch.randn(size, dtype=torch.complex64)
    for tensor in (values.conj(), values.conj().imag, torch._neg_view(values.real.clone())):
        assert memory(as_bytes(tensor)).tobytes() == bits(tensor)


@given(recipes())
def test_view_at_an_aligned_offset_is_the_tensor_and_no_copy(recipe: Recipe) -> None:
    tensor = recipe.make(0)
    content = bits(tensor)
    buffer = torch.zeros(1024 + len(content) + 7, dtype=torch.uint8)
    view = view_at(buffer, 512, tensor.dtype, tuple(tensor.shape))
    memory(buffer)[512 : 512 + len(content)] = content
    assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
    assert bits(view) == bits(tensor)


def test_memory_of_a_buffer_is_the_buffer_itself() -> None:
    buffer = torch.zeros(4, dtype=torch.uint8)
    memory(buffer)[2] = 7
    assert buffer.tolist() == [0, 0, 7, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_travels_as_its_name(dtype: torch.dtype) -> None:
    assert "torch" not in dtype_name(dtype)
    assert dtype_of(dtype_name(dtype)) is dtype


@pytest.mark.parametrize("name", ["float3", "", "Tensor", "nn", "torch.float32", "__name__"])
def test_name_that_is_no_dtype_here_is_a_protocol_error_naming_it(name: str) -> None:
    with pytest.raises(ProtocolError, match=f"{name!r} does not exist in torch"):
        dtype_of(name)
