"""`engine="auto"` takes the fastest engine that reaches every worker, and says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from twinkle_callbacks.engines import choice
from twinkle_callbacks.engines.choice import Place, choose

BUCKET = 1 << 20
HERE, THERE = Place("shm here", host="here"), Place("shm there", host="there")


def gpu(uuid: str, host: str = "here", nccl: int = 22809) -> Place:
    return Place(f"shm {host}", uuid, host, nccl)


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
        (Place(), [Place()], "gloo"),
    ],
)
def test_choice(trainer: Place, workers: list[Place], engine: str) -> None:
    name, why = choose(trainer, workers, BUCKET)
    assert name == engine
    assert why


def test_shared_memory_without_room_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=BUCKET))
    name, why = choose(HERE, [HERE], BUCKET)
    assert name == "gloo"
    assert "1 MiB free" in why


def test_processes_of_one_user_on_one_host_are_at_one_place() -> None:
    assert Place.of_this_process().shared_memory == Place.of_this_process().shared_memory != ""
