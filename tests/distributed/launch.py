"""Starts the ranks of a distributed test as real processes, and never leaves one behind."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = (
    5.0  # for the other ranks to end by themselves once one has failed, and to say where they hang at the deadline
)


def run_ranks(
    target: str | Path, world_size: int, timeout_s: float = 120.0, env: Mapping[str, str] | None = None
) -> list[str]:
    """Runs `target` in `world_size` processes on this host and returns what each wrote, by rank.

    Each process gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them,
    one thread, and the repository's root on its path. It belongs to a process group of its own, which is killed as a
    whole when it is still there at the deadline, or shortly after another rank failed.

    Args:
        target: path of a Python file, or the name of a module.
        world_size: number of processes.
        timeout_s: deadline for all of them together.
        env: environment variables beside or instead of the inherited ones.

    Raises:
        AssertionError: a rank failed or was still running at the deadline; holds every rank's log.
    """
    command = [sys.executable, str(target)] if str(target).endswith(".py") else [sys.executable, "-m", str(target)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        common = {**os.environ, **_common_env(world_size), **(env or {})}
        ranks = [_start(command, rank, common, logs[rank]) for rank in range(world_size)]
        try:
            problem = _wait(ranks, timeout_s)
        finally:
            _end(ranks)
        texts = [log.read_text(errors="replace") for log in logs]
    if problem:
        shown = "\n".join(
            f"===== rank {rank} of {world_size}, exit status {process.returncode} =====\n{text}"
            for rank, (process, text) in enumerate(zip(ranks, texts, strict=True))
        )
        raise AssertionError(f"{problem}: {' '.join(command)}\n{shown}")
    return texts


def _common_env(world_size: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",  # where a rank hangs is in its log, see _end
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def _start(command: list[str], rank: int, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_s: float) -> str:
    """Waits until all ranks have ended, one has failed, or time is up; returns what went wrong, or nothing."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def report(rank: int) -> None:
        ranks[rank].wait()
        ended.put(rank)

    for rank in range(len(ranks)):
        threading.Thread(target=report, args=(rank,), daemon=True).start()
    deadline, problem = time.monotonic() + timeout_s, ""
    for _ in ranks:
        try:
            rank = ended.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return problem or f"ranks still ran after {timeout_s:.0f} s"
        if ranks[rank].returncode != 0 and not problem:
            problem = f"rank {rank} failed with exit status {ranks[rank].returncode}"
            deadline = min(deadline, time.monotonic() + GRACE_S)
    return problem


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for ending, wait_s in ((signal.SIGABRT, GRACE_S), (signal.SIGKILL, None)):
        running = [process for process in ranks if process.poll() is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, ending)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
