"""ASGI middleware that lets only holders of the token reach vLLM's control routes.

Runs in vLLM's API server, where `twinkle-callbacks serve` adds it with
`--middleware twinkle_callbacks.worker.guard.RouteGuard`.
vLLM's own `--api-key` does not cover routes such as `/pause`, `/update_weights` or `/collective_rpc`.

Routes for inference and for looking stay open, as they are without the guard. Every other path, one that a later vLLM
adds included, needs a signature over method, path, query and body in the header `x-twinkle-signature`
(`auth.sign_request`). A signature is good once, and for `auth.MAX_CLOCK_SKEW_S` seconds to either side of the server's
clock. What was used is remembered in this process only: with several API server processes (`--api-server-count`), a
listener on an unencrypted network could replay a request once to each of the others.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from twinkle_callbacks import auth
from twinkle_callbacks.errors import AuthenticationError

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 64 << 20
MAX_NONCES = 100_000
NONCE_LIFETIME_S = 2 * auth.MAX_CLOCK_SKEW_S  # the clock that signed may be ahead of this one

# Listed one by one: /v1/load_lora_adapter and /inference/v1/abort_requests show that a prefix says nothing.
OPEN_PATHS = frozenset(
    {
        # looking
        *("/health", "/ready", "/readyz", "/ping", "/version", "/load", "/metrics", "/metrics/", "/tokenizer_info"),
        *("/weight_info", "/is_paused", "/is_sleeping", "/get_world_size"),
        *("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
        # inference
        *("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"),
        *("/v1/messages", "/v1/messages/count_tokens", "/v1/systemone", "/cohere/v2/chat", "/cohere/v2/chat/render"),
        *("/v1/completions/render", "/v1/chat/completions/render", "/v1/responses/render", "/v1/messages/render"),
        *("/v1/completions/derender", "/v1/chat/completions/derender"),
        *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"),
        *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/generative_scoring"),
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
        *("/inference/v1/generate", "/invocations", "/tokenize", "/detokenize"),
    }
)
OPEN_PREFIXES = ("/v1/responses/", "/static/")  # by id of a response; style sheets of the offline documentation


class RouteGuard:
    """Wraps an ASGI application; answers 401 instead of passing on an unsigned request for a guarded path.

    Args:
        app: the application to guard.

    Raises:
        AuthenticationError: this process has no usable token, so the server does not start.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._token = auth.load_token()
        self._used: OrderedDict[str, float] = OrderedDict()  # nonce -> when it may be forgotten, oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or is_open(_route_path(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "this route is guarded"})
        else:
            await self._guarded(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        signatures = _header(scope, auth.SIGNATURE_HEADER)
        if len(signatures) != 1:
            await _answer(send, 401, f"{scope['path']} needs one {auth.SIGNATURE_HEADER} header, made with the token")
            return
        body = await _read_body(scope, receive)
        if body is None:
            await _answer(send, 413, f"the body is larger than {MAX_BODY_BYTES} bytes or was cut off")
            return
        try:
            used = auth.check_request(self._token, signatures[0], scope["method"], _target(scope), body)
            self._use(used)
        except AuthenticationError as error:
            logger.warning("refused %s %r: %s", scope["method"], scope["path"], error)
            await _answer(send, 401, str(error))
            return
        await self._app(scope, _replay(body, receive), send)

    def _use(self, nonce: str) -> None:
        now = time.monotonic()
        while self._used and next(iter(self._used.values())) <= now:
            self._used.popitem(last=False)
        if nonce in self._used:
            raise AuthenticationError("this signature was used before; sign each request anew")
        if len(self._used) >= MAX_NONCES:
            raise AuthenticationError(f"{MAX_NONCES} signed requests within {NONCE_LIFETIME_S:.0f} s; send fewer")
        self._used[nonce] = now + NONCE_LIFETIME_S


def is_open(path: str) -> bool:
    """Whether a path, as the router sees it, is served without a signature."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def _route_path(scope: Scope) -> str:
    """The path that routing decides by: without the `--root-path` that a proxy may have left in front."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _target(scope: Scope) -> str:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return (path + b"?" + query if query else path).decode("latin-1")


def _header(scope: Scope, name: str) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name.encode()]


async def _read_body(scope: Scope, receive: Receive) -> bytes | None:
    declared = _header(scope, "content-length")
    if declared and not (declared[0].isdecimal() and int(declared[0]) <= MAX_BODY_BYTES):
        return None
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body that was read, then whatever comes after it, such as a disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


async def _answer(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": f"twinkle_callbacks: {message}"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
