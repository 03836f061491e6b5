"""`engine="auto"` takes the fastest engine that reaches every worker, and says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from twinkle_callbacks.engines import choice
from twinkle_callbacks.engines.choice import choose
from twinkle_callbacks.engines.whereabouts import Whereabouts

BUCKET = 1 << 20
HERE, THERE = Whereabouts("shm here", host="here"), Whereabouts("shm there", host="there")


def gpu(uuid: str, host: str = "here", nccl: int = 22809) -> Whereabouts:
    return Whereabouts(f"shm {host}", uuid, host, nccl)


@pytest.mark.parametrize(
    ("trainer", "workers", "engine"),
    [
        (gpu("A"), [gpu("A")], "ipc"),
        (gpu("A"), [gpu("A"), gpu("A")], "ipc"),
        (gpu("A"), [gpu("B")], "nccl"),
        (gpu("A"), [gpu("B"), gpu("C", "there")], "nccl"),
        (gpu("A"), [gpu("A"), gpu("B")], "shm"),  # NCCL refuses two ranks on one GPU
        (gpu("A"), [gpu("B"), gpu("B")], "shm"),
        (gpu("A"), [gpu("B", nccl=22700)], "shm"),
        (gpu("A"), [gpu("B", "there", nccl=22700)], "gloo"),
        (gpu("A"), [gpu("B", nccl=22801)], "nccl"),
        (gpu("A"), [HERE], "shm"),
        (HERE, [gpu("A")], "shm"),
        (HERE, [HERE, HERE], "shm"),
        (HERE, [HERE, THERE], "gloo"),
        (HERE, [THERE], "gloo"),
        (Whereabouts(), [Whereabouts()], "gloo"),
    ],
)
def test_choice(trainer: Whereabouts, workers: list[Whereabouts], engine: str) -> None:
    name, why = choose(trainer, workers, BUCKET)
    assert name == engine
    assert why


def test_shared_memory_without_room_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=BUCKET))
    name, why = choose(HERE, [HERE], BUCKET)
    assert name == "gloo"
    assert "1 MiB free" in why


def test_processes_of_one_user_on_one_host_are_at_one_place() -> None:
    assert Whereabouts.of_this_process().shared_memory == Whereabouts.of_this_process().shared_memory != ""
