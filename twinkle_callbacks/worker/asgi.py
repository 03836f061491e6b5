"""The little of ASGI that the middlewares in vLLM's API server share."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 64 << 20


class RefusedError(Exception):
    """The answer to a request that cannot be done: its status and its text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def route_path(scope: Scope) -> str:
    """The path that routing decides by: without the `--root-path` that a proxy may have left in front."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path


def header(scope: Scope, name: str) -> list[str]:
    """All values of a header."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name.encode()]


async def read_body(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body; None if it is larger than `MAX_BODY_BYTES` or was cut off."""
    declared = header(scope, "content-length")
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


async def answer(send: Send, status: int, message: str) -> None:
    """Answers with JSON: an `error` unless the status is 200, else a `message`."""
    key = "message" if status == 200 else "error"
    body = json.dumps({key: f"twinkle_callbacks: {message}"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
