"""A tenant's token opens the routes and the messages of its own adapters, and nothing else."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from tests.unit.test_guard import App, call
from twinkle_callbacks import auth
from twinkle_callbacks.errors import AuthenticationError, ConfigError
from twinkle_callbacks.worker.guard import TENANT_PATHS, RouteGuard
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
        assert send(RouteGuard(App()), path, ALICE).status_code == 200
        assert send(RouteGuard(App()), path, auth.tenant_token("another token of length", "alice")).status_code == 401


def test_a_server_does_not_start_with_a_tenants_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", ALICE)
    with pytest.raises(AuthenticationError, match="that of tenant 'alice'"):
        RouteGuard(App())


def send(guard: RouteGuard, path: str, token: str) -> httpx.Response:
    return call(guard, path, headers={auth.SIGNATURE_HEADER: auth.sign_request(token, "POST", path, b"")})


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


@pytest.mark.parametrize("change", [{"number": "x"}, {"unheard": 1}, {"mac": "zz"}])
def test_what_is_no_message_of_this_version_is_a_configuration_error(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not a AdapterCall of this version"):
        AdapterCall.opened(plain(AdapterCall(action=RECEIVE, adapter="alice").signed(SERVER)) | change, SERVER)


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """As it comes out of a request's JSON."""
    return dict(msgspec.json.decode(msgspec.json.encode(message)))
