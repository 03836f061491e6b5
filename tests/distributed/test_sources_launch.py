"""The launcher of distributed tests itself: it returns every rank's log, fails fast, and ends what hangs."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks


def script(folder: Path, body: str) -> Path:
    path = folder / "rank.py"
    path.write_text(f"import os, sys, threading\nrank = int(os.environ['RANK'])\n{body}\n")
    return path


def test_logs_come_by_rank_with_the_environment_of_torchrun(tmp_path: Path) -> None:
    path = script(tmp_path, "print(rank, os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'], os.environ['CASE'])")
    assert run_ranks(path, 2, 60, {"CASE": "a"}) == ["0 0 2 a\n", "1 1 2 a\n"]


def test_name_without_py_is_run_as_a_module() -> None:
    (log,) = run_ranks("platform", 1, 60)
    assert log.startswith(platform.system())


def test_failed_rank_ends_the_others_long_before_the_deadline_and_shows_all_logs(tmp_path: Path) -> None:
    path = script(tmp_path, "print('log of', rank, flush=True)\nif rank: sys.exit('broken')\nthreading.Event().wait()")
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 failed with exit status 1(.|\n)*log of 0(.|\n)*log of 1\nbroken"):
        run_ranks(path, 2, 300)
    assert time.monotonic() - start < 60


def test_rank_that_hangs_is_ended_at_the_deadline_and_shows_where_it_hung(tmp_path: Path) -> None:
    path = script(tmp_path, "print('pid', os.getpid(), flush=True)\nthreading.Event().wait()")
    with pytest.raises(
        AssertionError, match=r"ranks still ran after 3 s(.|\n)*rank.py\", line 4 in <module>"
    ) as caught:
        run_ranks(path, 1, 3)
    pid = int(str(caught.value).split("pid ")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
