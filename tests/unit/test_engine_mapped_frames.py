"""Tensors that receivers see where they are: which frames tell of them, and what comes out at the other end."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import xxhash

from tests.unit.engine_loopback import LoopbackBackend
from twinkle_callbacks.buckets.digest import unpack
from twinkle_callbacks.buckets.packing import as_bytes, memory
from twinkle_callbacks.engines.backend import Place
from twinkle_callbacks.engines.receiver import FrameReceiver
from twinkle_callbacks.engines.sender import _MAPPED_TOGETHER, FrameSender

BUCKET_BYTES = 1 << 12
NamedTensors = list[tuple[str, torch.Tensor]]
Arrived = tuple[NamedTensors, list[int]]


class SeeingBackend(LoopbackBackend):
    """A receiver sees the sender's lasting tensors; `looked` counts how often it looks for one."""

    memory: dict[int, torch.Tensor]
    looked: int
    same_places = True

    def begin_stream(self) -> bool:
        return self.same_places

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        self.memory[tensor.data_ptr()] = tensor
        return Place(b"ticket", tensor.data_ptr())

    def view(self, place: Place, nbytes: int) -> torch.Tensor:
        self.looked += 1
        flat = self.memory[place.offset].detach().view(-1).view(torch.uint8)
        assert flat.numel() == nbytes
        return flat


class Link:
    """A sender and a receiver of streams, one after another, on one thread."""

    def __init__(self) -> None:
        wire: queue.SimpleQueue[Any] = queue.SimpleQueue()
        memory: dict[int, torch.Tensor] = {}
        ends = [SeeingBackend(rank, wire) for rank in (0, 1)]
        for end in ends:
            end.memory, end.looked = memory, 0
        self.near, self.far = ends
        self.sender = FrameSender(ends[0], BUCKET_BYTES, verify=True)
        self.receiver = FrameReceiver(ends[1], BUCKET_BYTES, verify=True)

    def bring(self, weights: Iterable[tuple[str, torch.Tensor]], *, repeats: bool = False) -> Arrived:
        """What arrives, and the number of tensors in each frame; parameters last, all else is packed."""
        if repeats:
            self.sender.begin(repeats=True)
        self.sender.send(weights, lambda tensor: isinstance(tensor, torch.nn.Parameter))
        arrived, frames = [], []
        while (tensors := self.receiver.next_bucket()) is not None:
            arrived += [(name, tensor if self.receiver.stays(tensor) else tensor.clone()) for name, tensor in tensors]
            frames.append(len(tensors))
        return arrived, frames


@pytest.fixture
def link() -> Link:
    return Link()


def lasting(count: int, seed: int = 0) -> NamedTensors:
    generator = torch.Generator().manual_seed(seed)
    return [
        (f"lasting {i}", torch.nn.Parameter(torch.randn(2 + i % 3, 4, generator=generator), requires_grad=False))
        for i in range(count)
    ]


def assert_arrived(arrived: NamedTensors, weights: NamedTensors) -> None:
    assert [name for name, _ in arrived] == [name for name, _ in weights]
    for (name, there), (_, here) in zip(arrived, weights, strict=True):
        assert torch.equal(there, here), name
        assert (there.data_ptr() == here.data_ptr()) == isinstance(here, torch.nn.Parameter), name


@pytest.mark.parametrize("count", [1, _MAPPED_TOGETHER, _MAPPED_TOGETHER + 1, 3 * _MAPPED_TOGETHER])
def test_lasting_tensors_come_in_frames_of_a_certain_size(count: int, link: Link) -> None:
    weights = lasting(count)
    arrived, frames = link.bring(weights)
    assert_arrived(arrived, weights)
    full, left = divmod(count, _MAPPED_TOGETHER)
    assert frames == [_MAPPED_TOGETHER] * full + [left] * bool(left)


def test_tensors_that_were_told_of_are_not_looked_for_again(link: Link) -> None:
    weights = lasting(_MAPPED_TOGETHER + 5)
    for step in range(3):
        for _, tensor in weights:
            tensor.add_(step)
        assert_arrived(link.bring(weights)[0], weights)
        assert link.far.looked == len(weights)


@pytest.mark.parametrize("changed", [0, _MAPPED_TOGETHER - 1, _MAPPED_TOGETHER, 2 * _MAPPED_TOGETHER + 4])
def test_frames_from_the_first_tensor_that_moved_on_are_told_anew(changed: int, link: Link) -> None:
    weights = lasting(2 * _MAPPED_TOGETHER + 5)
    link.bring(weights)
    weights[changed] = weights[changed][0], torch.nn.Parameter(weights[changed][1].clone(), requires_grad=False)
    for _ in range(2):
        assert_arrived(link.bring(weights)[0], weights)


@pytest.mark.parametrize("count", [0, 1, _MAPPED_TOGETHER, _MAPPED_TOGETHER + 4, 2 * _MAPPED_TOGETHER + 40])
def test_streams_may_become_shorter_and_longer(count: int, link: Link) -> None:
    for weights in (lasting(2 * _MAPPED_TOGETHER), lasting(count, seed=1), lasting(2 * _MAPPED_TOGETHER)):
        assert_arrived(link.bring(weights)[0], weights)


def test_packed_tensors_between_lasting_ones_keep_their_turn(link: Link) -> None:
    for step in range(3):
        weights: NamedTensors = []
        for name, tensor in lasting(_MAPPED_TOGETHER + 9):
            weights.append((name, tensor))
            if len(weights) % 7 == step:
                weights += [(f"packed {len(weights)} {i}", torch.full((40, 5), step + i)) for i in range(3)]
        assert_arrived(link.bring(weights)[0], weights)


def never_drawn() -> Iterator[tuple[str, torch.Tensor]]:
    pytest.fail("was drawn")
    yield


def test_a_stream_that_repeats_is_not_drawn_and_brings_what_the_tensors_hold_now(link: Link) -> None:
    weights = lasting(2 * _MAPPED_TOGETHER + 5)
    _, frames = link.bring(weights)
    for step in range(3):
        for _, tensor in weights:
            tensor.add_(step)
        unused = never_drawn()
        arrived, again = link.bring(unused, repeats=True)
        assert_arrived(arrived, weights)
        assert again == frames
        assert next(unused, None) is None  # or it would be drawn when the engine takes it to its end
        assert link.far.looked == len(weights)


def test_the_digests_of_a_stream_that_repeats_are_of_what_the_tensors_hold_now(link: Link) -> None:
    weights = lasting(_MAPPED_TOGETHER + 5)
    link.bring(weights)
    weights[7][1].add_(1)
    link.bring(never_drawn(), repeats=True)  # compares them
    end = link.receiver.end
    assert end is not None
    assert unpack(end.digests) == [xxhash.xxh3_64_intdigest(memory(as_bytes(tensor))) for _, tensor in weights]


def test_what_was_said_of_a_stream_counts_for_none_after_it(link: Link) -> None:
    weights = lasting(_MAPPED_TOGETHER + 5)
    link.bring(weights)
    link.bring(never_drawn(), repeats=True)
    drawn_anew(link, lasting(_MAPPED_TOGETHER + 5, seed=1), repeats=False)


def test_parameters_are_kept_while_streams_of_them_repeat(link: Link) -> None:
    weights = lasting(3)
    there = [weakref.ref(tensor) for _, tensor in weights]
    link.bring(weights)
    del weights
    link.near.memory.clear()
    for _ in range(2):
        link.bring(never_drawn(), repeats=True)
        assert all(reference() is not None for reference in there)
    link.bring([])
    assert not any(reference() for reference in there)


def drawn_anew(link: Link, weights: NamedTensors, *, repeats: bool = True) -> None:
    drawn = []
    arrived, _ = link.bring((drawn.append(name) or (name, tensor) for name, tensor in weights), repeats=repeats)
    assert_arrived(arrived, weights)
    assert drawn == [name for name, _ in weights]


def test_the_first_stream_is_drawn_whatever_is_said(link: Link) -> None:
    drawn_anew(link, lasting(5))


def test_a_stream_after_one_with_packed_tensors_is_drawn(link: Link) -> None:
    for _ in range(2):
        drawn_anew(link, [*lasting(5), ("packed", torch.zeros(3))])


def test_a_stream_is_drawn_where_memory_was_freed_since_the_one_before(link: Link) -> None:
    weights = lasting(5)
    link.bring(weights)
    link.near.same_places = False
    drawn_anew(link, weights)


def test_an_empty_stream_does_not_stand_for_the_next(link: Link) -> None:
    link.bring([])
    drawn_anew(link, lasting(5))
