from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from twinkle_callbacks import auth
from twinkle_callbacks.errors import AuthenticationError
from twinkle_callbacks.worker import asgi, guard
from twinkle_callbacks.worker.guard import RouteGuard, is_open

TOKEN = "a token of enough length"

# Every route of the installed vLLM that must not be open, so that one which an upgrade adds is looked at.
CONTROL = {
    *("/pause", "/resume", "/abort_requests", "/inference/v1/abort_requests", "/collective_rpc", "/server_info"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
    *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
    *("/weight_checker", "/sleep", "/wake_up", "/release_kv_cache_memory"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
    *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply", "/fault_tolerance/status"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/stop_profile", "/kv_event_sources"),
}


class App:
    """Answers with what reached it."""

    def __init__(self) -> None:
        self.scopes: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope["type"])
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode() + b" " + body})


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def guarded(app: App, monkeypatch: pytest.MonkeyPatch) -> RouteGuard:
    monkeypatch.setenv("TWINKLE_TOKEN", TOKEN)
    return RouteGuard(app)


def call(
    app: RouteGuard,
    target: str,
    *,
    method: str = "POST",
    body: bytes | list[bytes] = b"",
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    root_path: str = "",
    backend: str | None = "twinkle",
) -> httpx.Response:
    """What a server of this weight-transfer backend answers, behind its guard."""
    config = SimpleNamespace(weight_transfer_config=backend and SimpleNamespace(backend=backend))
    state = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config))

    async def server(scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = SimpleNamespace(state=state)
        await app(scope, receive, send)

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in body:
            assert isinstance(chunk, bytes)
            yield chunk

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=server, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            content = body if isinstance(body, bytes) else chunks()
            return await client.request(method, target, content=content, headers=headers)

    return asyncio.run(send())


def signed(method: str, target: str, body: bytes = b"", token: str = TOKEN) -> dict[str, str]:
    return {auth.SIGNATURE_HEADER: auth.sign_request(token, method, target, body)}


@pytest.mark.parametrize("path", [*sorted(CONTROL), "/unheard_of", "/", "/pause/", "/%70ause", "//pause", "/health/x"])
def test_a_guarded_path_needs_a_signature(guarded: RouteGuard, app: App, path: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        response = call(guarded, path, method=method)
        assert response.status_code == 401
        assert auth.SIGNATURE_HEADER in response.json()["error"]
    assert app.scopes == []


@pytest.mark.parametrize("path", ["/health", "/weight_info", "/v1/completions", "/v1/responses/r1/cancel", "/metrics"])
def test_inference_and_looking_need_none(guarded: RouteGuard, path: str) -> None:
    response = call(guarded, path, body=b"prompt")

    assert response.status_code == 200
    assert response.content == path.encode() + b" prompt"


@pytest.mark.parametrize("body", [b"", b"{}", bytes(range(256)) * 5000])
@pytest.mark.parametrize("target", ["/pause", "/pause?mode=keep&clear_cache=false", "/reset%5Fcache?x=a%20b"])
def test_a_signed_request_reaches_the_app_with_its_body(guarded: RouteGuard, target: str, body: bytes) -> None:
    response = call(guarded, target, body=body, headers=signed("POST", target, body))

    assert response.status_code == 200
    assert response.content.partition(b" ")[2] == body


def test_a_body_in_pieces_is_checked_and_passed_on_whole(guarded: RouteGuard) -> None:
    headers = signed("POST", "/update_weights", b"one two three")
    response = call(guarded, "/update_weights", body=[b"one ", b"", b"two ", b"three"], headers=headers)

    assert response.content == b"/update_weights one two three"


def test_a_disconnect_after_the_body_still_reaches_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", TOKEN)
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    async def run() -> None:
        incoming: Iterator[dict[str, Any]] = iter([{"type": "http.request", "body": b"x"}, {"type": "http.disconnect"}])

        async def receive() -> dict[str, Any]:
            return next(incoming)

        async def send(message: Any) -> None:
            raise AssertionError(message)

        header = signed("POST", "/pause", b"x")[auth.SIGNATURE_HEADER]
        headers = [(auth.SIGNATURE_HEADER.encode(), header.encode())]
        scope = {"type": "http", "method": "POST", "path": "/pause", "headers": headers}
        await RouteGuard(app)(scope, receive, send)

    asyncio.run(run())
    assert seen == ["http.request", "http.disconnect"]


def test_a_signature_is_good_once(guarded: RouteGuard) -> None:
    headers = signed("POST", "/pause")

    assert call(guarded, "/pause", headers=headers).status_code == 200
    replayed = call(guarded, "/pause", headers=headers)
    assert replayed.status_code == 401
    assert "used before" in replayed.json()["error"]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (signed("POST", "/resume"), "another token"),
        (signed("GET", "/pause"), "another token"),
        (signed("POST", "/pause?mode=keep"), "another token"),
        (signed("POST", "/pause", b"x"), "another token"),
        (signed("POST", "/pause", token="some other token of length"), "another token"),
        ({auth.SIGNATURE_HEADER: "no signature"}, "malformed"),
        ({auth.SIGNATURE_HEADER: ""}, "malformed"),
        ([(auth.SIGNATURE_HEADER, "a:b:c"), (auth.SIGNATURE_HEADER, "a:b:c")], "one x-twinkle-signature header"),
        ({"authorization": f"Bearer {TOKEN}"}, "one x-twinkle-signature header"),
    ],
    ids=["path", "method", "query", "body", "token", "text", "empty", "twice", "bearer"],
)
def test_anything_else_is_refused(guarded: RouteGuard, app: App, headers: Any, message: str) -> None:
    response = call(guarded, "/pause", headers=headers)

    assert response.status_code == 401
    assert message in response.json()["error"]
    assert app.scopes == []


def test_a_refusal_shows_nothing_of_the_token_nor_of_the_right_signature(guarded: RouteGuard) -> None:
    header = signed("POST", "/pause")[auth.SIGNATURE_HEADER]
    stamp, fresh, signature = header.split(":")
    forged = f"{stamp}:{fresh}:{'0' * len(signature)}"

    text = call(guarded, "/pause", headers={auth.SIGNATURE_HEADER: forged}).text
    assert TOKEN not in text
    assert signature not in text


def test_a_refused_signature_is_not_remembered(guarded: RouteGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_NONCES", 1)
    for _ in range(3):
        assert call(guarded, "/pause", headers=signed("POST", "/resume")).status_code == 401

    assert call(guarded, "/pause", headers=signed("POST", "/pause")).status_code == 200


def test_memory_for_signatures_is_bounded_and_freed_when_they_expire(
    guarded: RouteGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(guard, "MAX_NONCES", 2)
    monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])

    def pause() -> httpx.Response:
        return call(guarded, "/pause", headers=signed("POST", "/pause"))

    assert [pause().status_code for _ in range(2)] == [200, 200]
    assert "2 signed requests within 600 s" in pause().json()["error"]
    now[0] += guard.NONCE_LIFETIME_S
    assert pause().status_code == 200


def test_a_nonce_of_any_length_is_not_remembered(guarded: RouteGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth.secrets, "token_hex", lambda _: "0" * 65)
    response = call(guarded, "/pause", headers=signed("POST", "/pause"))
    assert response.status_code == 401
    assert "1 to 64 characters, this one 65" in response.json()["error"]


@pytest.mark.parametrize("body", [b"x" * 11, [b"x" * 6, b"x" * 5]], ids=["declared", "streamed"])
def test_a_body_over_the_limit_is_refused(
    guarded: RouteGuard, app: App, body: bytes | list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi, "MAX_BODY_BYTES", 10)
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 10)
    response = call(guarded, "/pause", body=body, headers=signed("POST", "/pause", b"x" * 11))

    assert response.status_code == 413
    assert "larger than 10 bytes" in response.json()["error"]
    assert app.scopes == []


@pytest.mark.parametrize(
    ("root_path", "path", "status"),
    [("/proxy", "/proxy/health", 200), ("/proxy", "/proxy/pause", 401), ("/v1/responses", "/v1/responses/pause", 401)],
)
def test_a_path_counts_as_the_router_sees_it(guarded: RouteGuard, root_path: str, path: str, status: int) -> None:
    assert call(guarded, path, root_path=root_path).status_code == status


def test_lifespan_passes_and_a_websocket_only_on_an_open_path(guarded: RouteGuard, app: App) -> None:
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await guarded({"type": "lifespan"}, receive, send)
        await guarded({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send)
        await guarded({"type": "websocket", "path": "/collective_rpc", "headers": []}, receive, send)

    asyncio.run(run())
    assert app.scopes == ["lifespan", "websocket"]
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_server_without_a_usable_token_does_not_start(monkeypatch: pytest.MonkeyPatch, app: App) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", "short")
    with pytest.raises(AuthenticationError, match="at least 16"):
        RouteGuard(app)


def test_every_route_of_the_installed_vllm_is_either_control_or_open() -> None:
    routes = set(_routes(_vllm_folder() / "entrypoints"))

    assert {"/pause", "/update_weights", "/collective_rpc", "/v1/completions", "/health"} <= routes
    assert {route for route in routes if not is_open(route)} <= CONTROL
    assert not any(is_open(route) for route in CONTROL)


def _vllm_folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _routes(folder: Path) -> Iterator[str]:
    """Paths of all `@router.post("/path")` and `add_api_route("/path")`, read without importing vLLM."""
    methods = {"get", "post", "put", "delete", "patch", "head", "websocket", "api_route", "add_api_route"}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            path = node.args[0]
            if node.func.attr in methods and isinstance(path, ast.Constant) and str(path.value).startswith("/"):
                yield str(path.value)


def test_the_answer_is_json(guarded: RouteGuard) -> None:
    response = call(guarded, "/pause")

    assert response.headers["content-type"] == "application/json"
    assert json.loads(response.content)["error"].startswith("twinkle_callbacks: /pause needs")
