"""What `HTTPRollout` makes of a server's answers. The texts are those that vLLM 0.32 gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from twinkle_callbacks import auth
from twinkle_callbacks.errors import (
    AuthenticationError,
    ConfigError,
    DeadlineError,
    RolloutError,
    RolloutUnreachableError,
)
from twinkle_callbacks.rollouts import HTTPRollout, open_rollout

TOKEN = "t" * 32


class Server:
    """Answers each path with a status and a JSON body, and keeps what it was asked."""

    def __init__(self) -> None:
        config = {"weight_transfer_config": {"backend": "twinkle"}}
        self.answers: dict[str, tuple[int, object]] = {
            "/server_info": (200, {"vllm_config": config}),
            "/weight_info": (200, {"weight_version": "default"}),
            "/twinkle_callbacks": (401, {"error": "twinkle_callbacks: /twinkle_callbacks needs one header"}),
        }
        self.asked: list[tuple[str, str, bytes, str]] = []
        self.authorizations: list[str | None] = []
        self.hang = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.asked.append((self.command, self.path, body, self.headers[auth.SIGNATURE_HEADER]))
                outer.authorizations.append(self.headers["Authorization"])
                if self.path == "/hang":
                    outer.hang.wait(10)
                status, answer = outer.answers.get(self.path.split("?")[0], (200, {}))
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _answer

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.hang.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def rollout(server: Server) -> Iterator[HTTPRollout]:
    rollout = HTTPRollout(server.url + "/", token=TOKEN, timeout_s=5)
    yield rollout
    rollout.close()


def test_calls_are_vllms_routes_each_signed_over_what_it_asks(server: Server, rollout: HTTPRollout) -> None:
    server.answers |= {
        "/get_world_size": (200, {"world_size": 2}),
        "/reset_prefix_cache": (200, {"success": True}),
        "/weight_info": (200, {"weight_version": "4"}),
    }
    assert rollout.world_size() == 2
    rollout.join({"engine": "gloo"})
    rollout.start()
    rollout.update({"action": "receive", "push": 1})
    rollout.pause("keep", clear_cache=False)
    rollout.finish()
    rollout.set_version(4)
    rollout.reset_cache()
    rollout.resume()
    assert rollout.version() == "4"
    rollout.call({"action": "leave"})
    rollout.load_adapter("math", "twinkle:0011223344556677@4")
    rollout.unload_adapter("math")
    for method, target, body, signature in server.asked:
        if target == "/twinkle_callbacks":  # to see whether the server is guarded
            continue
        auth.check_request(TOKEN, signature, method, target, body)
    assert [target for _, target, _, _ in server.asked] == [
        "/get_world_size",
        "/weight_info",
        "/server_info?config_format=json",
        "/twinkle_callbacks",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/pause?mode=keep&clear_cache=false",
        "/finish_weight_update",
        "/update_weight_version",
        "/reset_prefix_cache?reset_running_requests=true",
        "/resume",
        "/weight_info",
        "/init_weight_transfer_engine",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    ]
    assert TOKEN not in str(server.asked)


@pytest.mark.parametrize(
    "text",
    [
        'Call to collective_rpc method failed: it\'s "so"',
        "Call to add_lora method failed: Worker failed with error 'it's \"so\"', please check the stack trace",
        "Worker failed with error 'it's \"so\"', please check the stack trace above for the root cause",
    ],
)
def test_a_workers_error_comes_without_what_vllm_puts_around_it(server: Server, text: str) -> None:
    server.answers["/init_weight_transfer_engine"] = (500, {"error": {"message": text}})
    rollout = HTTPRollout(server.url, token=TOKEN)
    with pytest.raises(RolloutError, match='answered 500: it\'s "so"$'):
        rollout.call({})
    rollout.close()


@pytest.mark.parametrize("text", ["Worker failed with error '', please check the stack trace above", "it broke"])
def test_an_error_that_vllm_says_nothing_of_comes_as_it_is(server: Server, text: str) -> None:
    server.answers["/init_weight_transfer_engine"] = (500, {"error": {"message": text}})
    rollout = HTTPRollout(server.url, token=TOKEN)
    with pytest.raises(RolloutError) as raised:
        rollout.call({})
    rollout.close()
    assert str(raised.value).endswith(f"answered 500: {text}")


def test_a_tenant_does_not_ask_for_the_configuration_which_is_closed_to_it(server: Server) -> None:
    rollout = HTTPRollout(server.url, token=auth.tenant_token(TOKEN, "math"))
    rollout.join({})
    rollout.close()
    assert [path for _, path, _, _ in server.asked] == ["/weight_info", "/init_weight_transfer_engine"]


NOT_CONFIGURED = (
    "Worker failed with error 'Weight transfer not configured. Please set weight_transfer_config to enable.'"
)
OTHER_BACKEND = "Invalid init_info for NCCLWeightTransferEngine: unexpected keyword argument 'request'"


@pytest.mark.parametrize(
    ("status", "answer", "error", "message"),
    [
        (404, {"detail": "Not Found"}, RolloutError, "RL routes are off.*VLLM_SERVER_DEV_MODE.*serve MODEL$"),
        (401, {"error": "twinkle_callbacks: signed with another token"}, AuthenticationError, "another token$"),
        (401, {"error": "Unauthorized"}, AuthenticationError, "started with --api-key: set VLLM_API_KEY"),
        (500, {"error": {"message": NOT_CONFIGURED}}, RolloutError, "backend 'twinkle'.*--weight-transfer-config"),
        (500, {"error": {"message": OTHER_BACKEND}}, RolloutError, "backend 'twinkle'.*--weight-transfer-config"),
        (500, {"error": {"message": OTHER_BACKEND}}, RolloutError, "or that of another version.*the trainer's version"),
        (500, {"error": {"message": "out of memory"}}, RolloutError, "answered 500: out of memory"),
        (503, "gone", RolloutError, "answered 503: gone"),
    ],
)
def test_refusals_name_the_server_and_what_to_change(
    server: Server, rollout: HTTPRollout, status: int, answer: object, error: type[Exception], message: str
) -> None:
    server.answers["/init_weight_transfer_engine"] = (status, answer)
    with pytest.raises(error, match=f"{server.url}.*{message}"):
        rollout.join({})


@pytest.mark.parametrize(
    "config", [{}, {"weight_transfer_config": None}, {"weight_transfer_config": {"backend": "ipc"}}]
)
def test_a_server_without_the_backend_is_never_asked_to_join(
    server: Server, rollout: HTTPRollout, config: dict[str, object]
) -> None:
    server.answers["/server_info"] = (200, {"vllm_config": config})
    with pytest.raises(RolloutError, match="backend 'twinkle'.*--weight-transfer-config"):
        rollout.join({})
    assert [target for _, target, _, _ in server.asked] == ["/weight_info", "/server_info?config_format=json"]


def test_a_server_too_old_for_versions_is_never_asked_to_join(server: Server, rollout: HTTPRollout) -> None:
    server.answers["/weight_info"] = (404, {"detail": "Not Found"})
    with pytest.raises(RolloutError, match="no route /weight_info.*too old"):
        rollout.join({})
    assert [target for _, target, _, _ in server.asked] == ["/weight_info"]


@pytest.mark.parametrize("answer", [b"<html>It works!</html>", {"hello": "world"}, [1], b"null"])
def test_another_web_server_is_a_clear_error(server: Server, rollout: HTTPRollout, answer: object) -> None:
    server.answers["/get_world_size"] = (200, answer)
    with pytest.raises(RolloutError, match=f"{server.url} is no vLLM server.*/get_world_size"):
        rollout.world_size()


def test_a_rollout_works_again_after_close(server: Server, rollout: HTTPRollout) -> None:
    server.answers["/get_world_size"] = (200, {"world_size": 2})
    for _ in range(2):
        assert rollout.world_size() == 2
        rollout.close()
        rollout.close()


def test_a_cache_that_was_not_dropped_is_an_error(server: Server, rollout: HTTPRollout) -> None:
    server.answers["/reset_prefix_cache"] = (200, {"success": False})
    with pytest.raises(RolloutError, match="stale_kv"):
        rollout.reset_cache()


def test_a_server_that_does_not_answer_meets_the_deadline(server: Server) -> None:
    rollout = HTTPRollout(server.url, token=TOKEN, timeout_s=0.2)
    with pytest.raises(DeadlineError, match=r"/hang within 0\.2 s"):
        rollout._call("GET", "/hang")
    rollout.close()


def test_a_synchronizers_deadline_goes_for_a_rollout_that_was_made_with_another(server: Server) -> None:
    rollout = HTTPRollout(server.url, token=TOKEN)
    assert rollout.version() == "default"  # over a connection that is there before
    assert open_rollout(rollout, token=TOKEN, timeout_s=0.2) is rollout
    with pytest.raises(DeadlineError, match=r"/hang within 0\.2 s"):
        rollout._call("GET", "/hang")
    rollout.close()


def test_vllms_own_key_is_sent_where_there_is_one(
    server: Server, rollout: HTTPRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout.version()
    monkeypatch.setenv("VLLM_API_KEY", "k" * 8)
    rollout.version()
    assert server.authorizations == [None, "Bearer kkkkkkkk"]


def test_a_server_that_obeys_everybody_is_warned_of(
    server: Server, rollout: HTTPRollout, caplog: pytest.LogCaptureFixture
) -> None:
    rollout.join({})
    assert not caplog.records
    server.answers["/twinkle_callbacks"] = (404, {"detail": "Not Found"})
    rollout.join({})
    assert "does what anybody who reaches it asks" in caplog.text


def test_a_server_without_adapters_is_to_be_started_with_them(server: Server, rollout: HTTPRollout) -> None:
    server.answers["/v1/load_lora_adapter"] = (404, {"detail": "Not Found"})
    with pytest.raises(RolloutError, match=r"serves no adapters.*serve MODEL --enable-lora$"):
        rollout.load_adapter("math", "folder")


def test_nobody_there_and_no_url() -> None:
    rollout = HTTPRollout("http://127.0.0.1:9", token=TOKEN)
    with pytest.raises(RolloutUnreachableError, match="nobody answers at http://127.0.0.1:9"):
        rollout.world_size()
    rollout.close()
    for url in ("localhost:8000", "http://", "http://[::1", "http://a:port", "ftp://a"):
        with pytest.raises(ConfigError, match="is not a URL"):
            HTTPRollout(url, token=TOKEN)
