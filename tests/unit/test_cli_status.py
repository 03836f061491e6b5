"""`twinkle-callbacks status` against answers of a server, right and wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from twinkle_callbacks import auth
from twinkle_callbacks.cli.main import main
from twinkle_callbacks.cli.status import ServerStatus, fetch_status
from twinkle_callbacks.errors import AuthenticationError, ConfigError, RolloutError, RolloutUnreachableError

TOKEN = "a token of enough length"
MODELS = [
    {"id": "policy", "root": "/policy", "parent": None},
    {"id": "also", "root": "/policy", "parent": None},
    {"id": "math", "root": "twinkle:0011223344556677@4", "parent": "policy"},
]


class Server(ThreadingHTTPServer):
    """Answers GET from a table of path to (status, body)."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.answers: dict[str, tuple[int, Any]] = {
            "/weight_info": (200, {"weight_version": "default"}),
            "/is_paused": (200, {"is_paused": True}),
            "/get_world_size": (200, {"world_size": 1}),
            "/v1/models": (200, {"data": MODELS}),
            "/server_info": (200, {"vllm_config": {"lora_config": {"max_loras": 1}, "weight_transfer_config": None}}),
        }
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        header = self.headers[auth.SIGNATURE_HEADER] or ""
        self.server.seen.append(auth.check_request(TOKEN, header, "GET", self.path, b"").nonce)
        status, answer = self.server.answers[self.path.partition("?")[0]]
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TWINKLE_TOKEN", TOKEN)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_status_is_what_the_server_says_and_each_request_is_signed_anew(server: Server) -> None:
    assert fetch_status(server.url + "/") == ServerStatus(
        url=server.url,
        version="default",
        model="policy, also",
        paused=True,
        world_size=1,
        lora=True,
        adapters={"math": "version 4"},
        backend=None,
    )
    assert len(set(server.seen)) == 6


def test_the_table_shows_every_value(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", server.url]) == 0

    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row] == [
        ["url", server.url],
        ["version", "default"],
        ["model", "policy, also"],
        ["paused", "yes"],
        ["world size", "1"],
        ["lora", "yes"],
        ["adapters", "math (version 4)"],
        ["backend", "none"],
    ]


def test_nobody_at_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as gone:
        url = f"http://127.0.0.1:{gone.server_port}"

    with pytest.raises(RolloutUnreachableError, match=f"nobody answers at {url}"):
        fetch_status(url)
    assert main(["status", url]) == 1
    assert capsys.readouterr().err.startswith("twinkle-callbacks status: nobody answers at ")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        fetch_status(url)


def test_a_server_without_the_rl_routes_is_told_how_to_get_them(server: Server) -> None:
    server.answers["/weight_info"] = (404, {"detail": "Not Found"})
    with pytest.raises(RolloutError, match="has no route /weight_info: .*twinkle-callbacks serve"):
        fetch_status(server.url)


def test_a_server_with_another_token(server: Server) -> None:
    server.answers["/server_info"] = (401, {"error": "signed with another token"})
    with pytest.raises(AuthenticationError, match="/server_info: .*another token"):
        fetch_status(server.url)


def test_a_server_that_fails_is_quoted(server: Server) -> None:
    server.answers["/is_paused"] = (500, {"error": "engine core died"})
    with pytest.raises(RolloutError, match="/is_paused answered 500: .*engine core died"):
        fetch_status(server.url)
