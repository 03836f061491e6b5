"""Adapter files on a server: attached, replaced and detached, they are answered as by a vLLM that loads them itself."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.vllm.adapters import PROMPTS, Reference, adapted, train
from tests.vllm.conftest import Server
from tests.vllm.engines import assert_same, server_answers
from twinkle_callbacks import WeightSynchronizer, auth
from twinkle_callbacks.errors import AuthenticationError, RolloutError
from twinkle_callbacks.rollouts import AdapterRegistry, ServedAdapter
from twinkle_callbacks.worker.messages import LEAVE, AdapterCall


@pytest.fixture
def registry(lora_server: Server) -> Iterator[AdapterRegistry]:
    with AdapterRegistry(lora_server.url) as registry:
        yield registry
        for adapter in registry.list():
            registry.detach(adapter.name)


def save(folder: Path, seed: int, *, as_safetensors: bool = True, **config: Any) -> str:
    policy = adapted(**config)
    train(policy, seed)
    policy.save_pretrained(folder, safe_serialization=as_safetensors)
    return str(folder)


def test_files_are_answered_as_they_were_when_they_were_attached(
    lora_server: Server, reference: Reference, registry: AdapterRegistry, tmp_path: Path
) -> None:
    url, base = lora_server.url, reference.base()
    one, two = save(tmp_path / "one", seed=1), save(tmp_path / "two", seed=2)
    first, second = reference.adapter(Path(one)), reference.adapter(Path(two))
    registry.attach("files", one)
    assert registry.list() == [ServedAdapter("files", None, one)]
    assert_same(server_answers(url, PROMPTS, "files"), first)
    registry.attach("files", two)
    assert_same(server_answers(url, PROMPTS, "files"), second)
    save(Path(two), seed=3)  # other contents at the same place, which are not read before they are attached
    assert_same(server_answers(url, PROMPTS, "files"), second)
    registry.attach("files", two)
    assert_same(server_answers(url, PROMPTS, "files"), reference.adapter(Path(two)))
    registry.attach("files", one)
    shutil.rmtree(one)
    for name in ("a", "b", "a"):  # more than the slots hold at a time
        registry.attach(name, two)
        assert server_answers(url, PROMPTS, name) != base
    assert_same(server_answers(url, PROMPTS, "files"), first)
    assert_same(server_answers(url, PROMPTS), base)
    registry.detach("files")
    assert [adapter.name for adapter in registry.list()] == ["a", "b"]
    assert httpx.post(f"{url}/v1/completions", json={"model": "files", "prompt": [3]}, timeout=30).status_code == 404


def test_files_that_do_not_fit_leave_what_was_served(
    lora_server: Server, registry: AdapterRegistry, tmp_path: Path
) -> None:
    registry.attach("files", save(tmp_path / "one", seed=1))
    served = server_answers(lora_server.url, PROMPTS, "files")
    with pytest.raises(RolloutError, match=r"rank 16 is greater than max_lora_rank 8"):
        registry.attach("files", save(tmp_path / "large", seed=2, r=16))
    small = save(tmp_path / "small", seed=2, base={"hidden_size": 64})
    with pytest.raises(RolloutError, match=r"weight is \[8, 64\], and the model served needs .*the same model"):
        registry.attach("files", small)
    for as_safetensors in (True, False):
        deep = tmp_path / f"deep {as_safetensors}"
        save(deep, seed=2, as_safetensors=as_safetensors, base={"num_hidden_layers": 4})
        with pytest.raises(RolloutError, match=r"adapts model\.layers\.[23].*for which the server has no LoRA layer"):
            registry.attach("files", str(deep))
    with pytest.raises(RolloutError, match="files"):
        registry.attach("files", str(tmp_path / "nowhere"))
    with pytest.raises(RolloutError, match="name of the base model"):
        registry.attach(str(lora_server.policy_dir), str(tmp_path / "one"))
    with pytest.raises(RolloutError, match="there is no adapter 'other'; those that exist are files"):
        registry.detach("other")
    assert_same(server_answers(lora_server.url, PROMPTS, "files"), served)


def test_an_adapter_that_requests_use_is_not_detached(
    lora_server: Server, registry: AdapterRegistry, tmp_path: Path
) -> None:
    registry.attach("files", save(tmp_path / "one", seed=1))
    running, refused, over = threading.Event(), threading.Event(), threading.Event()
    body = {"model": "files", "prompt": [3, 4], "max_tokens": 100, "n": 16, "ignore_eos": True, "stream": True}

    def ask() -> None:
        with httpx.stream("POST", f"{lora_server.url}/v1/completions", json=body, timeout=60) as response:
            for _ in response.iter_lines():
                running.set()
                refused.wait(30)
        over.set()

    client = threading.Thread(target=ask, daemon=True)
    client.start()
    assert running.wait(30)
    try:
        with pytest.raises(RolloutError, match=r"in use by \d+ requests"):
            registry.detach("files")
    finally:
        refused.set()
    assert over.wait(60)
    registry.detach("files")
    assert registry.list() == []


def test_what_holds_no_message_of_its_signer_does_not_reach_the_workers(
    lora_server: Server, registry: AdapterRegistry
) -> None:
    owner = auth.load_token()
    alice = auth.tenant_token(owner, "alice")
    call = AdapterCall(action=LEAVE, adapter="alice")
    for token, init_info, status in (
        (owner, {}, 400),
        (alice, {"master_address": "127.0.0.1"}, 400),
        (alice, {"call": call.signed(owner)}, 403),
        (owner, {"call": call.signed(alice)}, 403),
        (alice, {"call": call.signed(alice)}, 200),
        (owner, {"call": call.signed(owner)}, 200),
    ):
        body = json.dumps({"init_info": init_info}).encode()
        signature = auth.sign_request(token, "POST", "/init_weight_transfer_engine", body)
        headers = {auth.SIGNATURE_HEADER: signature, "content-type": "application/json"}
        url = f"{lora_server.url}/init_weight_transfer_engine"
        assert httpx.post(url, content=body, headers=headers, timeout=30).status_code == status
    assert registry.list() == []


def test_a_tenant_attaches_under_its_name_only_and_cannot_take_anothers(
    lora_server: Server, registry: AdapterRegistry, tmp_path: Path
) -> None:
    folder = save(tmp_path / "one", seed=1)
    with WeightSynchronizer(
        adapted(), rollouts=lora_server.url, merge_and_sync=False, adapter_name="bob", timeout_s=60
    ):
        token = auth.tenant_token(auth.load_token(), "alice")
        with AdapterRegistry(lora_server.url, token=token) as mine:
            mine.attach("alice/files", folder)
            assert ServedAdapter("alice/files", None, folder) in mine.list()
            for forbidden in (lambda: mine.attach("bob", folder), lambda: mine.detach("bob")):
                with pytest.raises(AuthenticationError, match="'bob' is not one of tenant 'alice'"):
                    forbidden()
            with pytest.raises(AuthenticationError, match=r"tenant 'alice' may attach folders below .*, not '/etc'"):
                mine.attach("alice/files", "/etc")
            mine.detach("alice/files")
    assert [adapter.name for adapter in registry.list()] == ["bob"]
