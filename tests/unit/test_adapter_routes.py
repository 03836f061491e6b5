"""vLLM's LoRA routes as `AdapterRoutes` answers them, over a stand-in of vLLM's state; tests/vllm has the real one."""

from __future__ import annotations

import asyncio
import gc
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from twinkle_callbacks import adapter_versions, auth
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.worker import adapter_routes
from twinkle_callbacks.worker.adapter_routes import AdapterRoutes
from twinkle_callbacks.worker.guard import TENANT_SCOPE

LOAD, UNLOAD = adapter_routes.LOAD, adapter_routes.UNLOAD


class Version:
    """In place of vLLM's LoRARequest."""

    def __init__(self, *, lora_name: str, lora_int_id: int, lora_path: str, is_3d_lora_weight: bool = False) -> None:
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path
        self.is_3d_lora_weight = is_3d_lora_weight


class Server:
    """What vLLM's application keeps, as far as the routes look at it, and the routes around it."""

    def __init__(self, max_loras: int = 2) -> None:
        self.known: dict[str, Any] = {}
        self.added: list[int] = []
        self.removed: list[int] = []
        self.fail: Exception | None = None
        self.fail_to_remove: Exception | None = None
        self.may_add = asyncio.Event()
        self.may_add.set()
        self.requests: dict[str, Any] = {}
        ids = iter(range(1, 100))
        self.models = SimpleNamespace(
            lora_requests=self.known,
            lora_id_counter=SimpleNamespace(inc=lambda _: next(ids)),
            lora_resolver_lock=defaultdict(asyncio.Lock),
            is_base_model=lambda name: name == "base",
        )
        config = SimpleNamespace(lora_config=SimpleNamespace(max_loras=max_loras))
        client = SimpleNamespace(
            vllm_config=config,
            add_lora=self._add,
            remove_lora=self._remove,
            errored=False,
            output_processor=SimpleNamespace(request_states=self.requests),
        )
        args = SimpleNamespace(api_server_count=1)
        self.state = SimpleNamespace(openai_serving_models=self.models, engine_client=client, args=args)
        self.routes = AdapterRoutes(self._app)
        self.tenant = ""

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"vllm's own"})

    async def _add(self, version: Any) -> bool:
        await self.may_add.wait()
        if self.fail is not None:
            raise self.fail
        self.added.append(version.lora_int_id)
        return True

    async def _remove(self, lora_id: int) -> bool:
        if self.fail_to_remove is not None:
            raise self.fail_to_remove
        self.removed.append(lora_id)
        return True

    async def post(self, path: str, body: Any) -> httpx.Response:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope["app"], scope[TENANT_SCOPE] = SimpleNamespace(state=self.state), self.tenant
            await self.routes(scope, receive, send)

        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
            return await client.post(path, content=content)

    async def load(self, name: str, path: str, **more: Any) -> httpx.Response:
        return await self.post(LOAD, {"lora_name": name, "lora_path": path, "load_inplace": True, **more})

    async def settled(self, removed: list[int]) -> None:
        async with asyncio.timeout(10):
            while self.removed != removed:
                gc.collect()  # tracebacks and coroutines hold frames in cycles
                await asyncio.sleep(0)


@pytest.fixture(scope="module", autouse=True)
def collecting_is_cheap() -> Iterator[None]:
    """What is there already, such as all of vLLM's modules, is not looked through again and again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(adapter_versions, "_version_class", lambda: Version)
    monkeypatch.setattr(adapter_routes, "FORGET_AFTER_S", 0.0)
    return Server()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_each_load_is_a_version_of_its_own_and_the_one_before_is_forgotten(server: Server) -> None:
    async def scenario() -> None:
        for folder in ("/a", "/a", "/b"):
            assert (await server.load("math", folder)).status_code == 200
        await server.settled([1, 2])
        assert server.added == [1, 2, 3]
        path = AdapterPath.parse(server.known["math"].lora_path)
        assert path is not None
        assert path.folder == "/b"

    run(scenario)


def test_a_folder_that_comes_with_a_stamp_gets_one_of_the_servers_own(server: Server) -> None:
    async def scenario() -> None:
        given = str(AdapterPath.attached("/a"))
        for _ in range(2):
            assert (await server.load("math", given)).status_code == 200
            assert server.known["math"].lora_path != given
            path = AdapterPath.parse(server.known["math"].lora_path)
            assert path is not None
            assert path.folder == "/a"

    run(scenario)


def test_a_version_that_requests_still_hold_is_forgotten_after_the_last_of_them(server: Server) -> None:
    async def scenario() -> None:
        sent = str(AdapterPath.sent(1))
        await server.load("math", sent)
        held = server.known["math"]
        assert held.lora_path == sent
        await server.load("math", str(AdapterPath.sent(2)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert server.removed == []
        del held
        await server.settled([1])

    run(scenario)


def test_a_version_that_vllm_refuses_leaves_the_one_before(server: Server) -> None:
    async def scenario() -> None:
        await server.load("math", "/a")
        server.fail = RuntimeError("no such rank")
        response = await server.load("math", "/b")
        assert response.status_code == 400
        assert "adapter 'math': no such rank" in response.json()["error"]
        assert server.known["math"].lora_int_id == 1
        server.fail = None  # which holds the frames it was raised through
        await server.settled([2])

    run(scenario)


def test_a_dead_engine_is_not_the_adapters_fault(server: Server) -> None:
    async def scenario() -> None:
        server.fail, server.state.engine_client.errored = RuntimeError("EngineCore encountered an issue"), True
        response = await server.load("math", "/a")
        assert response.status_code == 503
        assert "EngineCore encountered an issue" in response.json()["error"]

    run(scenario)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (AssertionError(), "adapter 'math': AssertionError()"),
        (Exception("Call to add_lora method failed: "), "failed:  (an error without a text"),
        (Exception("Worker failed with error '', please check the stack trace"), "(an error without a text"),
        (Exception("Worker failed with error 'rank 16', please check the stack trace"), "check the stack trace"),
    ],
)
def test_an_error_without_a_text_is_told_as_one(server: Server, error: Exception, says: str) -> None:
    async def scenario() -> None:
        server.fail = error
        text = (await server.load("math", "/a")).json()["error"]
        assert says in text
        assert ("without a text" in text) == ("without a text" in says)

    run(scenario)


def test_loads_at_the_same_time_do_not_take_more_slots_than_there_are(server: Server) -> None:
    async def scenario() -> None:
        server.may_add.clear()
        loads = [asyncio.create_task(server.load(name, "/a")) for name in ("one", "two", "three", "four")]
        async with asyncio.timeout(10):
            while sum(load.done() for load in loads) < 2:
                await asyncio.sleep(0)
        server.may_add.set()
        assert sorted([(await load).status_code for load in loads]) == [200, 200, 409, 409]
        assert len(server.known) == 2

    run(scenario)


def test_a_load_that_fails_frees_its_slot(server: Server) -> None:
    async def scenario() -> None:
        server.fail = RuntimeError("no such rank")
        for name in ("one", "two", "three"):
            assert (await server.load(name, "/a")).status_code == 400
        server.fail = None
        for name in ("four", "five"):
            assert (await server.load(name, "/a")).status_code == 200

    run(scenario)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not a JSON object"),
        ([], 400, "not a JSON object"),
        ({"lora_path": "/a"}, 400, "lora_name"),
        ({"lora_name": 3, "lora_path": "/a"}, 400, "are strings"),
        ({"lora_name": "", "lora_path": "/a"}, 400, "not empty"),
        (b"[" * 100_000, 400, "not a JSON object"),
        ({"lora_name": "a b", "lora_path": "/a"}, 400, "has blanks or more than 256"),
        ({"lora_name": "x" * 257, "lora_path": "/a"}, 400, "has blanks or more than 256"),
        ({"lora_name": "x"}, 400, "lora_path is missing"),
        ({"lora_name": "x", "lora_path": "org/repo"}, 400, "'org/repo' is no absolute path"),
        ({"lora_name": "x", "lora_path": "twinkle:0011223344556677=org/repo"}, 400, "'org/repo' is no absolute path"),
        ({"lora_name": "base", "lora_path": "/a"}, 400, "name of the base model"),
        ({"lora_name": "one", "lora_path": "/a"}, 400, "set load_inplace to replace it"),
        ({"lora_name": "three", "lora_path": "/a"}, 409, r"all 2 adapter slots are taken (by one, two)"),
    ],
)
def test_what_cannot_be_loaded_is_refused(server: Server, body: Any, status: int, says: str) -> None:
    async def scenario() -> None:
        await server.load("one", "/a")
        await server.load("two", "/a")
        response = await server.post(LOAD, body)
        assert response.status_code == status
        assert says in response.json()["error"]
        assert sorted(server.known) == ["one", "two"]

    run(scenario)


def test_detaching_ends_when_the_version_is_forgotten(server: Server) -> None:
    async def scenario() -> None:
        await server.load("math", "/a")
        assert (await server.post(UNLOAD, {"lora_name": "math"})).status_code == 200
        assert server.removed == [1]
        assert server.known == {}
        response = await server.post(UNLOAD, {"lora_name": "math"})
        assert response.status_code == 404
        assert "there are none" in response.json()["error"]

    run(scenario)


def test_detaching_says_when_requests_still_hold_the_version(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_routes, "FORGET_TIMEOUT_S", 0.05)

    async def scenario() -> None:
        await server.load("math", "/a")
        held = server.known["math"]
        response = await server.post(UNLOAD, {"lora_name": "math"})
        assert response.status_code == 200
        assert "forgotten when those that hold it have ended" in response.json()["message"]
        assert server.removed == []
        del held
        await server.settled([1])

    run(scenario)


@pytest.mark.parametrize("lora_id", [1, 50], ids=["loaded here", "at the start"])
def test_detaching_says_when_the_engine_did_not_forget_the_version(server: Server, lora_id: int) -> None:
    async def scenario() -> None:
        if lora_id == 1:
            await server.load("math", "/a")
        else:
            server.known["math"] = Version(lora_name="math", lora_int_id=50, lora_path="/s")
        server.fail_to_remove = RuntimeError("the engine is dead")
        response = await server.post(UNLOAD, {"lora_name": "math"})
        assert response.status_code == 500
        assert "stays in the engine's memory: the engine is dead" in response.json()["error"]
        assert server.known == {}

    run(scenario)


def test_an_adapter_in_use_is_not_detached(server: Server) -> None:
    async def scenario() -> None:
        await server.load("math", "/a")
        server.requests["r1"] = SimpleNamespace(lora_name="math")
        response = await server.post(UNLOAD, {"lora_name": "math"})
        assert response.status_code == 409
        assert "in use by 1 requests" in response.json()["error"]
        assert server.removed == []
        assert "math" in server.known

    run(scenario)


def test_an_adapter_that_the_server_started_with_is_detached_too(server: Server) -> None:
    async def scenario() -> None:
        server.known["static"] = Version(lora_name="static", lora_int_id=50, lora_path="/s")
        assert (await server.post(UNLOAD, {"lora_name": "static"})).status_code == 200
        assert server.removed == [50]

    run(scenario)


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_a_tenant_cannot_touch_anothers(server: Server, path: str) -> None:
    async def scenario() -> None:
        await server.load("bob", "/a")
        server.tenant = "alice"
        response = await server.post(path, {"lora_name": "bob", "lora_path": "/b", "load_inplace": True})
        assert response.status_code == 403
        assert "not one of tenant 'alice'" in response.json()["error"]
        assert (await server.load("alice/x", str(AdapterPath.sent(1)))).status_code == 200
        assert server.known["bob"].lora_int_id == 1

    run(scenario)


def test_a_tenant_attaches_nothing_unless_the_owner_allowed_a_folder(server: Server, tmp_path: Path) -> None:
    async def scenario() -> None:
        assert (await server.load("alice", str(tmp_path))).status_code == 200
        server.tenant = "alice"
        response = await server.load("alice", str(tmp_path))
        assert response.status_code == 403
        assert "below no folder of this server" in response.json()["error"]
        assert "serve MODEL --tenant-folder DIR" in response.json()["error"]

    run(scenario)


def test_a_tenant_attaches_only_from_below_the_allowed_folders(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret, other = tmp_path / "allowed-not" / "secret", tmp_path / "other" / "b"
    fine, leak = tmp_path / "allowed" / "fine", tmp_path / "allowed" / "leak"
    for folder in (secret, other, fine, leak):
        folder.mkdir(parents=True)
    (secret / "adapter_config.json").touch()
    (fine / "link-inside").symlink_to(other)
    (leak / "adapter_config.json").symlink_to(secret / "adapter_config.json")
    (tmp_path / "allowed" / "link").symlink_to(secret)
    (tmp_path / "alias").symlink_to(tmp_path / "allowed")
    monkeypatch.setenv(auth.TENANT_FOLDERS_ENV, f"{tmp_path / 'alias'}:{tmp_path / 'other'}")
    allowed = tmp_path / "allowed"
    answers = {
        str(fine): 200,
        f"{tmp_path}/alias/fine": 200,
        str(other): 200,
        str(AdapterPath.attached(str(fine))): 200,
        str(AdapterPath.attached(str(secret))): 403,
        str(secret): 403,
        f"{allowed}/../allowed-not/secret": 403,
        f"{allowed}/link": 403,
        str(leak): 403,
        "/": 403,
        f"{allowed}/nowhere": 400,
        f"{allowed}/\0": 400,
    }

    async def scenario() -> None:
        server.tenant = "alice"
        for path, status in answers.items():
            assert (await server.load("alice", path)).status_code == status, path
        await server.load("alice", f"{tmp_path}/alias/fine")
        path = AdapterPath.parse(server.known["alice"].lora_path)
        assert path is not None
        assert path.folder == str(fine)  # what was looked at, not the link

    run(scenario)


def test_a_server_without_lora_says_so(server: Server) -> None:
    async def scenario() -> None:
        server.state.engine_client.vllm_config.lora_config = None
        response = await server.load("math", "/a")
        assert response.status_code == 400
        assert "--enable-lora" in response.json()["error"]

    run(scenario)


def test_a_server_of_several_api_processes_says_so(server: Server) -> None:
    async def scenario() -> None:
        server.state.args.api_server_count = 2
        response = await server.load("math", "/a")
        assert response.status_code == 400
        assert "--api-server-count 1" in response.json()["error"]

    run(scenario)


def test_everything_else_is_vllms(server: Server) -> None:
    async def scenario() -> None:
        assert (await server.post("/v1/completions", {})).content == b"vllm's own"

    run(scenario)
