"""Where tensors lie, as `engine="ipc"` tells its receivers: in which allocation, or in none that they can see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from twinkle_callbacks.engines.backend import Place
from twinkle_callbacks.engines.ipc import IPCBackend

MIB = 1 << 20


@pytest.fixture
def backend() -> IPCBackend:
    torch.cuda.empty_cache()  # so that new tensors lie in new allocations
    backend = IPCBackend()
    backend.begin_stream()
    return backend


@pytest.fixture
def expandable_segments() -> Iterator[None]:
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    yield
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    torch.cuda.empty_cache()  # or later tensors would lie in what is kept of the segments


def zeros(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device="cuda")


def placed(backend: IPCBackend, tensor: torch.Tensor) -> Place:
    place = backend.place_of(tensor)
    assert place is not None
    return place


def test_tensors_of_one_allocation_are_told_apart_by_their_offsets(backend: IPCBackend) -> None:
    tensors = zeros(3 * 1024).split(1024)
    places = [placed(backend, tensor) for tensor in tensors]
    assert len({place.ticket for place in places}) == 1
    addresses = [tensor.data_ptr() for tensor in tensors]
    offsets = [place.offset for place in places]
    assert [each - offsets[0] for each in offsets] == [each - addresses[0] for each in addresses]
    assert placed(backend, zeros(64 * MIB)).ticket != places[0].ticket


def test_memory_that_was_given_back_and_taken_again_is_another_allocation(backend: IPCBackend) -> None:
    tensor = zeros(64 * MIB)
    assert backend.begin_stream(), "nothing was given back"
    before = placed(backend, tensor)
    del tensor
    torch.cuda.empty_cache()
    again = zeros(64 * MIB)
    assert not backend.begin_stream()
    assert placed(backend, again).ticket != before.ticket
    assert backend.begin_stream()


@pytest.mark.usefixtures("expandable_segments")
def test_what_receivers_cannot_see_has_no_place(backend: IPCBackend) -> None:
    assert backend.place_of(zeros(64 * MIB)) is None
    assert backend.place_of(torch.zeros(4)) is None
    assert backend.place_of(zeros(64).view(8, 8).t()) is None
