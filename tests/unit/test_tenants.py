"""A tenant's token opens the routes and the messages of its own adapters, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest

from tests.unit.test_guard import App, call
from twinkle_callbacks import auth
from twinkle_callbacks.errors import AuthenticationError, ConfigError
from twinkle_callbacks.worker import guard
from twinkle_callbacks.worker.guard import MESSAGE_PATH, TENANT_PATHS, RouteGuard
from twinkle_callbacks.worker.messages import COMPARE, LEAVE, RECEIVE, Adapter, AdapterCall, JoinRequest

SERVER = "a token of enough length"
ALICE = auth.tenant_token(SERVER, "alice")


def request(adapter: str | None) -> JoinRequest:
    about = None if adapter is None else Adapter(adapter, {"r": 8}, {"a": (2, 3)})
    return JoinRequest(
        engine="gloo",
        metadata={"port": 1},
        rank_offset=1,
        world_size=2,
        bucket_size=512,
        timeout_s=1.0,
        verify=True,
        adapter=about,
    )


def test_a_tenants_token_tells_its_name_and_differs_for_each_name_and_server() -> None:
    assert auth.tenant_of(ALICE) == "alice"
    assert auth.tenant_of(SERVER) == auth.tenant_of("tenant:") == auth.tenant_of("tenant:x") == ""
    tokens = {ALICE, auth.tenant_token(SERVER, "bob"), auth.tenant_token("another token of length", "alice")}
    assert len(tokens) == 3
    assert auth.key_of(SERVER, "alice") == ALICE
    assert auth.key_of(SERVER, "") == SERVER


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a:b", "-a", "x" * 65, "ä"])
def test_a_tenants_name_is_plain(name: str) -> None:
    with pytest.raises(AuthenticationError, match="a name has letters"):
        auth.tenant_token(SERVER, name)


def test_only_the_servers_token_makes_others() -> None:
    with pytest.raises(AuthenticationError, match="the token of tenant 'alice'"):
        auth.tenant_token(ALICE, "bob")


@pytest.mark.parametrize(
    ("adapter", "may"), [("alice", True), ("alice/math", True), ("alicex", False), ("bob", False), ("", False)]
)
def test_a_tenant_touches_its_name_and_what_is_under_it(adapter: str, may: bool) -> None:
    assert auth.may_touch("alice", adapter) == may
    assert auth.may_touch("", adapter)


def test_a_request_carries_the_tenant_that_signed_it() -> None:
    header = auth.sign_request(ALICE, "POST", "/x", b"body")
    assert auth.check_request(SERVER, header, "POST", "/x", b"body").tenant == "alice"
    for forged in (header.replace("alice", "bob"), header.removesuffix(":alice"), header + ":bob"):
        with pytest.raises(AuthenticationError):
            auth.check_request(SERVER, forged, "POST", "/x", b"body")


@pytest.mark.parametrize(
    "path", ["/pause", "/update_weights", "/server_info", "/collective_rpc", "/reset_prefix_cache"]
)
def test_other_routes_stay_closed_to_a_tenant(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", SERVER)
    app = App()
    response = send(RouteGuard(app), path, ALICE)
    assert response.status_code == 403
    assert "tenant 'alice' may" in response.json()["error"]
    assert app.scopes == []


def test_the_routes_of_adapters_open_to_a_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", SERVER)
    for path in TENANT_PATHS:
        body = init_info(request=request("alice").signed(ALICE)) if path == MESSAGE_PATH else b""
        assert send(RouteGuard(App()), path, ALICE, body).status_code == 200
        assert send(RouteGuard(App()), path, auth.tenant_token("another token of length", "alice")).status_code == 401


def test_who_used_up_its_signatures_locks_out_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", SERVER)
    monkeypatch.setattr(guard, "MAX_NONCES", 1)
    route = RouteGuard(App())
    path = "/v1/unload_lora_adapter"
    assert [send(route, path, ALICE).status_code for _ in range(2)] == [200, 401]
    assert send(route, path, auth.tenant_token(SERVER, "bob")).status_code == 200
    assert send(route, path, SERVER).status_code == 200


@pytest.mark.parametrize(
    ("inner", "outer"),
    [(SERVER, ALICE), (ALICE, SERVER), (ALICE, auth.tenant_token(SERVER, "bob"))],
    ids=["owner's by a tenant", "tenant's by the owner", "tenant's by another"],
)
@pytest.mark.parametrize("kind", ["request", "call"])
def test_a_message_travels_only_in_a_request_of_its_own_signer(
    kind: str, inner: str, outer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", SERVER)
    message = request("alice") if kind == "request" else AdapterCall(action=LEAVE, adapter="alice")
    app = App()
    response = send(RouteGuard(app), MESSAGE_PATH, outer, init_info(**{kind: message.signed(inner)}))
    assert response.status_code == 403
    assert "sign both with the same token" in response.json()["error"]
    assert app.scopes == []


@pytest.mark.parametrize("token", [SERVER, ALICE])
def test_a_message_is_good_once(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", SERVER)
    app = App()
    route = RouteGuard(app)
    body = init_info(call=AdapterCall(action=LEAVE, adapter="alice").signed(token))
    assert send(route, MESSAGE_PATH, token, body).status_code == 200
    again = send(route, MESSAGE_PATH, token, body)
    assert again.status_code == 401
    assert "used before" in again.json()["error"]
    assert len(app.scopes) == 1


MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "no init_info": b"{}",
    "empty": b'{"init_info": {}}',
    "no object": b'{"init_info": {"request": 3}}',
    "empty message": b'{"init_info": {"request": {}}}',
    "both": b'{"init_info": {"request": {"nonce": "0"}, "call": {"nonce": "0"}}}',
    "an unknown key": b'{"init_info": {"master_address": {"nonce": "0"}}}',
    "one key too many": b'{"init_info": {"call": {"nonce": "0"}, "x": 1}}',
    "a tenant of another type": b'{"init_info": {"call": {"nonce": "0", "tenant": null}}}',
    "a nonce of another type": b'{"init_info": {"call": {"nonce": 0}}}',
}


@pytest.mark.parametrize("token", [SERVER, ALICE], ids=["owner", "tenant"])
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_what_holds_no_message_does_not_reach_the_workers(
    body: bytes, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", SERVER)
    app = App()
    response = send(RouteGuard(app), MESSAGE_PATH, token, body)
    assert response.status_code == 400
    assert "install the same version" in response.json()["error"]
    assert app.scopes == []


@pytest.mark.parametrize("backend", ["nccl", None])
def test_another_backend_gets_what_the_servers_token_signs_and_nothing_of_a_tenant(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", SERVER)
    body = b'{"init_info": {"master_address": "10.0.0.7"}}'
    assert send(RouteGuard(App()), MESSAGE_PATH, SERVER, body, backend=backend).status_code == 200
    for of_alice in (body, init_info(request=request("alice").signed(ALICE))):
        app = App()
        response = send(RouteGuard(app), MESSAGE_PATH, ALICE, of_alice, backend=backend)
        assert response.status_code == 400
        assert "does not run the weight-transfer backend 'twinkle'" in response.json()["error"]
        assert app.scopes == []


def test_a_server_does_not_start_with_a_tenants_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", ALICE)
    with pytest.raises(AuthenticationError, match="that of tenant 'alice'"):
        RouteGuard(App())


def send(
    route: RouteGuard, path: str, token: str, body: bytes = b"", *, backend: str | None = "twinkle"
) -> httpx.Response:
    headers = {auth.SIGNATURE_HEADER: auth.sign_request(token, "POST", path, body)}
    return call(route, path, body=body, headers=headers, backend=backend)


def init_info(**messages: dict[str, Any]) -> bytes:
    return json.dumps({"init_info": messages}).encode()


@pytest.mark.parametrize("token", [SERVER, ALICE])
def test_messages_about_ones_own_adapter_arrive_as_they_were_sent(token: str) -> None:
    opened = JoinRequest.opened(plain(request("alice").signed(token)), SERVER)
    assert opened.adapter == request("alice").adapter
    assert opened.tenant == auth.tenant_of(token)
    call = AdapterCall(action=COMPARE, adapter="alice", number=3, base={"w": ("float32", "00")})
    assert AdapterCall.opened(plain(call.signed(token)), SERVER).base == call.base


@pytest.mark.parametrize("adapter", [None, "bob"])
def test_an_invitation_to_what_is_not_the_tenants_is_refused(adapter: str | None) -> None:
    with pytest.raises(AuthenticationError, match="tenant 'alice' may not sync"):
        JoinRequest.opened(plain(request(adapter).signed(ALICE)), SERVER)


@pytest.mark.parametrize("adapter", ["", "bob"])
@pytest.mark.parametrize("action", [RECEIVE, LEAVE])
def test_a_call_about_what_is_not_the_tenants_is_refused(adapter: str, action: str) -> None:
    with pytest.raises(AuthenticationError, match="tenant 'alice' may not sync"):
        AdapterCall.opened(plain(AdapterCall(action=action, adapter=adapter).signed(ALICE)), SERVER)


@pytest.mark.parametrize(
    "change", [{"tenant": ""}, {"tenant": "bob"}, {"adapter": "bob"}, {"nonce": "00"}, {"number": 9}]
)
def test_a_call_that_was_changed_on_the_way_is_refused(change: dict[str, Any]) -> None:
    sent = plain(AdapterCall(action=RECEIVE, adapter="alice").signed(ALICE))
    with pytest.raises(AuthenticationError):
        AdapterCall.opened(sent | change, SERVER)


@pytest.mark.parametrize("change", [{"number": "x"}, {"unheard": 1}, {"mac": "zz"}, {"path": "\ud800"}])
def test_what_is_no_message_of_this_version_is_a_configuration_error(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not a AdapterCall of this version"):
        AdapterCall.opened(plain(AdapterCall(action=RECEIVE, adapter="alice").signed(SERVER)) | change, SERVER)


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """As it comes out of a request's JSON."""
    return dict(msgspec.json.decode(msgspec.json.encode(message)))
