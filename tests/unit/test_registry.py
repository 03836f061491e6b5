"""`AdapterRegistry` and the commands over it, against what a server answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.unit.test_http_rollout import TOKEN, Server
from twinkle_callbacks import auth
from twinkle_callbacks.cli.main import main
from twinkle_callbacks.errors import AuthenticationError, ConfigError, RolloutError
from twinkle_callbacks.rollouts import AdapterRegistry, HTTPRollout, LocalRollout, ServedAdapter

CARDS = [
    {"id": "policy", "root": "/policy", "parent": None},
    {"id": "sent", "root": "twinkle:0011223344556677@4", "parent": "policy"},
    {"id": "attached", "root": "twinkle:0011223344556677=/adapters/a", "parent": "policy"},
    {"id": "static", "root": "/adapters/s", "parent": "policy"},
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TWINKLE_TOKEN", TOKEN)
    server = Server()
    server.answers["/v1/models"] = (200, {"data": CARDS})
    yield server
    server.close()


def asked(server: Server) -> list[tuple[str, object]]:
    return [(path, json.loads(body) if body else None) for _, path, body, _ in server.asked]


def test_adapters_are_listed_with_where_they_come_from(server: Server) -> None:
    with AdapterRegistry(server.url) as registry:
        assert registry.list() == [
            ServedAdapter("attached", None, "/adapters/a"),
            ServedAdapter("sent", 4, None),
            ServedAdapter("static", None, "/adapters/s"),
        ]


def test_attaching_and_detaching_are_vllms_routes(server: Server) -> None:
    with AdapterRegistry(HTTPRollout(server.url, token=TOKEN)) as registry:
        registry.attach("math", "/adapters/m")
        registry.detach("math")
    assert asked(server) == [
        ("/v1/load_lora_adapter", {"lora_name": "math", "lora_path": "/adapters/m", "load_inplace": True}),
        ("/v1/unload_lora_adapter", {"lora_name": "math"}),
    ]


@pytest.mark.parametrize(
    ("name", "folder"), [("", "/a"), ("a b", "/a"), ("x" * 257, "/a"), ("math", "a"), ("math", "")]
)
def test_a_name_or_folder_of_another_form_is_not_sent(server: Server, name: str, folder: str) -> None:
    with AdapterRegistry(server.url) as registry, pytest.raises(ConfigError, match="give"):
        registry.attach(name, folder)
    assert server.asked == []


def local(models: list[str], max_loras: int | None) -> LocalRollout:
    lora = None if max_loras is None else SimpleNamespace(max_loras=max_loras)
    config = SimpleNamespace(
        weight_transfer_config=SimpleNamespace(backend="twinkle"),
        model_config=SimpleNamespace(served_model_name=models),
        lora_config=lora,
    )
    engine = SimpleNamespace(vllm_config=config, add_lora=lambda version: True, remove_lora=lambda lora_id: True)
    return LocalRollout(SimpleNamespace(llm_engine=engine))


def test_an_engine_in_the_process_refuses_what_a_server_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinkle_callbacks.rollouts.local.new_version", lambda *_: SimpleNamespace(lora_path="/a"))
    with AdapterRegistry(local(["policy", "alias"], 2)) as registry:
        for taken in ("policy", "alias"):
            with pytest.raises(RolloutError, match=f"'{taken}' is the name of the base model"):
                registry.attach(taken, "/a")
        for name in ("one", "two", "one"):
            registry.attach(name, "/a")
        with pytest.raises(RolloutError, match=r"all 2 adapter slots are taken \(by one, two\).*max_loras=3"):
            registry.attach("three", "/a")
        registry.detach("one")
        registry.attach("three", "/a")
        assert [adapter.name for adapter in registry.list()] == ["three", "two"]
    with AdapterRegistry(local(["policy"], None)) as registry, pytest.raises(RolloutError, match="enable_lora=True"):
        registry.attach("one", "/a")


@pytest.mark.parametrize(
    ("status", "error"), [(400, RolloutError), (404, RolloutError), (409, RolloutError), (403, AuthenticationError)]
)
def test_a_refusal_comes_with_the_servers_words(server: Server, status: int, error: type[Exception]) -> None:
    server.answers["/v1/unload_lora_adapter"] = (status, {"error": "twinkle_callbacks: why not"})
    with AdapterRegistry(server.url) as registry, pytest.raises(error, match="why not"):
        registry.detach("math")


def test_the_commands(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {"name": "sent", "version": 4, "folder": None}
    assert main(["adapters", "list", server.url]) == 0
    assert "/adapters/s" in capsys.readouterr().out
    assert main(["adapters", "attach", server.url, "math", "/adapters/m"]) == 0
    assert main(["adapters", "detach", server.url, "math"]) == 0
    assert [path for path, _ in asked(server)][-2:] == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    capsys.readouterr()
    assert main(["adapters", "attach", server.url, "math", "relative"]) == 1
    assert "give an absolute path" in capsys.readouterr().err


def test_the_token_of_a_tenant_is_printed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", TOKEN)
    assert main(["token", "math"]) == 0
    assert capsys.readouterr().out == auth.tenant_token(TOKEN, "math") + "\n"
    assert main(["token", "a b"]) == 1
    assert "a name has letters" in capsys.readouterr().err
