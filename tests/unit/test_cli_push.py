"""`twinkle-callbacks push` with a fake synchronizer; the real one pushes a checkpoint in tests/vllm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from twinkle_callbacks.cli.main import main
from twinkle_callbacks.cli.progress import CountedSource
from twinkle_callbacks.cli.push import describe
from twinkle_callbacks.errors import RolloutUnreachableError
from twinkle_callbacks.report import ReplicaReport, SyncReport
from twinkle_callbacks.sources.checkpoint import CheckpointSource

REPORT = SyncReport(
    version=7,
    bytes=3_000_000,
    seconds=2.0,
    gather_s=0.25,
    transfer_s=1.5,
    commit_s=0.25,
    digest="cafe",
    replicas=[ReplicaReport("http://a:1", 7, "cafe", 2, 0.1), ReplicaReport("http://b:2", 7, "cafe", 2, 0.2)],
)


class Synchronizer:
    """Drains its source as a push does."""

    made: list[Synchronizer]
    error: Exception | None = None

    def __init__(self, source: CountedSource, **settings: Any) -> None:
        self.source = source
        self.settings = settings
        self.log: list[Any] = []
        self.made.append(self)

    def open(self, version: int) -> SyncReport:
        self.log.append(version)
        self.log.append([name for name, _ in self.source.stream()])
        if self.error:
            raise self.error
        return REPORT

    def close(self) -> None:
        self.log.append("closed")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Synchronizer]:
    fake = type("Fake", (Synchronizer,), {"made": []})
    monkeypatch.setattr("twinkle_callbacks.sync.WeightSynchronizer", fake)
    return fake


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"a.weight": torch.ones(4, 8), "b.bias": torch.zeros(16, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_folder_is_pushed_once_with_the_settings_given(
    fake: type[Synchronizer], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = ["--to", "http://a:1", "--to", "http://b:2"]
    assert main(["push", str(checkpoint), *servers, "--engine", "gloo", "--version", "7", "--bucket-size-mb", "8"]) == 0

    (synchronizer,) = fake.made
    assert synchronizer.settings == {
        "rollouts": ["http://a:1", "http://b:2"],
        "engine": "gloo",
        "bucket_size_mb": 8,
        "timeout_s": 300.0,
    }
    assert synchronizer.log == [7, ["a.weight", "b.bias"], "closed"]
    assert capsys.readouterr().out.startswith("version 7: ")


def test_a_failed_push_still_closes_and_is_one_line(
    fake: type[Synchronizer], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = RolloutUnreachableError("nobody answers at http://a:1")

    assert main(["push", str(checkpoint), "--to", "http://a:1"]) == 1
    assert fake.made[0].log[-1] == "closed"
    assert capsys.readouterr().err.endswith("twinkle-callbacks push: nobody answers at http://a:1\n")


def test_a_folder_without_weights_is_refused_before_any_server_is_asked(
    fake: type[Synchronizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(tmp_path), "--to", "http://a:1"]) == 1
    assert fake.made == []
    assert "safetensors" in capsys.readouterr().err


def test_the_counted_bytes_add_up_to_the_total(checkpoint: Path) -> None:
    taken: list[int] = []
    source = CountedSource(CheckpointSource(checkpoint), taken.append)

    for _ in source.stream():
        pass
    assert taken == [128, 32]
    assert source.total_bytes == 160
    assert source.specs() == CheckpointSource(checkpoint).specs()


def test_the_report_names_each_server_its_version_and_digest() -> None:
    assert describe(REPORT).splitlines() == [
        "version 7: 3.0 MB in 2.00 s (read 0.25 s, transfer 1.50 s at 0.00 GB/s, commit 0.25 s)",
        "  http://a:1: serves version 7, 2 tensors, digest cafe",
        "  http://b:2: serves version 7, 2 tensors, digest cafe",
    ]
