"""What goes wrong on the wire or in the source is an error on the side that sees it, and never wrong weights."""

from __future__ import annotations

import queue
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_loopback import LoopbackBackend, messages
from tests.unit.engine_streams import picture, random_tensor
from twinkle_callbacks import errors
from twinkle_callbacks.buckets.frames import (
    BLOCK_BYTES,
    CONTROL_BYTES,
    Control,
    End,
    Entry,
    Failure,
    Kind,
    blocks,
    encode,
    header_in,
    layout_hash,
)
from twinkle_callbacks.engines.receiver import FrameReceiver
from twinkle_callbacks.engines.sender import FrameSender

BUCKET = 1024
CONTROL, KIND, HEADER_BYTES = struct.Struct("<4sBBBxIQQ16sI16x"), 2, 5
STREAM = [
    (f"layers.{i}.weight", random_tensor(torch.float32, shape, i))
    for i, shape in enumerate([(3,), (10, 10), (700,), (2, 2), (100,), (200,), ()])
]
Frame = list[bytes]
"""Control, header if any, payload if any."""


def recorded(streams: int = 1) -> list[Frame]:
    """The frames of one or several like streams."""
    wire: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sender = FrameSender(LoopbackBackend(0, wire), BUCKET, verify=True)
    for _ in range(streams):
        sender.send(STREAM)
    frames: list[Frame] = []
    pending = messages(wire)
    while pending:
        block = pending.pop(0)
        control = Control.unpack(block, len(frames))
        header = header_in(block, control)
        parts = [block[:CONTROL_BYTES], pending.pop(0) if header is None else header]
        if control.payload_bytes:
            parts.append(pending.pop(0))
        frames.append([part for part in parts if part])
    return frames


def on_the_wire(frames: list[Frame]) -> Iterator[bytes]:
    """The messages of frames. A header is as long as its control says; after a promise, only a control is expected."""
    promised = False
    for control, *rest in frames:
        fields = CONTROL.unpack(control)
        header_bytes = fields[HEADER_BYTES]
        header = rest.pop(0) if header_bytes and rest else b""
        if promised:
            yield control
        elif CONTROL_BYTES + header_bytes > BLOCK_BYTES:
            yield from (control.ljust(BLOCK_BYTES, b"\0"), header)
        else:
            yield (control + header).ljust(BLOCK_BYTES, b"\0")[:BLOCK_BYTES]
        yield from rest
        promised = fields[KIND] == Kind.PROMISE


def played(frames: list[Frame], *, verify: bool = True, streams: int = 1) -> list[Any]:
    """What a receiver makes of these frames."""
    wire: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for message in [*on_the_wire(frames), None]:
        wire.put(message)
    receiver = FrameReceiver(LoopbackBackend(1, wire), BUCKET, verify=verify)
    arrived = []
    for _ in range(streams):
        while (bucket := receiver.next_bucket()) is not None:
            arrived += picture(bucket)
    return arrived


def bucket_frame(entries: list[Entry], payload: bytes, sequence: int = 0, header: bytes | None = None) -> Frame:
    header = encode(entries) if header is None else header
    control = Control(Kind.BUCKET, sequence, len(header), len(payload), layout_hash(header))
    return [control.pack(), header, payload] if payload else [control.pack(), header]


def test_recorded_frames_play_back() -> None:
    assert played(recorded()) == picture(STREAM)
    assert played(recorded(3), streams=3) == picture(STREAM * 3)


# Damage on the wire


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_flipped_bit_goes_unnoticed_into_the_weights(data: st.DataObject) -> None:
    frames = [list(frame) for frame in recorded(2)]
    frame = data.draw(st.sampled_from(frames))
    part = data.draw(st.integers(0, len(frame) - 1))
    bit = data.draw(st.integers(0, 8 * len(frame[part]) - 1))
    damaged = bytearray(frame[part])
    damaged[bit // 8] ^= 1 << bit % 8
    frame[part] = bytes(damaged)
    try:
        arrived = played(frames, streams=2)
    except (errors.EngineError, errors.DigestMismatchError):
        return
    assert arrived == picture(STREAM * 2)  # a bit that stands for nothing


def test_damaged_payload_names_the_tensors_and_no_others() -> None:
    frames = recorded()
    payload = bytearray(frames[0][2])
    payload[0] ^= 1
    frames[0][2] = bytes(payload)
    with pytest.raises(errors.DigestMismatchError, match=r"1 tensors? arrived damaged: layers\.0\.weight$"):
        played(frames)


def test_damaged_payload_goes_unnoticed_only_without_verify() -> None:
    frames = recorded()
    frames[0][2] = bytes(len(frames[0][2]))
    assert played(frames, verify=False) != picture(STREAM)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("lost", range(4))
def test_lost_frame_is_noticed_at_the_next_one(lost: int, verify: bool) -> None:
    frames = recorded()
    assert len(frames) > lost + 1
    with pytest.raises(errors.ProtocolError, match=f"received frame {lost + 1} where frame {lost} comes next"):
        played(frames[:lost] + frames[lost + 1 :], verify=verify)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(len(recorded()))))
def test_frames_in_another_order_are_refused(order: list[int]) -> None:
    frames = recorded()
    if list(order) != list(range(len(frames))):
        with pytest.raises(errors.ProtocolError, match="comes next"):
            played([frames[i] for i in order], verify=False)


def test_frame_that_comes_twice_is_refused() -> None:
    frames = recorded()
    with pytest.raises(errors.ProtocolError, match="received frame 0 where frame 1"):
        played([frames[0], *frames])


def test_connection_that_ends_early_is_an_error_and_no_short_stream() -> None:
    frames = recorded()
    for length in range(len(frames)):
        with pytest.raises(errors.EngineError):
            played(frames[:length])


# Frames that no sender of ours makes


@pytest.mark.parametrize(
    "frame",
    [
        bucket_frame([Entry("a", "float32", (4,), 0, 0, 16)], bytes(8)),
        bucket_frame([Entry("a", "float32", (4,), 512, 0, 16)], bytes(520)),
        bucket_frame([Entry("a", "float32", (2,), 0, 0, 16)], bytes(16)),
        bucket_frame([Entry("a", "float32", (600,), 0, 2000, 1000)], bytes(1000)),
        bucket_frame([Entry("a", "float32", (4,), -16, 0, 16)], bytes(16)),
        bucket_frame([Entry("a", "float32", (4,), 0, 0, -16)], bytes(16)),
        bucket_frame([Entry("a", "float32", (-2, -2), 0, 0, 16)], bytes(16)),
        bucket_frame([Entry("a", "float3", (4,), 0, 0, 16)], bytes(16)),
        bucket_frame([Entry("a", "float32", (4,), 3, 0, 16)], bytes(19)),
        bucket_frame([Entry("a", "float32", (600,), 0, 0, 1000)], bytes(1024)),
        bucket_frame([Entry("a", "uint8", (2048,), 0, 0, 2048)], bytes(2048)),
        bucket_frame([Entry("a", "float32", (600,), 0, 1000, 1000)], bytes(1000)),
        bucket_frame([], b"", header=b"\x93\x01\x02\x03"),
        bucket_frame([], b"", header=b"nonsense"),
        [Control(Kind.BUCKET, 0, 0, 512, b"x" * 16).pack(), bytes(512)],
        [Control(Kind.BUCKET, 0, 3, 0, b"x" * 16).pack(), encode([]) + b"\x80\x80"],
        [Control(Kind.END, 0, 4, 0).pack(), b"\x00\x01\x02\x03"],
        [Control(Kind.ERROR, 0, 4, 0).pack(), b"\x00\x01\x02\x03"],
        [Control(Kind.END, 0, 0, 0).pack()],
        [Control(Kind.ERROR, 0, 0, 0).pack()],
        [Control(Kind.BUCKET, 0, 1 << 60, 0).pack()],
        [Control(Kind.CLOSE, 0, 0, 0, entries=1).pack()],
        [Control(Kind.BUCKET, 0, 0, 0, side=2).pack()],
        [Control(Kind.BUCKET, 0, 1, 1 << 60, layout_hash(encode([]))).pack(), encode([])],
    ],
    ids=[
        "entry beyond the payload",
        "offset beyond the payload",
        "more bytes than the tensor has",
        "chunk beyond the tensor",
        "negative offset",
        "negative size",
        "negative shape",
        "unknown dtype",
        "unaligned offset",
        "chunk of another size than its payload",
        "larger than a bucket",
        "chunk without the one before it",
        "header of another type",
        "header that is no msgpack",
        "unknown layout",
        "header that is not the hashed one",
        "malformed end",
        "malformed error",
        "end without a header",
        "error without a header",
        "absurd header size",
        "close of nothing",
        "unknown buffer",
        "absurd payload size",
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_impossible_frame_is_a_protocol_error(frame: Frame, verify: bool) -> None:
    with pytest.raises(errors.ProtocolError):
        played([frame], verify=verify)


def promised(closing: Control) -> list[Any]:
    entries = [Entry(n, "float32", (4,), o, 0, 16) for n, o in (("a", 0), ("b", 512))]
    header = encode(entries)
    control = Control(Kind.PROMISE, 0, len(header), 528, layout_hash(header))
    return played([[control.pack(), header, bytes(528)], [closing.pack()]], verify=False)


@pytest.mark.parametrize("entries", [3, 1 << 31])
def test_close_of_more_tensors_than_were_promised_is_a_protocol_error(entries: int) -> None:
    with pytest.raises(errors.ProtocolError, match=f"2 entries is closed by a CLOSE frame of {entries}"):
        promised(Control(Kind.CLOSE, 1, 0, 0, entries=entries))


@pytest.mark.parametrize("kind", [Kind.BUCKET, Kind.PROMISE, Kind.END])
def test_promised_bucket_that_is_not_closed_is_a_protocol_error(kind: Kind) -> None:
    with pytest.raises(errors.ProtocolError, match=f"2 entries is closed by a {kind.name} frame"):
        promised(Control(kind, 1, 0, 0))


def test_gap_between_the_chunks_of_a_tensor_is_a_protocol_error() -> None:
    first = bucket_frame([Entry("a", "uint8", (2000,), 0, 0, 500)], bytes(500), 0)
    third = bucket_frame([Entry("a", "uint8", (2000,), 0, 1000, 1000)], bytes(1000), 1)
    with pytest.raises(errors.ProtocolError, match="'a'"):
        played([first, third], verify=False)


def test_tensor_left_half_sent_at_the_end_is_a_protocol_error() -> None:
    first = bucket_frame([Entry("a", "uint8", (2000,), 0, 0, 500)], bytes(500), 0)
    header = encode(End(0, 500, b"", ""))
    with pytest.raises(errors.ProtocolError, match="ended"):
        played([first, [Control(Kind.END, 1, len(header), 0).pack(), header]], verify=False)


@pytest.mark.parametrize("end", [End(2, 4, b"", ""), End(1, 8, b"", ""), End(0, 0, b"", "")])
def test_end_that_counts_otherwise_is_a_protocol_error_with_both_counts(end: End) -> None:
    frame = bucket_frame([Entry("a", "float32", (), 0, 0, 4)], bytes(4), 0)
    header = encode(end)
    with pytest.raises(errors.ProtocolError, match=f"1 tensors and 4 bytes.*{end.tensors} and {end.payload_bytes}"):
        played([frame, [Control(Kind.END, 1, len(header), 0).pack(), header]], verify=False)


# The sender's own errors


def failing(error: BaseException, after: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from STREAM[:after]
    raise error


def told_to_receiver(weights: Any, *, before: int = 0) -> tuple[BaseException, BaseException]:
    """The errors that the sender raises, and the receiver, for a source that fails after some streams that did not."""
    wire: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sender = FrameSender(LoopbackBackend(0, wire), BUCKET, verify=True)
    for _ in range(before):
        sender.send(STREAM)
    with pytest.raises(BaseException) as at_sender:
        sender.send(weights)
    wire.put(None)
    receiver = FrameReceiver(LoopbackBackend(1, wire), BUCKET, verify=True)
    for _ in range(before):
        while receiver.next_bucket() is not None:
            pass
    with pytest.raises(BaseException) as at_receiver:
        while receiver.next_bucket() is not None:
            pass
    return at_sender.value, at_receiver.value


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 7])
def test_error_of_the_source_is_raised_as_it_is_and_told_to_receivers(after: int, before: int) -> None:
    error = ValueError("layer 3 is on fire")
    sent, received = told_to_receiver(failing(error, after), before=before)
    assert sent is error
    assert type(received) is errors.PeerError
    assert "ValueError" in str(received)
    assert "layer 3 is on fire" in str(received)


@pytest.mark.parametrize(
    "error",
    [
        errors.SourceError("shard missing"),
        errors.DeadlineError("the gather took longer than 300 s"),
        errors.PeerError("trainer rank 1: out of memory"),
        errors.EngineError("a gather failed"),
        errors.WeightMismatchError("shapes differ between ranks"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_this_package_in_the_source_keeps_its_type_at_receivers(error: errors.TwinkleError) -> None:
    sent, received = told_to_receiver(failing(error, 2))
    assert sent is error
    assert type(received) is type(error)
    assert str(error) in str(received)


def test_error_without_text_still_names_its_type() -> None:
    _, received = told_to_receiver(failing(KeyError(), 1))
    assert "KeyError" in str(received)


def test_error_whose_text_is_not_unicode_reaches_both_sides() -> None:
    name = b"model-\xff.safetensors".decode(errors="surrogateescape")  # as os.listdir gives such a name
    error = RuntimeError(f"no such file: {name}")
    sent, received = told_to_receiver(failing(error, 1))
    assert sent is error
    assert "no such file" in str(received)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (("weight", 3.5), "'weight'.*expected a tensor, got float"),
        (("weight", None), "'weight'.*expected a tensor, got NoneType"),
        ((7, torch.zeros(1)), "7"),
        ("weight", "weight|unpack"),
        (torch.zeros(3), "unpack"),
        (("weight", torch.zeros(3).to_sparse()), "weight|[Ss]parse"),
        (("weight", torch.zeros(3, device="meta")), "weight|meta"),
        (("weight", torch.zeros(3000, device="meta")), "weight|meta"),
    ],
    ids=["float", "None", "name is no text", "no pair", "bare tensor", "sparse", "meta", "large meta"],
)
def test_what_is_no_named_dense_tensor_is_an_error_on_both_sides(item: Any, text: str) -> None:
    sent, received = told_to_receiver([*STREAM[:1], item, *STREAM[1:]])
    assert not isinstance(sent, AssertionError)
    assert type(received) in (errors.PeerError, errors.SourceError)
    pytest.raises(type(sent), throw, sent).match(text)
    pytest.raises(type(received), throw, received).match(text)


def throw(error: BaseException) -> None:
    raise error


def test_iterable_that_is_none_is_refused_at_once() -> None:
    sender = FrameSender(LoopbackBackend(0), BUCKET, verify=True)
    with pytest.raises(TypeError, match="not iterable"):
        sender.send(None)


class Unplugged(LoopbackBackend):
    """Breaks at the n-th broadcast."""

    def __init__(self, left: int, error: Callable[[str], Exception]) -> None:
        super().__init__()
        self.left, self.error = left, error

    def broadcast(self, buffer: torch.Tensor) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error("the cable was pulled")
        return super().broadcast(buffer)


@pytest.mark.parametrize("error", [errors.EngineError, errors.DeadlineError])
@pytest.mark.parametrize("left", range(12))
def test_broken_wire_is_raised_as_it_is_and_nothing_more_is_sent(left: int, error: type[Exception]) -> None:
    backend = Unplugged(left, error)
    with pytest.raises(error, match="the cable was pulled"):
        FrameSender(backend, BUCKET, verify=True).send(STREAM)
    assert backend.left == -1


def test_a_header_travels_in_the_block_if_it_fits() -> None:
    control = Control(Kind.END, 0, 0, 0)
    for header_bytes, messages_sent in ((0, 1), (100, 1), (BLOCK_BYTES - CONTROL_BYTES, 1), (BLOCK_BYTES, 2)):
        sent = blocks(control, b"h" * header_bytes)
        assert [len(sent[0]), len(sent)] == [BLOCK_BYTES, messages_sent]


def test_failure_header_is_what_an_error_frame_holds() -> None:
    header = encode(Failure("ValueError", "x"))
    with pytest.raises(errors.PeerError, match="ValueError: .*x"):
        played([[Control(Kind.ERROR, 0, len(header), 0).pack(), header]])


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "os.system", "", "TwinkleError"])
def test_only_types_of_this_package_are_ever_built_from_an_error_frame(name: str) -> None:
    header = encode(Failure(name, "x"))
    with pytest.raises(errors.TwinkleError):
        played([[Control(Kind.ERROR, 0, len(header), 0).pack(), header]])
