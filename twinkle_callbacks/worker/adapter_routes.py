"""ASGI middleware that makes vLLM's runtime LoRA routes safe while requests are under way.

Runs in vLLM's API server, inside the `RouteGuard`; `twinkle-callbacks serve` adds it with
`--middleware twinkle_callbacks.worker.adapter_routes.AdapterRoutes`. It answers in place of `/v1/load_lora_adapter` and
`/v1/unload_lora_adapter`, with their bodies. vLLM's own (0.32) replace an adapter under requests that are half done,
share cached prefixes between what was and what is at a path, and read its files again at any later time, which kills
the engine when they are gone. Here each load is a version of its own: requests under way end on the version they began
with, later ones get the new one, and a version is forgotten when its last request has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
from http import HTTPStatus
from typing import Any, NamedTuple

from twinkle_callbacks import auth
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.adapter_versions import new_version
from twinkle_callbacks.worker.asgi import ASGIApp, Receive, Scope, Send, answer, read_body, route_path
from twinkle_callbacks.worker.guard import TENANT_SCOPE

logger = logging.getLogger(__name__)

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
FORGET_AFTER_S = 0.5  # vLLM tells its engine of requests that ended early a moment after it drops them
FORGET_TIMEOUT_S = 30.0
# vLLM leaves the output of a request in a reference cycle, and with it the version, until Python collects it. So many
# versions may wait for that; an adapter's tensors are small, and a collection takes a moment in which nobody is served.
MAX_WAITING = 4


class _RefusedError(Exception):
    """The answer to a request that cannot be done."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Request(NamedTuple):
    name: str
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
        self._forgotten: dict[int, asyncio.Event] = {}  # of the versions made here, by their id
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope) if scope["type"] == "http" and scope["method"] == "POST" else ""
        if path not in (LOAD, UNLOAD):
            await self._app(scope, receive, send)
            return
        try:
            request = _parse(await read_body(scope, receive))
            if not auth.may_touch(scope.get(TENANT_SCOPE, ""), request.name):
                raise _RefusedError(
                    HTTPStatus.FORBIDDEN, f"adapter {request.name!r} is not one of tenant {scope[TENANT_SCOPE]!r}"
                )
            state = scope["app"].state
            _refuse_server(state)
            done = await (self._load if path == LOAD else self._unload)(state, request)
        except _RefusedError as error:
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
            max_loras = client.vllm_config.lora_config.max_loras
            if request.name in known and not request.load_inplace:
                raise _RefusedError(
                    HTTPStatus.BAD_REQUEST, f"adapter {request.name!r} is loaded; set load_inplace to replace it"
                )
            if request.name not in known and len(known) >= max_loras:
                raise _RefusedError(
                    HTTPStatus.CONFLICT,
                    f"all {max_loras} adapter slots are taken (by {', '.join(sorted(known))}); start the server with "
                    f"--max-loras {len(known) + 1}, or detach one",
                )
            version = self._new_version(models, client, request, path)
            try:
                await client.add_lora(version)
            except Exception as error:  # vLLM's engine passes on whatever its loader raised
                raise _RefusedError(HTTPStatus.BAD_REQUEST, f"adapter {request.name!r}: {error}") from error
            known[request.name] = version
            if len(self._forgotten) > len(known) + MAX_WAITING:
                asyncio.get_running_loop().call_soon(gc.collect)
        return f"adapter {request.name!r} is {path}"

    def _new_version(self, models: Any, client: Any, request: _Request, path: AdapterPath) -> Any:
        loop = asyncio.get_running_loop()

        def forget(lora_id: int) -> None:
            with contextlib.suppress(RuntimeError):  # the server ends, and everything with it
                loop.call_soon_threadsafe(self._start_forgetting, client, lora_id)

        lora_id = models.lora_id_counter.inc(1)
        self._forgotten[lora_id] = asyncio.Event()
        more = {"is_3d_lora_weight": True} if request.is_3d_lora_weight else {}
        return new_version(request.name, lora_id, str(path), forget, **more)

    def _start_forgetting(self, client: Any, lora_id: int) -> None:
        task = asyncio.get_running_loop().create_task(self._forget(client, lora_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget(self, client: Any, lora_id: int) -> None:
        await asyncio.sleep(FORGET_AFTER_S)
        try:
            await client.remove_lora(lora_id)
        except Exception as error:  # such as an engine that ended; there is nobody to tell
            logger.warning("version %d of an adapter was not forgotten: %s", lora_id, error)
        if (forgotten := self._forgotten.pop(lora_id, None)) is not None:
            forgotten.set()

    async def _unload(self, state: Any, request: _Request) -> str:
        models, client = state.openai_serving_models, state.engine_client
        async with models.lora_resolver_lock[request.name]:
            known = models.lora_requests
            if request.name not in known:
                raise _RefusedError(HTTPStatus.NOT_FOUND, f"there is no adapter {request.name!r}; {_listed(known)}")
            under_way = _requests_of(client, request.name)
            if under_way:
                raise _RefusedError(
                    HTTPStatus.CONFLICT,
                    f"adapter {request.name!r} is in use by {under_way} requests; wait for them, then detach it",
                )
            lora_id = known.pop(request.name).lora_int_id
            forgotten = self._forgotten.get(lora_id)
            if forgotten is None:  # loaded when the server started
                self._start_forgetting(client, lora_id)
            else:
                gc.collect()
                with contextlib.suppress(asyncio.TimeoutError):  # a request came in between; it ends first
                    await asyncio.wait_for(forgotten.wait(), FORGET_TIMEOUT_S)
        return f"adapter {request.name!r} is detached"


def _parse(body: bytes | None) -> _Request:
    try:
        values = json.loads(body or b"")
        request = _Request(
            values["lora_name"],
            values.get("lora_path", ""),
            bool(values.get("load_inplace", False)),
            bool(values.get("is_3d_lora_weight", False)),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _RefusedError(
            HTTPStatus.BAD_REQUEST, f"not a JSON object with lora_name and lora_path: {error!r}"
        ) from None
    if not all(isinstance(text, str) for text in (request.name, request.path)) or not request.name:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "lora_name and lora_path are strings, and lora_name is not empty")
    return request


def _refuse_server(state: Any) -> None:
    if state.engine_client.vllm_config.lora_config is None:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "this server runs without LoRA; start it with --enable-lora")
    count = getattr(state.args, "api_server_count", None) or 1
    if count > 1:
        raise _RefusedError(
            HTTPStatus.BAD_REQUEST,
            f"this server has {count} API server processes, of which one would know the adapter; start it with "
            f"--api-server-count 1",
        )


def _refuse_name(models: Any, name: str) -> None:
    if models.is_base_model(name):
        raise _RefusedError(
            HTTPStatus.BAD_REQUEST, f"{name!r} is the name of the base model; choose another adapter_name"
        )


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
        raise _RefusedError(HTTPStatus.BAD_REQUEST, f"adapter {request.name!r}: lora_path is missing")
    if not folder.startswith("/"):  # vLLM would look for it on a hub, in the middle of serving
        raise _RefusedError(HTTPStatus.BAD_REQUEST, f"lora_path {folder!r} is no absolute path on this server")
    return AdapterPath.attached(folder)


def _requests_of(client: Any, name: str) -> int:
    states = client.output_processor.request_states.values()
    return sum(state.lora_name == name for state in states)


def _listed(known: Any) -> str:
    return f"those that exist are {', '.join(sorted(known))}" if known else "there are none"
