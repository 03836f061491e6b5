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
workers for the signed message that `/init_weight_transfer_engine` brings them. That message must be of whoever signed
the request, and is good once too; or a tenant could send what it saw of another on its way. What is no such message is
refused here, before it reaches the workers: where all tensor-parallel ranks raise, their later replies are shifted.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict, defaultdict
from typing import NamedTuple

from twinkle_callbacks import auth
from twinkle_callbacks.config import BACKEND
from twinkle_callbacks.errors import AuthenticationError
from twinkle_callbacks.worker.asgi import (
    MAX_BODY_BYTES,
    ASGIApp,
    Message,
    Receive,
    RefusedError,
    Scope,
    Send,
    answer,
    header,
    read_body,
    route_path,
)

logger = logging.getLogger(__name__)

MAX_NONCES = 100_000  # of each signer, or one could lock out the others
MAX_NONCE_CHARS = 2 * auth.NONCE_BYTES
NONCE_LIFETIME_S = 2 * auth.MAX_CLOCK_SKEW_S  # the clock that signed may be ahead of this one

_SAME_VERSION = "install the same version of twinkle_callbacks beside the trainer and beside vLLM"

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
MESSAGE_PATH = "/init_weight_transfer_engine"
TENANT_PATHS = frozenset({MESSAGE_PATH, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
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
        self._used: defaultdict[str, _Nonces] = defaultdict(_Nonces)  # by the tenant, empty for the server's token

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
            scope[TENANT_SCOPE] = self._admitted(scope, signatures[0], body)
        except RefusedError as error:
            logger.warning("refused %s %r: %s", scope["method"], scope["path"], error)
            await answer(send, error.status, str(error))
            return
        await self._app(scope, _replay(body, receive), send)

    def _admitted(self, scope: Scope, signature: str, body: bytes) -> str:
        """The tenant that signed the request, empty for the server's token."""
        try:
            signed = auth.check_request(self._token, signature, scope["method"], _target(scope), body)
        except AuthenticationError as error:
            raise RefusedError(401, str(error)) from None
        self._used[signed.tenant].use(signed.nonce)
        if signed.tenant and route_path(scope) not in TENANT_PATHS:
            raise RefusedError(403, f"tenant {signed.tenant!r} may sync, attach and detach its adapters, nothing else")
        if route_path(scope) == MESSAGE_PATH and scope["method"] == "POST":
            self._check_message(scope, signed.tenant, body)
        return signed.tenant

    def _check_message(self, scope: Scope, tenant: str, body: bytes) -> None:
        if not _runs_our_backend(scope):
            if tenant:
                raise RefusedError(400, f"this server does not run the weight-transfer backend {BACKEND!r}")
            return  # a message of another kind, which that backend reads
        message = _message_in(body)
        if message.tenant != tenant:
            raise RefusedError(
                403,
                f"the message in the body is signed by {_named(message.tenant)}, the request by {_named(tenant)}; "
                f"sign both with the same token",
            )
        self._used[tenant].use(message.nonce)


class _Nonces:
    """What one signer used up."""

    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()  # nonce -> when it may be forgotten, oldest first

    def use(self, nonce: str) -> None:
        """Remembers a nonce, or refuses it."""
        now = time.monotonic()
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        if not 0 < len(nonce) <= MAX_NONCE_CHARS:
            raise RefusedError(401, f"a nonce has 1 to {MAX_NONCE_CHARS} characters, this one {len(nonce)}")
        if nonce in self._until:
            raise RefusedError(401, "this signature was used before; sign each request and each message anew")
        if len(self._until) >= MAX_NONCES:
            raise RefusedError(401, f"{MAX_NONCES} signed requests within {NONCE_LIFETIME_S:.0f} s; send fewer")
        self._until[nonce] = now + NONCE_LIFETIME_S


class _Message(NamedTuple):
    """Of a signed message what the guard looks at; its MAC covers both, and is for the workers to check."""

    tenant: str
    nonce: str


def _message_in(body: bytes) -> _Message:
    try:
        info = json.loads(body)["init_info"]  # as vLLM's route reads it, so of a key that is there twice, the last
        [(kind, values)] = info.items()
        message = _Message(values.get("tenant", ""), values["nonce"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RefusedError(400, f"init_info holds no one signed message ({error!r}); {_SAME_VERSION}") from None
    if kind not in ("request", "call") or not all(isinstance(text, str) for text in message):
        raise RefusedError(400, f"init_info holds no signed request or call, but {kind[:64]!r}; {_SAME_VERSION}")
    return message


def _runs_our_backend(scope: Scope) -> bool:
    client = getattr(scope["app"].state, "engine_client", None)  # None on a server without an engine
    config = None if client is None else client.vllm_config.weight_transfer_config
    return config is not None and config.backend == BACKEND


def _named(tenant: str) -> str:
    return f"tenant {tenant[:64]!r}" if tenant else "the holder of the server's token"


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
