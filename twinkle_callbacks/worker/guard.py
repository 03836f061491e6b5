"""ASGI middleware that lets only holders of the token reach vLLM's control routes.

Runs in vLLM's API server, where `twinkle-callbacks serve` adds it with
`--middleware twinkle_callbacks.worker.guard.RouteGuard`.
vLLM's own `--api-key` does not cover routes such as `/pause`, `/update_weights` or `/collective_rpc`.

Routes for inference and for looking stay open, as they are without the guard. Every other path, one that a later vLLM
adds included, needs a signature over method, path, query and body in the header `x-twinkle-signature`
(`auth.sign_request`). A signature is good once, and for `auth.MAX_CLOCK_SKEW_S` seconds to either side of the server's
clock. What was used is remembered in this process only: with several API server processes (`--api-server-count`), a
listener on an unencrypted network could replay a request once to each of the others.

A tenant's signature opens only the routes for its adapters, which check whose adapter it is: `AdapterRoutes`, and the
workers for what `init_weight_transfer_engine` brings them.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

from twinkle_callbacks import auth
from twinkle_callbacks.errors import AuthenticationError
from twinkle_callbacks.worker.asgi import (
    MAX_BODY_BYTES,
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    answer,
    header,
    read_body,
    route_path,
)

logger = logging.getLogger(__name__)

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
TENANT_SCOPE = "twinkle_callbacks.tenant"  # where the guard leaves the tenant's name, empty for the server's token
TENANT_PATHS = frozenset({"/init_weight_transfer_engine", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
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
        if tenant := auth.tenant_of(self._token):
            raise AuthenticationError(
                f"a server needs a token of its own; {auth.TOKEN_ENV} is that of tenant {tenant!r}"
            )
        self._used: OrderedDict[str, float] = OrderedDict()  # nonce -> when it may be forgotten, oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or is_open(route_path(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "this route is guarded"})
        else:
            await self._guarded(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        signatures = header(scope, auth.SIGNATURE_HEADER)
        if len(signatures) != 1:
            await answer(send, 401, f"{scope['path']} needs one {auth.SIGNATURE_HEADER} header, made with the token")
            return
        body = await read_body(scope, receive)
        if body is None:
            await answer(send, 413, f"the body is larger than {MAX_BODY_BYTES} bytes or was cut off")
            return
        try:
            signed = auth.check_request(self._token, signatures[0], scope["method"], _target(scope), body)
            self._use(signed.nonce)
        except AuthenticationError as error:
            logger.warning("refused %s %r: %s", scope["method"], scope["path"], error)
            await answer(send, 401, str(error))
            return
        if signed.tenant and route_path(scope) not in TENANT_PATHS:
            await answer(send, 403, f"tenant {signed.tenant!r} may sync, attach and detach its adapters, nothing else")
            return
        scope[TENANT_SCOPE] = signed.tenant
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


def _target(scope: Scope) -> str:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return (path + b"?" + query if query else path).decode("latin-1")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body that was read, then whatever comes after it, such as a disconnect."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
