"""A policy trained under each kind of sharding, with and without LoRA, is served as a fresh load would serve it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.vllm import sharded_policies
from tests.vllm.conftest import Server
from tests.vllm.engines import assert_same, fresh_answers, release, server_answers, server_version


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "zero3"])
def test_server_answers_like_a_fresh_load_of_what_was_trained(kind: str, vllm_server: Server, tmp_path: Path) -> None:
    env = {"KIND": kind, "URL": vllm_server.url, "FOLDER": str(tmp_path)}
    run_ranks(Path(sharded_policies.__file__), 2, timeout_s=180, env=env)
    assert server_version(vllm_server.url) == "2"
    served = {case: json.loads((tmp_path / case / "answers.json").read_text()) for case in sharded_policies.CASES}
    assert served["full"] != served["lora"]
    assert_same(served["lora"], server_answers(vllm_server.url))
    for case, got in served.items():
        assert_same(got, fresh_answers(tmp_path / case))
    release()
