"""ASGI middleware that makes vLLM's runtime LoRA routes safe while requests are under way.

Runs in vLLM's API server, inside the `RouteGuard`; `twinkle-callbacks serve` adds it with
`--middleware twinkle_callbacks.worker.adapter_routes.AdapterRoutes`. It answers in place of `/v1/load_lora_adapter` and
`/v1/unload_lora_adapter`, with their bodies. vLLM's own (0.32) replace an adapter under requests that are half done,
share cached prefixes between what was and what is at a path, and read its files again at any later time, which kills
the engine when they are gone. Here each load is a version of its own: requests under way end on the version they began
with, later ones get the new one, and a version is forgotten when its last request has ended.

A tenant attaches files only from below the folders that the server's owner allowed; the holder of the server's token
any.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from twinkle_callbacks import auth
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.adapter_versions import new_version
from twinkle_callbacks.config import ADAPTER_NAME_PATTERN, MAX_ADAPTER_NAME_CHARS
from twinkle_callbacks.errors import text_of
from twinkle_callbacks.worker.asgi import ASGIApp, Receive, RefusedError, Scope, Send, answer, read_body, route_path
from twinkle_callbacks.worker.guard import TENANT_SCOPE

logger = logging.getLogger(__name__)

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
FORGET_AFTER_S = 0.5  # vLLM tells its engine of requests that ended early a moment after it drops them
FORGET_TIMEOUT_S = 30.0
# vLLM leaves the output of a request in a reference cycle, and with it the version, until Python collects it. So many
# versions may wait for that; an adapter's tensors are small, and a collection takes a moment in which nobody is served.
MAX_WAITING = 4


# What vLLM puts in front of the error of a worker, with nothing after it: that error had no text.
_WITHOUT_TEXT = re.compile(r"(method failed: |Worker failed with error '(None)?', please check .*)$", re.DOTALL)


class _Request(NamedTuple):
    name: str
    tenant: str
    path: str = ""
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class AdapterRoutes:
    """Wraps vLLM's application.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # Versions that vLLM was not told to forget yet, by their id. The result: why that failed, empty if it did not.
        self._unforgotten: dict[int, asyncio.Future[str]] = {}
        self._loading: set[str] = set()  # names that get a slot at this moment
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope) if scope["type"] == "http" and scope["method"] == "POST" else ""
        if path not in (LOAD, UNLOAD):
            await self._app(scope, receive, send)
            return
        try:
            request = _parse(await read_body(scope, receive), scope.get(TENANT_SCOPE, ""))
            if not auth.may_touch(request.tenant, request.name):
                raise RefusedError(
                    HTTPStatus.FORBIDDEN, f"adapter {request.name!r} is not one of tenant {request.tenant!r}"
                )
            state = scope["app"].state
            _refuse_server(state)
            done = await (self._load if path == LOAD else self._unload)(state, request)
        except RefusedError as error:
            logger.warning("refused %s: %s", path, str(error))  # a log that kept the error would keep its version
            await answer(send, error.status, str(error))
        else:
            await answer(send, HTTPStatus.OK, done)

    async def _load(self, state: Any, request: _Request) -> str:
        models, client = state.openai_serving_models, state.engine_client
        _refuse_name(models, request.name)
        path = _path_of(request)
        async with models.lora_resolver_lock[request.name]:  # vLLM's own routes and resolvers take it too
            known = models.lora_requests
            if request.name in known and not request.load_inplace:
                raise RefusedError(
                    HTTPStatus.BAD_REQUEST, f"adapter {request.name!r} is loaded; set load_inplace to replace it"
                )
            _refuse_full(client.vllm_config.lora_config.max_loras, known.keys() | self._loading, request.name)
            self._loading.add(request.name)
            try:
                version = self._new_version(models, client, request, path)
                await _add(client, version)
                known[request.name] = version
            finally:
                self._loading.discard(request.name)
            if len(self._unforgotten) > len(known) + MAX_WAITING:
                asyncio.get_running_loop().call_soon(gc.collect)
        return f"adapter {request.name!r} is {path}"

    def _new_version(self, models: Any, client: Any, request: _Request, path: AdapterPath) -> Any:
        loop = asyncio.get_running_loop()

        def forget(lora_id: int) -> None:
            with contextlib.suppress(RuntimeError):  # the server ends, and everything with it
                loop.call_soon_threadsafe(self._start_forgetting, client, lora_id)

        lora_id = models.lora_id_counter.inc(1)
        self._unforgotten[lora_id] = loop.create_future()
        more = {"is_3d_lora_weight": True} if request.is_3d_lora_weight else {}
        return new_version(request.name, lora_id, str(path), forget, **more)

    def _start_forgetting(self, client: Any, lora_id: int) -> None:
        task = asyncio.get_running_loop().create_task(self._forget(client, lora_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget(self, client: Any, lora_id: int) -> None:
        await asyncio.sleep(FORGET_AFTER_S)
        failure = ""
        try:
            await client.remove_lora(lora_id)
        except Exception as error:  # such as an engine that ended; whoever detached it is told
            failure = text_of(error)
            logger.warning("version %d of an adapter was not forgotten: %s", lora_id, failure)
        self._unforgotten.pop(lora_id).set_result(failure)

    async def _unload(self, state: Any, request: _Request) -> str:
        models, client = state.openai_serving_models, state.engine_client
        async with models.lora_resolver_lock[request.name]:
            known = models.lora_requests
            if request.name not in known:
                raise RefusedError(HTTPStatus.NOT_FOUND, f"there is no adapter {request.name!r}; {_listed(known)}")
            under_way = _requests_of(client, request.name)
            if under_way:
                raise RefusedError(
                    HTTPStatus.CONFLICT,
                    f"adapter {request.name!r} is in use by {under_way} requests; wait for them, then detach it",
                )
            lora_id = known.pop(request.name).lora_int_id
            forgotten = self._unforgotten.get(lora_id)
            if forgotten is None:  # loaded when the server started
                forgotten = self._unforgotten[lora_id] = asyncio.get_running_loop().create_future()
                self._start_forgetting(client, lora_id)
            gc.collect()
            await asyncio.wait([forgotten], timeout=FORGET_TIMEOUT_S)
        if not forgotten.done():  # a request came in between, and ends first
            return (
                f"adapter {request.name!r} is detached for requests to come; its version is forgotten when those that "
                f"hold it have ended, which took longer than {FORGET_TIMEOUT_S:g} s"
            )
        if failure := forgotten.result():
            raise RefusedError(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                f"adapter {request.name!r} is detached, but its version stays in the engine's memory: {failure}",
            )
        return f"adapter {request.name!r} is detached"


def _parse(body: bytes | None, tenant: str) -> _Request:
    try:
        values = json.loads(body or b"")
        request = _Request(
            values["lora_name"],
            tenant,
            values.get("lora_path", ""),
            bool(values.get("load_inplace", False)),
            bool(values.get("is_3d_lora_weight", False)),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RefusedError(
            HTTPStatus.BAD_REQUEST, f"not a JSON object with lora_name and lora_path: {error!r}"
        ) from None
    if not all(isinstance(text, str) for text in (request.name, request.path)) or not request.name:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "lora_name and lora_path are strings, and lora_name is not empty")
    return request


def _refuse_server(state: Any) -> None:
    if state.engine_client.vllm_config.lora_config is None:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "this server runs without LoRA; start it with --enable-lora")
    count = getattr(state.args, "api_server_count", None) or 1
    if count > 1:
        raise RefusedError(
            HTTPStatus.BAD_REQUEST,
            f"this server has {count} API server processes, of which one would know the adapter; start it with "
            f"--api-server-count 1",
        )


def _refuse_name(models: Any, name: str) -> None:
    if len(name) > MAX_ADAPTER_NAME_CHARS or not re.fullmatch(ADAPTER_NAME_PATTERN, name):
        raise RefusedError(
            HTTPStatus.BAD_REQUEST,
            f"lora_name {name[:MAX_ADAPTER_NAME_CHARS]!r} has blanks or more than {MAX_ADAPTER_NAME_CHARS} characters",
        )
    if models.is_base_model(name):
        raise RefusedError(
            HTTPStatus.BAD_REQUEST, f"{name!r} is the name of the base model; choose another adapter_name"
        )


def _refuse_full(max_loras: int, taken: Collection[str], name: str) -> None:
    if name not in taken and len(taken) >= max_loras:
        raise RefusedError(
            HTTPStatus.CONFLICT,
            f"all {max_loras} adapter slots are taken (by {', '.join(sorted(taken))}); start the server with "
            f"--max-loras {len(taken) + 1}, or detach one",
        )


async def _add(client: Any, version: Any) -> None:
    try:
        await client.add_lora(version)
    except Exception as error:  # vLLM's engine passes on whatever its loader raised
        status = HTTPStatus.SERVICE_UNAVAILABLE if client.errored else HTTPStatus.BAD_REQUEST
        text = text_of(error)
        if _WITHOUT_TEXT.search(text):
            text += " (an error without a text; the server's log has its type)"
        raise RefusedError(status, f"adapter {version.lora_name!r}: {text}") from error


def _path_of(request: _Request) -> AdapterPath:
    """The path of the version to load. A folder is stamped here, or two states of it could share a stamp."""
    path = AdapterPath.parse(request.path)
    if path is None:
        folder = request.path
    elif path.folder is None:
        return path
    else:
        folder = path.folder
    if not folder:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"adapter {request.name!r}: lora_path is missing")
    if not folder.startswith("/"):  # vLLM would look for it on a hub, in the middle of serving
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"lora_path {folder!r} is no absolute path on this server")
    if request.tenant:
        folder = _allowed(request.tenant, folder)
    return AdapterPath.attached(folder)


def _allowed(tenant: str, folder: str) -> str:
    """The real path of a folder that a tenant may attach. Links, also those in it, count as what they lead to."""
    allowed = auth.tenant_folders()
    try:
        roots = [os.path.realpath(root) for root in allowed]
        real = os.path.realpath(folder)
        if not _is_below(real, roots) or not all(_is_below(os.path.realpath(file), roots) for file in _listing(real)):
            raise RefusedError(
                HTTPStatus.FORBIDDEN,
                f"tenant {tenant!r} may attach folders below {', '.join(allowed) or 'no folder'} of this server, not "
                f"{folder!r}; its owner allows more with: twinkle-callbacks serve MODEL --tenant-folder DIR",
            )
    except (OSError, ValueError) as error:  # such as a path with a null character
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"lora_path {folder!r} cannot be read: {error}") from None
    return real


def _listing(folder: str) -> list[Path]:
    return list(Path(folder).iterdir())


def _is_below(path: str, roots: list[str]) -> bool:
    return any(Path(path).is_relative_to(root) for root in roots)


def _requests_of(client: Any, name: str) -> int:
    states = client.output_processor.request_states.values()
    return sum(state.lora_name == name for state in states)


def _listed(known: Any) -> str:
    return f"those that exist are {', '.join(sorted(known))}" if known else "there are none"
