"""Over shared memory a server and an engine in this process answer like a fresh load, after a failed push too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_models import build
from tests.vllm.conftest import Server
from tests.vllm.engines import (
    Answers,
    answers,
    assert_same,
    fresh_answers,
    make_llm,
    release,
    server_answers,
    server_version,
)
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.engines.shm import FOLDER
from twinkle_callbacks.errors import SyncError
from twinkle_callbacks.rollouts import LocalRollout

SETTINGS = {"engine": "shm", "bucket_size_mb": 1, "timeout_s": 60}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Answers]]:
    """What engines answer that freshly load the policy of each seed."""
    folders = [tmp_path_factory.mktemp("fresh") for _ in range(3)]
    for seed, folder in enumerate(folders):
        build("qwen3", seed=seed).save_pretrained(folder)
    yield [fresh_answers(folder) for folder in folders]
    release()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(FOLDER.glob("twinkle-*"))
    yield
    assert set(FOLDER.glob("twinkle-*")) <= before


def test_server_answers_like_a_fresh_load_after_each_push(vllm_server: Server, expected: list[Answers]) -> None:
    policy = build("qwen3", seed=1)
    with WeightSynchronizer(policy, rollouts=vllm_server.url, **SETTINGS) as sync:
        assert_same(server_answers(vllm_server.url), expected[1])
        norm = policy.model.norm.weight
        policy.model.norm.weight = torch.nn.Parameter(torch.zeros(3))
        with pytest.raises(SyncError, match="norm"):
            sync.push(version=1)
        policy.model.norm.weight = norm
        assert_same(server_answers(vllm_server.url), expected[1])
        policy.load_state_dict(build("qwen3", seed=2).state_dict())
        report = sync.push(version=2)
        assert_same(server_answers(vllm_server.url), expected[2])
        assert server_version(vllm_server.url) == "2"
    assert report.replicas[0].digest == report.digest != ""


def test_engine_in_this_process_answers_like_a_fresh_load(
    tmp_path: Path, expected: list[Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    build("qwen3", seed=0).save_pretrained(tmp_path)
    llm = make_llm(tmp_path, synced=True)
    policy = build("qwen3", seed=1)
    with monkeypatch.context() as patch, WeightSynchronizer(policy, rollouts=LocalRollout(llm), **SETTINGS) as sync:
        # over NCCL this would wait for a broadcast that the sender begins only when `update_weights` has returned
        patch.setattr(torch.accelerator, "synchronize", lambda: pytest.fail("it waits for the whole device"))
        assert_same(answers(llm), expected[1])
        policy.load_state_dict(build("qwen3", seed=2).state_dict())
        sync.push(version=1)
        assert_same(answers(llm), expected[2])
    release()
