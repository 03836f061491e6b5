"""Words through named pipes: none is lost, a silent or dead master is an error, and no handle is left."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from twinkle_callbacks.engines.pipes import PipeIn, PipesOut
from twinkle_callbacks.errors import DeadlineError, EngineError

TIMEOUT_S = 20.0


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [tmp_path / "bucket.1", tmp_path / "bucket.2"]


def test_each_receiver_hears_every_word_also_those_told_before_it_listens(paths: list[Path]) -> None:
    out = PipesOut(paths)
    ends = [PipeIn(path, 0.05) for path in paths]
    for _ in range(3):
        out.tell()
    for end in ends:
        for _ in range(3):
            end.wait()
        with pytest.raises(DeadlineError, match=r"within 0\.05 s"):
            end.wait()


def test_a_word_wakes_a_receiver_that_waits(paths: list[Path]) -> None:
    out = PipesOut(paths)
    end = PipeIn(paths[0], TIMEOUT_S)
    waiting = threading.Thread(target=end.wait)
    waiting.start()
    out.tell()
    waiting.join(TIMEOUT_S / 2)
    assert not waiting.is_alive()


def test_a_master_that_is_gone_is_an_error_at_once_after_its_last_word(paths: list[Path]) -> None:
    out = PipesOut(paths)
    end = PipeIn(paths[0], TIMEOUT_S)
    out.tell()
    out.close()
    end.wait()
    began = time.monotonic()
    with pytest.raises(EngineError, match="the sender is gone"):
        end.wait()
    assert time.monotonic() - began < TIMEOUT_S / 2


def test_a_word_that_no_pipe_takes_is_an_error(paths: list[Path]) -> None:
    out = PipesOut(paths[:1])
    with pytest.raises(EngineError, match="no word reaches a receiver"):
        while True:  # until the pipe is full, since nobody reads
            out.tell()


def test_pipes_are_the_users_own(paths: list[Path]) -> None:
    out = PipesOut(paths)
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o600, 0o600]
    out.close()


def test_a_receiver_opens_nothing_but_a_pipe(tmp_path: Path) -> None:
    """A tenant's trainer names it, and may not have any file read."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"secret")
    os.mkfifo(tmp_path / "pipe")
    link.symlink_to(tmp_path / "pipe")
    for path in (file, link):
        with pytest.raises(OSError, match=path.name):
            PipeIn(path, TIMEOUT_S)


def test_handles_are_closed_also_when_an_end_is_dropped(paths: list[Path]) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    out, ends = PipesOut(paths), [PipeIn(path, TIMEOUT_S) for path in paths]
    assert count() == before + 4
    ends.pop().close()
    assert count() == before + 3
    del out, ends
    assert count() == before
