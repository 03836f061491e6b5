"""A stock vLLM server over HTTP: it answers with the trainer's newest weights, during and after whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.tiny_models import build, specs_of
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
from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.errors import (
    AuthenticationError,
    ConfigError,
    RolloutError,
    RolloutUnreachableError,
    SyncError,
    WeightMismatchError,
)
from twinkle_callbacks.rollouts import LocalRollout
from twinkle_callbacks.sources import WeightSource

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Answers]]:
    """What engines answer that freshly load the policy of each seed."""
    folder = tmp_path_factory.mktemp("fresh")
    fresh = []
    for seed in SEEDS:
        build("qwen3", seed=seed).save_pretrained(folder / str(seed))
        fresh.append(fresh_answers(folder / str(seed)))
    yield fresh
    release()


def test_server_answers_like_a_fresh_load_after_each_push(
    vllm_server: Server, expected: list[Answers], caplog: pytest.LogCaptureFixture
) -> None:
    policy = build("qwen3", seed=1)
    with WeightSynchronizer(policy, rollouts=vllm_server.url, timeout_s=60) as sync:
        assert_same(server_answers(vllm_server.url), expected[1])
        assert server_version(vllm_server.url) == "0"
        policy.load_state_dict(build("qwen3", seed=2).state_dict())
        report = sync.push(version=1)
        assert_same(server_answers(vllm_server.url), expected[2])
        assert server_version(vllm_server.url) == "1"
    assert report.replicas[0].rollout == vllm_server.url
    assert report.replicas[0].digest == report.digest != ""
    assert not httpx.get(f"{vllm_server.url}/is_paused").json()["is_paused"]
    assert "anybody" not in caplog.text, "it is guarded"


class _Interrupted(WeightSource):
    """Calls `meanwhile` when half of the tensors are on their way."""

    def __init__(self, model: torch.nn.Module, meanwhile) -> None:  # type: ignore[no-untyped-def]
        self._tensors = [(name, tensor.detach()) for name, tensor in model.state_dict().items()]
        self._meanwhile = meanwhile

    def specs(self) -> list[TensorSpec]:
        return specs_of(self._tensors)

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(self._tensors):
            if number == len(self._tensors) // 2:
                self._meanwhile()
            yield item


def test_generation_goes_on_with_the_old_weights_while_the_new_ones_arrive(
    vllm_server: Server, expected: list[Answers]
) -> None:
    with WeightSynchronizer(build("qwen3", seed=1), rollouts=vllm_server.url, timeout_s=60):
        pass
    during: list[Answers] = []
    source = _Interrupted(build("qwen3", seed=2), lambda: during.append(server_answers(vllm_server.url)))
    with WeightSynchronizer(source, rollouts=vllm_server.url, timeout_s=60):
        assert_same(during[0], expected[1])
        assert_same(server_answers(vllm_server.url), expected[2])


def test_request_in_flight_survives_a_push(vllm_server: Server) -> None:
    """With pause_mode=keep a long generation is frozen for the commit and goes on with the new weights."""
    body = {"prompt": [3, 4, 5], "max_tokens": 56, "temperature": 0, "ignore_eos": True, "stream": True}
    policy = build("qwen3", seed=1)
    with (
        WeightSynchronizer(policy, rollouts=vllm_server.url, timeout_s=60) as sync,
        httpx.stream("POST", f"{vllm_server.url}/v1/completions", json=body, timeout=60) as response,
    ):
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        next(lines)
        sync.push(version=1)
        assert list(lines)[-1] == "data: [DONE]"


def test_error_in_the_middle_names_phase_server_and_cause_and_the_next_push_succeeds(
    vllm_server: Server, expected: list[Answers]
) -> None:
    policy = build("qwen3", seed=1)
    failing = False

    def fail() -> None:
        if failing:
            raise ValueError("a shard is gone")

    with WeightSynchronizer(_Interrupted(policy, fail), rollouts=vllm_server.url, timeout_s=60) as sync:
        failing = True
        with pytest.raises(SyncError, match="transfer.*a shard is gone"):
            sync.push(version=1)
        assert_same(server_answers(vllm_server.url), expected[1])
        assert server_version(vllm_server.url) == "0"
        failing = False
        assert sync.push(version=2).version == 2
        assert server_version(vllm_server.url) == "2"


def test_on_error_skip_reports_the_error_and_trains_on(vllm_server: Server) -> None:
    failing = False

    def fail() -> None:
        if failing:
            raise ValueError("a shard is gone")

    source = _Interrupted(build("qwen3", seed=1), fail)
    with WeightSynchronizer(source, rollouts=vllm_server.url, timeout_s=60, on_error="skip") as sync:
        failing = True
        report = sync.push(version=1)
        assert "a shard is gone" in report.error
        assert report.version == 0
        failing = False
        assert sync.push(version=2).error == ""


DYING_TRAINER = """
import os, sys
from tests.tiny_models import build
from tests.vllm.test_server import _Interrupted
from twinkle_callbacks import WeightSynchronizer
WeightSynchronizer(_Interrupted(build("qwen3", seed=2), lambda: os._exit(9)), rollouts=sys.argv[1], timeout_s=60).open()
"""


def test_a_trainer_that_dies_in_a_push_leaves_a_serving_server_that_the_next_one_can_use(
    vllm_server: Server, expected: list[Answers]
) -> None:
    with WeightSynchronizer(build("qwen3", seed=1), rollouts=vllm_server.url, timeout_s=60):
        pass
    root = Path(__file__).parents[2]
    dead = subprocess.run(
        [sys.executable, "-c", DYING_TRAINER, vllm_server.url],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert dead.returncode == 9, dead.stderr
    assert_same(server_answers(vllm_server.url), expected[1])
    assert server_version(vllm_server.url) == "0"
    with WeightSynchronizer(build("qwen3", seed=2), rollouts=vllm_server.url, timeout_s=60):
        assert_same(server_answers(vllm_server.url), expected[2])


def test_another_model_is_refused_before_training_with_what_differs(vllm_server: Server) -> None:
    before = server_answers(vllm_server.url)
    other = build("qwen3", seed=1, intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(SyncError, match="refused.*missing.*same model") as caught:
        WeightSynchronizer(other, rollouts=vllm_server.url, timeout_s=60).open()
    assert isinstance(caught.value.__cause__, WeightMismatchError)
    assert (caught.value.phase, caught.value.rollouts) == ("check", (vllm_server.url,))
    assert_same(server_answers(vllm_server.url), before)


def test_wrong_token_and_unsigned_calls_are_refused(vllm_server: Server) -> None:
    with pytest.raises(AuthenticationError, match="another token"):
        WeightSynchronizer(build("qwen3"), rollouts=vllm_server.url, token="w" * 32, timeout_s=60).open()
    for path in ("/pause", "/start_weight_update", "/finish_weight_update", "/collective_rpc"):
        assert httpx.post(vllm_server.url + path, json={"method": "x"}, timeout=30).status_code == 401
    assert len(server_answers(vllm_server.url)) == 3


def test_bad_addresses_are_clear_errors(vllm_server: Server) -> None:
    policy = build("qwen3")
    with pytest.raises(RolloutUnreachableError, match="nobody answers at http://127.0.0.1:9.*serve"):
        WeightSynchronizer(policy, rollouts="http://127.0.0.1:9", timeout_s=60).open()
    with pytest.raises(ConfigError, match="not a URL"):
        WeightSynchronizer(policy, rollouts="127.0.0.1:8000", timeout_s=60).open()
    with pytest.raises(ConfigError, match="twice"):
        WeightSynchronizer(policy, rollouts=[vllm_server.url, vllm_server.url + "/"])


def test_pushing_inside_an_event_loop_works(vllm_server: Server) -> None:
    import asyncio

    async def main() -> int:
        with WeightSynchronizer(build("qwen3", seed=1), rollouts=vllm_server.url, timeout_s=60) as sync:
            return sync.push(version=5).version

    assert asyncio.run(main()) == 5


def test_nothing_is_left_behind_after_close(vllm_server: Server) -> None:
    with WeightSynchronizer(build("qwen3", seed=1), rollouts=vllm_server.url, timeout_s=60):
        pass
    engine_threads = [t for t in threading.enumerate() if t.name.startswith("twinkle")]
    for thread in engine_threads:
        thread.join(10)
        assert not thread.is_alive(), thread.name


@pytest.fixture
def local_llm(tmp_path: Path) -> Iterator[Any]:
    build("qwen3", seed=0).save_pretrained(tmp_path)
    yield make_llm(tmp_path, synced=True)
    release()


def test_one_push_reaches_several_rollouts(vllm_server: Server, local_llm: Any) -> None:
    rollouts = [vllm_server.url, LocalRollout(local_llm)]
    with WeightSynchronizer(build("qwen3", seed=2), rollouts=rollouts, timeout_s=60) as sync:
        report = sync.push(version=4)
    assert_same(server_answers(vllm_server.url), answers(local_llm))
    assert (server_version(vllm_server.url), local_llm.get_weight_version()) == ("4", "4")
    assert [(r.rollout, r.version, r.digest) for r in report.replicas] == [
        (vllm_server.url, 4, report.digest),
        ("local", 4, report.digest),
    ]


def test_rollouts_of_different_models_are_refused(vllm_server: Server, tmp_path: Path) -> None:
    build("llama", seed=0).save_pretrained(tmp_path)
    rollouts = [vllm_server.url, LocalRollout(make_llm(tmp_path, synced=True))]
    with pytest.raises(RolloutError, match="different models.*Qwen3ForCausalLM.*LlamaForCausalLM"):
        WeightSynchronizer(build("qwen3"), rollouts=rollouts, timeout_s=60).open()
    release()


SHARDED_TRAINER = Path(__file__).with_name("sharded_trainer.py")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_trainer_ranks_push_the_whole_policy(kind: str, vllm_server: Server, expected: list[Answers]) -> None:
    run_ranks(SHARDED_TRAINER, 2, timeout_s=120, env={"KIND": kind, "URL": vllm_server.url})
    assert server_version(vllm_server.url) == "8"
    assert_same(server_answers(vllm_server.url), expected[2])
