"""Adapters that travel alone: the server answers as a fresh vLLM that loads the same adapter from files."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.distributed.launch import run_ranks
from tests.tiny_models import build
from tests.vllm import sharded_adapter, tenant
from tests.vllm.adapters import PROMPTS, Reference, adapted, train
from tests.vllm.conftest import Server
from tests.vllm.engines import Answers, assert_same, server_answers
from twinkle_callbacks import WeightSynchronizer, auth
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import AuthenticationError, RolloutError, SyncError, TwinkleError
from twinkle_callbacks.rollouts import HTTPRollout
from twinkle_callbacks.sync import _BaseSynchronizer

SYNCS = 50


@pytest.fixture(autouse=True)
def no_adapters(lora_server: Server) -> Iterator[None]:
    """Every test begins without adapters; those that a failed one left are gone too."""
    yield
    rollout = HTTPRollout(lora_server.url)
    for name in rollout.adapters():
        rollout.unload_adapter(name)
    rollout.close()


def synchronizer(server: Server, policy: Any, name: str, **settings: Any) -> WeightSynchronizer:
    defaults = {"rollouts": server.url, "merge_and_sync": False, "bucket_size_mb": 8, "timeout_s": 60}
    return WeightSynchronizer(policy, **{**defaults, "adapter_name": name, **settings})  # type: ignore[arg-type]


def version_of(server: Server, name: str) -> int | None:
    models = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    roots = {model["id"]: model["root"] for model in models}
    path = AdapterPath.parse(roots.get(name, ""))
    return None if path is None else path.version


def saved(policy: Any, folder: Path) -> Path:
    policy.save_pretrained(folder)
    return folder


def test_each_of_20_syncs_is_answered_like_the_same_adapter_from_files(
    lora_server: Server, reference: Reference, tmp_path: Path
) -> None:
    policy, other = adapted(), adapted()
    train(other, seed=999)
    base = reference.base()
    others = reference.adapter(saved(other, tmp_path / "other"))
    models = (None, "math", "other", None, "math")
    with synchronizer(lora_server, other, "other"), synchronizer(lora_server, policy, "math") as sync:
        assert_same(server_answers(lora_server.url, PROMPTS, "math"), base)  # PEFT's new adapters change nothing
        for version in range(1, 21):
            train(policy, seed=version)
            report = sync.push(version=version)
            assert report.replicas[0].digest == report.digest != ""
            assert version_of(lora_server, "math") == version
            expected = {None: base, "other": others, "math": reference.adapter(saved(policy, tmp_path / str(version)))}
            with ThreadPoolExecutor(len(models)) as pool:  # one batch of them all
                got = list(pool.map(lambda model: server_answers(lora_server.url, PROMPTS, model), models))
            for model, answered in zip(models, got, strict=True):
                assert_same(answered, expected[model])


def test_an_adapter_outlives_a_sync_of_the_base(lora_server: Server, tmp_path: Path) -> None:
    policy, changed = adapted(), tmp_path / "changed"
    train(policy, seed=3)
    folder = saved(policy, tmp_path / "adapter")
    build("qwen3", seed=5).save_pretrained(changed)
    fresh = Reference(changed)
    with synchronizer(lora_server, policy, "math"):
        settings: Any = {"rollouts": lora_server.url, "bucket_size_mb": 8, "timeout_s": 60}
        try:
            with _BaseSynchronizer(build("qwen3", seed=5), **settings):
                assert_same(server_answers(lora_server.url, PROMPTS), fresh.base())
                assert_same(server_answers(lora_server.url, PROMPTS, "math"), fresh.adapter(folder))
        finally:
            with _BaseSynchronizer(build("qwen3", seed=0), **settings):
                pass


def test_a_base_that_the_server_does_not_hold_is_sent_before_the_adapter(lora_server: Server, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    build("qwen3", seed=6).save_pretrained(changed)
    fresh, policy = Reference(changed), adapted(base_seed=6)
    train(policy, seed=1)
    try:
        with synchronizer(lora_server, policy, "math"):
            assert_same(server_answers(lora_server.url, PROMPTS), fresh.base())
            expected = fresh.adapter(saved(policy, tmp_path / "adapter"))
            assert_same(server_answers(lora_server.url, PROMPTS, "math"), expected)
            with pytest.raises(RolloutError, match=r"25 of 25 tensors differ.*not replaced.*\(math\)"):
                synchronizer(lora_server, adapted(base_seed=7), "other").open()
            token = auth.tenant_token(auth.load_token(), "other")
            with pytest.raises(RolloutError, match="a tenant may not replace it"):
                synchronizer(lora_server, adapted(base_seed=7), "other", token=token).open()
            settings: Any = {"rollouts": lora_server.url, "bucket_size_mb": 8, "timeout_s": 60}
            with pytest.raises(RolloutError, match=r"base is not replaced for adapter 'other'.*\(math\)"):
                _BaseSynchronizer(build("qwen3", seed=7), base_of="other", **settings).open()
            assert_same(server_answers(lora_server.url, PROMPTS, "math"), expected)
    finally:
        with _BaseSynchronizer(build("qwen3", seed=0), rollouts=lora_server.url, bucket_size_mb=8, timeout_s=60):
            pass


def test_a_base_is_not_replaced_beneath_an_adapter_that_came_after_its_trainer(lora_server: Server) -> None:
    settings: Any = {"rollouts": lora_server.url, "bucket_size_mb": 8, "timeout_s": 60}
    with (
        _BaseSynchronizer(build("qwen3", seed=0), base_of="math", **settings) as base,
        synchronizer(lora_server, adapted(), "other"),
    ):
        with pytest.raises(SyncError, match=r"not replaced for adapter 'math'.*\(other\)") as caught:
            base.push(version=1)
        assert caught.value.phase == "check"


class _Client(threading.Thread):
    """Asks one model again and again, and keeps what it was answered, in order."""

    def __init__(self, server: Server, model: str | None, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._server, self._model, self._over = server, model, stop
        self.seen: list[Answers] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self._over.is_set():
                if self._model is None or version_of(self._server, self._model) is not None:
                    self.seen.append(server_answers(self._server.url, PROMPTS, self._model))
        except Exception as error:  # raised by the test
            self.error = error


def test_two_trainers_keep_their_adapters_fresh_under_requests(
    lora_server: Server, reference: Reference, tmp_path: Path
) -> None:
    over = threading.Event()
    names = [tenant.name_of(rank) for rank in (0, 1)]
    clients = {model: _Client(lora_server, model, over) for model in (None, *names)}
    for client in clients.values():
        client.start()
    try:
        env = {"URL": lora_server.url, "FOLDER": str(tmp_path), "SYNCS": str(SYNCS)}
        run_ranks(Path(tenant.__file__), 2, timeout_s=300, env=env)
    finally:
        over.set()
        for client in clients.values():
            client.join(60)
    for client in clients.values():
        if client.error is not None:
            raise client.error
    base = reference.base()
    for answered in clients[None].seen:
        assert_same(answered, base)
    policy = adapted()
    for rank, name in enumerate(names):
        versions, answered = json.loads((tmp_path / f"{rank}.json").read_text())
        assert versions == list(range(SYNCS + 1))
        assert version_of(lora_server, name) == SYNCS
        expected = []
        for version in range(SYNCS + 1):
            train(policy, tenant.seed_of(rank, version))
            expected.append(reference.adapter(saved(policy, tmp_path / "adapter")))
        for got, wanted in zip(answered, expected, strict=True):
            assert_same(got, wanted)
        served = [_version_in(answered, expected) for answered in clients[name].seen]
        assert served == sorted(served)
        assert len(set(served)) > 3, "requests and syncs did not overlap"
        assert_same(server_answers(lora_server.url, PROMPTS, name), expected[-1])


def _version_in(answered: Answers, expected: list[Answers]) -> int:
    for version, answers in enumerate(expected):
        try:
            assert_same(answered, answers)
        except AssertionError:
            continue
        return version
    raise AssertionError(f"{answered} is the answer of no version")


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_an_adapter_of_a_sharded_policy_is_gathered(
    kind: str, lora_server: Server, reference: Reference, tmp_path: Path
) -> None:
    base = server_answers(lora_server.url, PROMPTS)
    env = {"KIND": kind, "URL": lora_server.url, "FOLDER": str(tmp_path)}
    run_ranks(Path(sharded_adapter.__file__), 2, timeout_s=180, env=env)
    assert version_of(lora_server, "sharded") == 2
    assert_same(server_answers(lora_server.url, PROMPTS, "sharded"), reference.adapter(tmp_path))
    assert_same(server_answers(lora_server.url, PROMPTS), base)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 16}, "--max-lora-rank 16"),
        ({"use_dora": True}, "merge_and_sync=True"),
        ({"modules_to_save": ["lm_head"]}, "merge_and_sync=True"),
        ({"target_modules": ["q_proj", "of_ours"]}, "of_ours"),
    ],
    ids=["rank", "dora", "modules_to_save", "module"],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused_before_training(
    lora_server: Server, config: dict[str, Any], says: str
) -> None:
    before = server_answers(lora_server.url, PROMPTS)
    policy = adapted(**config)
    with pytest.raises(TwinkleError, match=says):
        synchronizer(lora_server, policy, "math").open()
    assert version_of(lora_server, "math") is None
    assert_same(server_answers(lora_server.url, PROMPTS), before)


def test_names_and_slots_are_refused_before_training_and_nothing_changes(lora_server: Server) -> None:
    policy = adapted()
    train(policy, seed=1)
    token = auth.tenant_token(auth.load_token(), "alice")
    with (
        synchronizer(lora_server, policy, "alice", token=token) as sync,
        synchronizer(lora_server, policy, "b"),
        synchronizer(lora_server, policy, "c"),
    ):
        served = server_answers(lora_server.url, PROMPTS, "alice")
        with pytest.raises(RolloutError, match=r"all 3 adapter slots are taken \(by alice, b, c\).*--max-loras 4"):
            synchronizer(lora_server, policy, "d").open()
        with pytest.raises(RolloutError, match="'alice' is kept fresh by another trainer"):
            synchronizer(lora_server, policy, "alice", token=token).open()
        with pytest.raises((AuthenticationError, RolloutError), match="tenant 'alice' may not sync adapter 'b'"):
            synchronizer(lora_server, policy, "b", token=token).open()
        with pytest.raises((AuthenticationError, RolloutError), match="tenant 'alice'"):
            HTTPRollout(lora_server.url, token=token).unload_adapter("b")
        with pytest.raises((AuthenticationError, RolloutError), match="tenant 'alice'"):
            HTTPRollout(lora_server.url, token=token).pause("abort", clear_cache=True)
        with pytest.raises(RolloutError, match="serves its base model as"):
            synchronizer(lora_server, policy, str(lora_server.policy_dir)).open()
        with pytest.raises(RolloutError, match="runs with enable_lora=True"):
            WeightSynchronizer(policy, rollouts=lora_server.url, timeout_s=60).open()
        assert_same(server_answers(lora_server.url, PROMPTS, "alice"), served)
        assert sync.push(version=7).version == 7


def test_a_server_without_lora_is_refused_with_its_flag(vllm_server: Server) -> None:
    with pytest.raises(RolloutError, match="start the server with --enable-lora"):
        synchronizer(vllm_server, adapted(), "math").open()


def test_an_adapter_that_is_sent_by_half_leaves_the_last_version_and_the_next_push_succeeds(
    lora_server: Server, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted()
    train(policy, seed=1)
    with synchronizer(lora_server, policy, "math") as sync:
        first = reference.adapter(saved(policy, tmp_path / "1"))
        train(policy, seed=2)
        whole = sync._source.stream

        def half() -> Iterator[Any]:
            stream = whole()
            yield next(stream)
            yield next(stream)
            raise RuntimeError("the trainer stumbled")

        monkeypatch.setattr(sync._source, "stream", half)
        with pytest.raises(SyncError, match="the trainer stumbled"):
            sync.push(version=2)
        assert version_of(lora_server, "math") == 0
        assert_same(server_answers(lora_server.url, PROMPTS, "math"), first)
        sync.push(version=3)
        expected = reference.adapter(saved(policy, tmp_path / "3"))
        assert_same(server_answers(lora_server.url, PROMPTS, "math"), expected)


def test_a_trainer_that_resumes_finds_its_adapter_once(
    lora_server: Server, reference: Reference, tmp_path: Path
) -> None:
    policy = adapted()
    train(policy, seed=1)
    with synchronizer(lora_server, policy, "math") as sync:
        sync.push(version=5)
    expected = reference.adapter(saved(policy, tmp_path / "1"))
    assert_same(server_answers(lora_server.url, PROMPTS, "math"), expected)  # its trainer has gone; it stays served
    with synchronizer(lora_server, policy, "math") as sync:
        assert_same(server_answers(lora_server.url, PROMPTS, "math"), expected)
        train(policy, seed=2)
        sync.push(version=1)
        expected = reference.adapter(saved(policy, tmp_path / "2"))
        assert_same(server_answers(lora_server.url, PROMPTS, "math"), expected)
