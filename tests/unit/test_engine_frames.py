"""Sender and receiver over a wire in memory: what comes out is bit for bit what went in, stream after stream."""

from __future__ import annotations

import itertools
import queue
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_loopback import LoopbackBackend, NamedTensors, messages
from tests.unit.engine_streams import DTYPES, LAYOUTS, Recipe, lay_out, make_stream, picture, random_tensor
from tests.unit.engine_streams import stream_series as series_of_streams
from twinkle_callbacks.buckets import frames
from twinkle_callbacks.buckets.layout import align
from twinkle_callbacks.engines import sender
from twinkle_callbacks.engines.receiver import FrameReceiver
from twinkle_callbacks.engines.sender import FrameSender

BUCKET = 1024


class Link:
    """A sender and a receiver that live through several streams."""

    def __init__(
        self,
        bucket: int = BUCKET,
        piece: int = LoopbackBackend.piece_bytes,
        verify: tuple[bool, bool] = (True, True),
        cached: int = sender._CACHED_BYTES,
    ) -> None:
        self.wire: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sender, "_CACHED_BYTES", cached)
            self.sender = FrameSender(LoopbackBackend(0, self.wire, piece), bucket, verify=verify[0])
        self.receiver = FrameReceiver(LoopbackBackend(1, self.wire, piece), bucket, verify=verify[1])

    def receive(self) -> Iterator[tuple[str, torch.Tensor]]:
        while (bucket := self.receiver.next_bucket()) is not None:
            yield from bucket

    def carry(self, stream: NamedTensors) -> list[Any]:
        self.stats = self.sender.send(iter(stream))
        arrived = picture(self.receive())
        assert self.wire.empty(), "bytes were sent that nobody read"
        return arrived


@settings(max_examples=250, deadline=None)
@given(
    series=series_of_streams(),
    bucket=st.sampled_from([512, 1024, 4096]),
    piece=st.sampled_from([512, 1000, 1 << 20]),
    verify=st.tuples(st.booleans(), st.booleans()),
    cached=st.sampled_from([64, 1000, 1 << 20]),
)
def test_every_stream_of_a_series_arrives_bit_for_bit(
    series: list[list[tuple[Recipe, int]]], bucket: int, piece: int, verify: tuple[bool, bool], cached: int
) -> None:
    link = Link(bucket, piece, verify, cached)
    for recipes in series:
        stream = make_stream(recipes)
        assert link.carry(stream) == picture(stream)
        assert link.stats.tensors == len(stream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives_whole_and_in_chunks(dtype: torch.dtype, layout: str) -> None:
    shapes = [(), (0,), (1,), (3,), (0, 5), (7, 11), (5, 0, 3), (3, 5, 7), (61, 67)]
    stream = [
        (f"t{i}", lay_out(random_tensor(dtype, shape, i), layout)) for i, shape in enumerate([*shapes, *shapes[::-1]])
    ]
    link = Link(piece=300)
    for _ in range(3):
        assert link.carry(stream) == picture(stream)


def test_dtypes_that_torch_can_view_as_bytes_but_not_copy_arrive_too() -> None:
    names = [f"{kind}{width}" for kind in ("int", "uint") for width in range(1, 8)]
    for dtype in [getattr(torch, name) for name in names if hasattr(torch, name)]:
        stream = [("a", random_tensor(dtype, (3, 5), 0)), ("b", random_tensor(dtype, (3000,), 1))]
        assert Link().carry(stream) == picture(stream)


@pytest.mark.parametrize("size", [3, 200, 5000], ids=["in_a_bucket", "a_whole_bucket", "in_chunks"])
def test_lazily_conjugated_and_negated_tensors_arrive_as_what_they_stand_for(size: int) -> None:
    values = torch.randn(size, dtype=torch.complex64)
    stream = [("conjugate", values.conj()), ("negative", torch._neg_view(values.real.clone()))]
    stream.append(("imaginary", values.conj().imag))
    assert Link().carry(stream) == picture(stream)


def test_trained_parameters_arrive_without_their_history() -> None:
    model = torch.nn.Linear(3, 5)
    model(torch.randn(2, 3)).sum().backward()
    link = Link()
    link.sender.send(model.named_parameters())
    arrived = list(link.receive())
    assert picture(arrived) == picture(model.state_dict().items())
    assert not any(tensor.requires_grad for _, tensor in arrived)


def test_one_storage_reused_for_every_tensor_is_read_before_the_next_is_requested() -> None:
    def one_storage(size: int) -> Iterator[tuple[str, torch.Tensor]]:
        room = torch.empty(size, dtype=torch.uint8)
        for value in range(7):
            yield f"t{value}", room.fill_(value)
        room.fill_(0xEE)

    link = Link()
    for size in (1, 300, 1024, 3000):
        link.sender.send(one_storage(size))
        expected = [(f"t{v}", torch.full((size,), v, dtype=torch.uint8)) for v in range(7)]
        assert picture(link.receive()) == picture(expected)


def test_tensors_of_one_bucket_stay_intact_while_the_next_bucket_comes_in() -> None:
    stream = [(f"t{i}", random_tensor(torch.float32, (100,), i)) for i in range(12)]
    link = Link()
    link.sender.send(stream)
    arrived: list[Any] = []
    current = link.receiver.next_bucket()
    while current is not None:
        following = link.receiver.next_bucket()
        arrived += picture(current)
        current = following
    assert arrived == picture(stream)


LIKE = [(f"t{i}", random_tensor(torch.float32, (100,), i)) for i in range(9)]


@pytest.mark.parametrize("cached", [64, 1 << 20])
@pytest.mark.parametrize("piece", [512, 1 << 20])
@pytest.mark.parametrize("kept", range(10))
@pytest.mark.parametrize(
    "then", [[], [("new", torch.ones(3))], [("new", torch.ones(700)), ("x", torch.ones(2))]], ids=len
)
def test_stream_that_goes_on_otherwise_than_announced_arrives_as_it_is(
    kept: int, then: NamedTensors, piece: int, cached: int
) -> None:
    link = Link(2048, piece, cached=cached)
    link.carry(LIKE)
    for stream in (LIKE[:kept] + then, LIKE[:kept] + then, LIKE, LIKE):
        assert link.carry(stream) == picture(stream)


def test_stats_count_tensors_and_the_bytes_of_all_buckets_with_their_gaps() -> None:
    link = Link()
    link.carry([("a", torch.zeros(3, dtype=torch.uint8)), ("b", torch.zeros(100)), ("c", torch.zeros(1000))])
    assert link.stats.tensors == 3
    assert 3 + 400 + 4000 <= link.stats.payload_bytes <= align(3) + align(400) + align(4000)
    assert len(link.stats.digests) == 3 * 8
    assert link.stats.source_s >= 0


def test_digest_tells_streams_apart_that_differ_in_value_name_or_order() -> None:
    first, second = random_tensor(torch.float32, (64,), 0), random_tensor(torch.float32, (64,), 1)
    streams = [
        [("a", first), ("b", second)],
        [("a", second), ("b", first)],
        [("b", first), ("a", second)],
        [("b", second), ("a", first)],
        [("a", first)],
        [("a", first.flip(0)), ("b", second)],
    ]
    link = Link()
    assert len({link.carry(stream) and link.stats.digest for stream in streams}) == len(streams)


def test_digest_does_not_depend_on_buckets_or_on_the_way_tensors_travel() -> None:
    stream = [(f"t{i}", random_tensor(torch.bfloat16, (size,), i)) for i, size in enumerate([3, 0, 700, 5000, 1])]
    digests = set()
    for bucket in (512, 1024, 65536):
        for piece, cached in itertools.product((512, 1 << 20), (64, 1 << 20)):
            link = Link(bucket, piece, cached=cached)
            link.carry(stream)
            digests.add((link.stats.digest, link.stats.digests, link.receiver.digest.hexdigest()))
    assert len(digests) == 1


def test_without_verify_no_digest_is_sent() -> None:
    link = Link(verify=(False, True))
    link.carry([("a", torch.ones(3))])
    assert (link.stats.digest, link.stats.digests) == ("", b"")


def test_layout_seen_before_travels_as_its_hash_alone() -> None:
    stream = [(f"layers.{i}.weight", torch.zeros(8)) for i in range(200)]
    link = Link(bucket=65536)
    sizes = []
    for _ in range(3):
        link.sender.send(stream)
        sizes.append(sum(len(message) for message in messages(link.wire)))
    assert sizes[1] == sizes[2] < sizes[0] - 200 * len("layers.0.weight")


def test_only_used_bytes_are_sent() -> None:
    link = Link(bucket=1 << 20)
    link.sender.send([("bias", torch.zeros(1))])
    assert sum(len(message) for message in messages(link.wire)) == 2 * frames.BLOCK_BYTES + 4


def test_memory_stays_flat_when_every_stream_has_new_names() -> None:
    """Streams that never repeat, such as those of the tensors that changed, must not pile up as layouts to remember."""
    link = Link(bucket=65536, verify=(False, False))

    def sync(number: int) -> None:
        link.carry([(f"sync.{number}.{'x' * 40}.{i}.weight", torch.zeros(8)) for i in range(50)])

    for number in range(40):
        sync(number)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(40, 140):
            sync(number)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 512 << 10, f"{grown >> 10} KiB more after 100 streams"
