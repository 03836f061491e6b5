"""The shm engine: files that nobody else can read and that are gone in time, and errors that say what to do.

Both sides are in this process, over real Gloo; the contract tests run the engine in processes of their own.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.engine_loopback import TIMEOUT_S, joined, transfer
from tests.unit.engine_streams import picture, random_tensor
from twinkle_callbacks import errors
from twinkle_callbacks.engines import GlooCheckpointEngine, SharedMemoryCheckpointEngine, shm
from twinkle_callbacks.engines.collective import CollectiveCheckpointEngine
from twinkle_callbacks.engines.shm import SharedMemoryBackend

STREAM = [(f"t{i}", random_tensor(torch.float32, (size,), i)) for i, size in enumerate([3, 700, 5000, 0, 1, 900])]
AT_ONCE_S = TIMEOUT_S / 2
SHORT_S = 2.0
together = partial(joined, engine_cls=SharedMemoryCheckpointEngine)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm, so that only the test's own files are in it."""
    monkeypatch.setattr(shm, "FOLDER", tmp_path)
    return tmp_path


def in_memory(folder: Path) -> int:
    """How many files of the folder this process has mapped, those without a name included."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count(f"{folder}/twinkle-")


def after_creation(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Calls `change` with the path of each bucket once the master has made it."""
    create = SharedMemoryBackend.create

    def changed(self: SharedMemoryBackend, nbytes: int) -> tuple[torch.Tensor, bytes]:
        bucket, ticket = create(self, nbytes)
        change(Path(ticket.decode()))
        return bucket, ticket

    monkeypatch.setattr(SharedMemoryBackend, "create", changed)


def test_files_are_the_users_own_and_their_names_are_gone_before_the_first_tensor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    names: list[list[Path]] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for item in STREAM:
            names.append(list(folder.iterdir()))
            yield item

    after_creation(monkeypatch, lambda path: modes.append(path.stat().st_mode & 0o777))
    with together() as (sender, receiver):
        sent, received = asyncio.run(transfer(sender, receiver, weights()))
        assert sent is None
        assert picture(received) == picture(STREAM)
        assert in_memory(folder) == 4  # two on either side
    assert modes == [0o600, 0o600]
    assert names == [[]] * len(STREAM)


def test_nothing_is_left_after_finalize(folder: Path) -> None:
    with together() as (sender, receiver):
        for _ in range(2):
            assert asyncio.run(transfer(sender, receiver, STREAM))[0] is None
    assert in_memory(folder) == 0
    assert not list(folder.iterdir())


def test_nothing_is_left_after_a_failure_in_the_middle(folder: Path) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield from STREAM[:4]
        raise ValueError("layer 3 is on fire")

    with together() as (sender, receiver):
        sent, received = asyncio.run(transfer(sender, receiver, failing()))
        assert isinstance(sent, ValueError)
        assert isinstance(received, errors.PeerError)
    del sent, received  # their tracebacks keep what they saw
    assert in_memory(folder) == 0
    assert not list(folder.iterdir())


def test_many_streams_of_every_kind_arrive_as_they_were_sent() -> None:
    """Buckets that repeat, shorten, lengthen and diverge, with tensors larger than one, read late."""
    choose = random.Random(0)
    sizes = [0, 1, 90, 500, 1024, 3000]
    with together() as (sender, receiver):
        shapes: list[tuple[int, ...]] = []
        for number in range(60):
            if number % 3 == 0:
                shapes = [(choose.choice(sizes),) for _ in range(choose.randrange(12))]
            elif number % 3 == 1:
                shapes = [*shapes[: choose.randrange(len(shapes) + 1)], (choose.choice(sizes),)]
            stream = [
                (f"t{i}", random_tensor(torch.float32, shape, 100 * number + i)) for i, shape in enumerate(shapes)
            ]
            sent, received = asyncio.run(transfer(sender, receiver, slow(stream, choose)))
            assert sent is None
            assert picture(received) == picture(stream)


def slow(stream: Iterable[tuple[str, torch.Tensor]], choose: random.Random) -> Iterator[tuple[str, torch.Tensor]]:
    for item in stream:
        time.sleep(choose.choice([0, 0, 0, 0.002]))
        yield item


# No room


@pytest.mark.parametrize("room", [0, 1])
def test_no_room_for_a_bucket_says_what_to_do_and_leaves_no_file(
    room: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_room_after(room, monkeypatch)
    with together(SHORT_S) as (sender, receiver):
        sent, _ = asyncio.run(transfer(sender, receiver, STREAM))
        assert isinstance(sent, errors.EngineError)
        for text in ("--shm-size", "bucket_size_mb", os.strerror(errno.ENOSPC)):
            assert text in str(sent)
        assert not list(folder.iterdir())


def test_no_room_for_a_bucket_is_told_to_the_receivers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    no_room_after(0, monkeypatch)
    with together(SHORT_S) as (sender, receiver):
        began = time.monotonic()
        _, received = asyncio.run(transfer(sender, receiver, STREAM))
        assert "--shm-size" in str(received)
        assert time.monotonic() - began < SHORT_S


def no_room_after(buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = buckets

    def fallocate(handle: int, offset: int, nbytes: int) -> None:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        os.ftruncate(handle, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)


# A receiver that cannot see the buckets


def remove(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    os.truncate(path, 512)


def cannot_be_seen(monkeypatch: pytest.MonkeyPatch, folder: Path, told: str) -> None:
    with together() as (sender, receiver):
        began = time.monotonic()
        sent, received = asyncio.run(transfer(sender, receiver, STREAM))
        assert time.monotonic() - began < AT_ONCE_S
        for error in (sent, received):
            assert isinstance(error, errors.EngineError)
            assert told in str(error)
            assert "one host" in str(error)
            assert "engine='gloo'" in str(error)
        assert "rank 1" in str(sent)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("change", "told"), [(remove, os.strerror(errno.ENOENT)), (shorten, "another size than this side's")]
)
def test_bucket_that_a_receiver_cannot_find_is_an_error_on_both_sides(
    change: Any, told: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_creation(monkeypatch, change)
    cannot_be_seen(monkeypatch, folder, told)


def test_bucket_that_a_receiver_may_not_open_is_an_error_on_both_sides(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, calls = shm._mapped, []

    def refused(path: Path, nbytes: int) -> torch.Tensor:
        calls.append(path)
        if len(calls) > 2:  # the master's own are the first two
            raise RuntimeError(f"unable to open file <{path}>: Permission denied")
        return mapped(path, nbytes)

    monkeypatch.setattr(shm, "_mapped", refused)
    cannot_be_seen(monkeypatch, folder, "Permission denied")


def test_receiver_maps_nothing_but_buckets(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tenant's trainer is a master too, and digests would tell it what is in a file that it named."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "twinkle-1"
    (folder / "twinkle-2").mkdir()
    for path in (elsewhere, folder / "database", folder / "twinkle-2" / ".." / "database"):
        path.write_bytes(bytes(4096))
        with pytest.raises(errors.EngineError, match="no bucket"):
            SharedMemoryBackend().map(str(path).encode(), 4096)
    (folder / "twinkle-3").symlink_to(elsewhere)
    with pytest.raises(errors.EngineError):
        SharedMemoryBackend().map(str(folder / "twinkle-3").encode(), 4096)


# One side is gone


def test_receiver_that_is_gone_before_it_mapped_is_noticed_at_once() -> None:
    with together(2 * SHORT_S) as (sender, receiver):
        receiver.finalize()
        began = time.monotonic()
        with pytest.raises(errors.EngineError):
            asyncio.run(sender.send_weights(STREAM))
        assert time.monotonic() - began < SHORT_S


def test_master_that_is_gone_before_it_shared_is_an_engine_error_at_once() -> None:
    async def receive() -> list[str]:
        return [name async for name, _ in receiver.receive_weights()]

    async def leave() -> None:
        task = asyncio.ensure_future(receive())
        await asyncio.sleep(0.2)
        sender.finalize()
        await task

    with together(2 * SHORT_S) as (sender, receiver):
        began = time.monotonic()
        with pytest.raises(errors.EngineError):
            asyncio.run(leave())
        assert time.monotonic() - began < SHORT_S


@pytest.mark.parametrize("engine_cls", [SharedMemoryCheckpointEngine, GlooCheckpointEngine])
def test_consumer_that_raises_is_an_error_on_the_sender_at_once(engine_cls: type[CollectiveCheckpointEngine]) -> None:
    """A vLLM worker that has no room for a tensor leaves its group only when the trainer tells it to."""

    async def consume() -> None:
        async for _ in receiver.receive_weights():
            raise MemoryError("no room for the staged copy")

    async def both() -> list[BaseException | None]:
        return await asyncio.gather(sender.send_weights(stream), consume(), return_exceptions=True)

    stream = [(f"t{i}", torch.zeros(3 << 20, dtype=torch.uint8)) for i in range(16)]
    with joined(2 * SHORT_S, 1 << 20, engine_cls=engine_cls) as (sender, receiver):
        began = time.monotonic()
        sent, received = asyncio.run(both())
        assert isinstance(received, MemoryError)
        assert isinstance(sent, errors.EngineError)
        assert "rank 1 gave up" in str(sent)
        assert time.monotonic() - began < SHORT_S


INTERRUPTED = """
import asyncio, pathlib, sys, threading, time
import torch
from tests.unit.engine_loopback import joined
from twinkle_callbacks.engines import GlooCheckpointEngine, SharedMemoryCheckpointEngine, shm
from twinkle_callbacks.engines.collective import CollectiveCheckpointEngine
shm.FOLDER = pathlib.Path(sys.argv[1])
with joined(engine_cls=SharedMemoryCheckpointEngine) as (sender, receiver):
    send = lambda: asyncio.run(sender.send_weights([("t", torch.zeros(3))]))
    threading.Thread(target=send, daemon=True).start()
    while not list(shm.FOLDER.iterdir()):
        time.sleep(0.01)
print("shared")
"""


def test_process_that_ends_while_receivers_have_not_mapped_leaves_no_file(folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "shared" in ended.stdout, ended.stderr
    assert not list(folder.iterdir())
