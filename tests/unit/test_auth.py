from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_callbacks import auth
from twinkle_callbacks.errors import AuthenticationError

TOKEN = "0123456789abcdef"
parts = st.lists(st.one_of(st.binary(max_size=8), st.text(max_size=8), st.integers(0, 1 << 40)), max_size=4)


@pytest.fixture(autouse=True)
def config_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("TWINKLE_TOKEN", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_the_token_file_is_made_once_readable_by_its_owner_only(config_home: Path) -> None:
    token = auth.load_token()

    path = config_home / "twinkle_callbacks" / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["token"]
    assert len(token) >= 32
    assert auth.load_token() == token


def test_processes_that_start_at_once_end_up_with_one_token() -> None:
    tokens: list[str] = []
    start = threading.Barrier(8)

    def load() -> None:
        start.wait()
        tokens.append(auth.load_token())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == 8
    assert len(set(tokens)) == 1


def test_a_token_given_counts_before_the_environment_and_that_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from_file = auth.load_token()
    monkeypatch.setenv("TWINKLE_TOKEN", "e" * 16)

    assert auth.load_token() == "e" * 16 != from_file
    assert auth.load_token("g" * 16) == "g" * 16


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_token_file_that_others_can_read_is_refused_with_the_command_that_mends_it(mode: int) -> None:
    auth.load_token()
    auth.token_path().chmod(mode)

    with pytest.raises(AuthenticationError, match=rf"mode {mode:o}, others can read it; run: chmod 600 "):
        auth.load_token()


@pytest.mark.parametrize("source", ["argument", "environment", "file"])
def test_a_short_token_is_refused_wherever_it_comes_from(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "environment":
        monkeypatch.setenv("TWINKLE_TOKEN", "short")
    elif source == "file":
        auth.load_token()
        auth.token_path().write_text("short\n")

    with pytest.raises(AuthenticationError, match="has 5 characters, at least 16"):
        auth.load_token("short" if source == "argument" else None)


@given(parts, parts)
def test_macs_differ_when_any_part_or_its_boundary_does(
    one: list[bytes | str | int], other: list[bytes | str | int]
) -> None:
    def encoded(values: list[bytes | str | int]) -> list[bytes]:
        return [value if isinstance(value, bytes) else str(value).encode() for value in values]

    same = encoded(one) == encoded(other)
    assert auth.verify(auth.mac(TOKEN, "use", *one), auth.mac(TOKEN, "use", *other)) == same


def test_macs_differ_between_uses_and_tokens() -> None:
    assert auth.mac(TOKEN, "http", b"x") != auth.mac(TOKEN, "join", b"x")
    assert auth.mac(TOKEN, "http", b"x") != auth.mac(TOKEN[::-1], "http", b"x")


def test_nonces_are_fresh() -> None:
    assert len({auth.nonce() for _ in range(100)}) == 100


@given(
    st.sampled_from(["GET", "post", "PUT"]), st.text(st.characters(codec="ascii"), max_size=20), st.binary(max_size=64)
)
def test_a_signed_request_is_accepted_and_no_two_signatures_are_alike(method: str, target: str, body: bytes) -> None:
    first, second = (auth.sign_request(TOKEN, method, target, body) for _ in range(2))

    nonces = {auth.check_request(TOKEN, header, method.upper(), target, body).nonce for header in (first, second)}
    assert len(nonces) == 2
    assert first != second


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [("GET", "/pause?mode=keep", b"{}"), ("POST", "/pause?mode=abort", b"{}"), ("POST", "/pause?mode=keep", b"{ }")],
    ids=["method", "query", "body"],
)
def test_a_signature_is_for_one_method_target_and_body(method: str, target: str, body: bytes) -> None:
    header = auth.sign_request(TOKEN, "POST", "/pause?mode=keep", b"{}")

    with pytest.raises(AuthenticationError, match="another token"):
        auth.check_request(TOKEN, header, method, target, body)


def test_another_token_is_refused() -> None:
    header = auth.sign_request("another token of enough length", "POST", "/pause", b"")

    with pytest.raises(AuthenticationError, match="another token than the server's"):
        auth.check_request(TOKEN, header, "POST", "/pause", b"")


@pytest.mark.parametrize("skew_s", [-301.0, 301.0])
def test_a_signature_from_another_time_is_refused(skew_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    header = auth.sign_request(TOKEN, "POST", "/pause", b"")
    now = auth.time.time()
    monkeypatch.setattr(auth.time, "time", lambda: now + skew_s)

    with pytest.raises(AuthenticationError, match="synchronize the clocks"):
        auth.check_request(TOKEN, header, "POST", "/pause", b"")


@given(st.text(max_size=40))
def test_any_other_header_is_an_authentication_error(header: str) -> None:
    with pytest.raises(AuthenticationError):
        auth.check_request(TOKEN, header, "POST", "/pause", b"")


def test_a_time_that_is_no_number_is_refused_though_its_signature_is_right() -> None:
    signature = auth._request_mac(TOKEN, "POST", "/pause", b"", "nan", "fresh").hex()

    with pytest.raises(AuthenticationError):
        auth.check_request(TOKEN, f"nan:fresh:{signature}", "POST", "/pause", b"")


def test_the_token_file_lies_in_the_home_folder_without_a_config_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", os.fspath(tmp_path))

    assert auth.token_path() == tmp_path / ".config" / "twinkle_callbacks" / "token"
