"""A vLLM server by URL, steered over vLLM's RL routes."""

from __future__ import annotations

import logging
import os
import re
from typing import Any
from urllib.parse import urlsplit

import httpx

from twinkle_callbacks import auth
from twinkle_callbacks.config import BACKEND
from twinkle_callbacks.errors import (
    AuthenticationError,
    ConfigError,
    DeadlineError,
    RolloutError,
    RolloutUnreachableError,
)
from twinkle_callbacks.rollouts.base import Rollout

logger = logging.getLogger(__name__)
API_KEY_ENV = "VLLM_API_KEY"
"""Environment variable of the key that vLLM wants for its OpenAI routes, and reads itself where it has no --api-key."""

# What vLLM puts around the error of a worker, on its way through the engine to the API server.
_CALL_FAILED = re.compile(r"Call to \w+ method failed: ")
_WORKER_FAILED = re.compile(r"""Worker failed with error (['"])(.+)\1, please check the stack trace.*""", re.DOTALL)


class HTTPRollout(Rollout):
    """A stock `vllm serve` with this package installed beside it; `twinkle-callbacks serve` starts one.

    Args:
        url: such as `http://10.0.0.7:8000`.
        token: shared secret; default: `$TWINKLE_TOKEN`, else the user's token file. Signs requests, is never sent.
        timeout_s: seconds one call may take; a synchronizer sets its own.

    Raises:
        ConfigError: the URL is not an http(s) one.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 300.0) -> None:
        self.name = url.rstrip("/")
        self.host = _host_of(url)
        self.token = self._token = auth.load_token(token)
        self.timeout_s = timeout_s
        self._client: httpx.Client | None = None

    def world_size(self) -> int:
        return int(self._value("/get_world_size", "world_size"))

    def join(self, request: dict[str, Any]) -> None:
        # Without the backend every worker of a tensor-parallel server would raise, which shifts their later replies.
        self.version()  # an older vLLM has no versions, and would refuse only in the middle of a push
        if not auth.tenant_of(self._token):  # whose token opens no configuration; its server has the guard, so all else
            backend = backend_of(self.config())
            if backend != BACKEND:
                raise self._lacks_backend(f"its backend is {backend!r}")
            self._warn_if_open()
        self._call("POST", "/init_weight_transfer_engine", {"init_info": {"request": request}})

    def call(self, call: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", {"init_info": {"call": call}})

    def load_adapter(self, name: str, path: str) -> None:
        self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, "load_inplace": True})

    def unload_adapter(self, name: str) -> None:
        self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def adapters(self) -> dict[str, str]:
        models = self._value("/v1/models", "data")
        return {str(model["id"]): str(model["root"]) for model in models if model.get("parent")}

    def start(self) -> None:
        self._call("POST", "/start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        self._call("POST", "/update_weights", {"update_info": info})

    def finish(self) -> None:
        self._call("POST", "/finish_weight_update", {"weight_version": None})

    def pause(self, mode: str, *, clear_cache: bool) -> None:
        self._call("POST", f"/pause?mode={mode}&clear_cache={str(clear_cache).lower()}")

    def resume(self) -> None:
        self._call("POST", "/resume")

    def reset_cache(self) -> None:
        answer = self._call("POST", "/reset_prefix_cache?reset_running_requests=true")
        if not answer.get("success", False):
            raise RolloutError(f"{self.name} did not drop its cached prefixes; set stale_kv='keep' if they may stay")

    def set_version(self, version: int) -> None:
        self._call("POST", "/update_weight_version", {"new_version": str(version)})

    def version(self) -> str:
        return str(self._value("/weight_info", "weight_version"))

    def config(self) -> dict[str, Any]:
        """Its `VllmConfig` as plain values."""
        return dict(self._value("/server_info?config_format=json", "vllm_config"))

    def is_paused(self) -> bool:
        return bool(self._value("/is_paused", "is_paused"))

    def models(self) -> list[str]:
        """Names under which it serves the base model."""
        return [str(model["id"]) for model in self._value("/v1/models", "data") if not model.get("parent")]

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _warn_if_open(self) -> None:
        """Warns of a server that obeys everybody. One with the guard refuses what is not signed, on any path."""
        assert self._client is not None
        try:
            answer = self._client.get("/twinkle_callbacks", timeout=self.timeout_s)
        except httpx.TransportError:
            return  # what is asked next says so
        if answer.status_code != httpx.codes.UNAUTHORIZED:
            logger.warning(
                "%s does what anybody who reaches it asks, such as to pause or to name another weight version; start "
                "it with: twinkle-callbacks serve MODEL",
                self.name,
            )

    def _value(self, target: str, key: str) -> Any:
        answer = self._call("GET", target)
        if key not in answer:
            raise RolloutError(f"{self.name} is no vLLM server, or one that is too old: {target} has no {key!r}")
        return answer[key]

    def _call(self, method: str, target: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        if self._client is None:
            self._client = httpx.Client(base_url=self.name, trust_env=False)
        request = self._client.build_request(method, target, json=body, timeout=self.timeout_s)
        request.headers[auth.SIGNATURE_HEADER] = auth.sign_request(
            self._token, method, request.url.raw_path.decode(), request.content
        )
        request.headers.update(api_key_header())
        try:
            response = self._client.send(request)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise RolloutUnreachableError(
                f"nobody answers at {self.name} ({error}); start a server with: twinkle-callbacks serve MODEL"
            ) from error
        except httpx.TimeoutException as error:
            raise DeadlineError(f"{self.name} did not answer {target} within {self.timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise RolloutUnreachableError(f"{self.name} broke the connection in {target}: {error!r}") from error
        if response.status_code != httpx.codes.OK:
            raise self._refusal(target, response)
        try:
            return dict(response.json()) if response.content else {}
        except (TypeError, ValueError):
            raise RolloutError(
                f"{self.name} is no vLLM server: {target} answered {response.text[:80]!r}; is this its URL?"
            ) from None

    def _refusal(self, target: str, response: httpx.Response) -> Exception:
        path, text = target.split("?")[0], _reason(response)
        is_vllms = "twinkle_callbacks:" not in text  # the answer, not the guard's
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            if is_vllms and response.status_code == httpx.codes.UNAUTHORIZED:
                text += f"; the server was started with --api-key: set {API_KEY_ENV} to that key here"
            return AuthenticationError(f"{self.name}{path}: {text}")
        if response.status_code == httpx.codes.NOT_FOUND and is_vllms:
            if path.endswith("_lora_adapter"):
                why, flags = "it serves no adapters", " --enable-lora"
            else:
                why, flags = "its RL routes are off (VLLM_SERVER_DEV_MODE), or its vLLM is too old (0.32 has all)", ""
            return RolloutError(
                f"{self.name} has no route {path}: {why}; start it with: twinkle-callbacks serve MODEL{flags}"
            )
        if path == "/init_weight_transfer_engine" and "not configured" in text:
            return self._lacks_backend(text)
        if path == "/init_weight_transfer_engine" and "Invalid init_info" in text:
            return self._lacks_backend(text, ", or that of another version of twinkle_callbacks than the trainer's")
        return RolloutError(f"{self.name}{path} answered {response.status_code}: {text}")

    def _lacks_backend(self, why: str, or_what: str = "") -> RolloutError:
        return RolloutError(
            f"{self.name} does not run the weight-transfer backend {BACKEND!r}{or_what} ({why}); install the "
            f"trainer's version of twinkle_callbacks "
            f"""beside it and start it with: --weight-transfer-config '{{"backend": "{BACKEND}"}}'"""
        )


def api_key_header() -> dict[str, str]:
    """What vLLM's own key adds to a request, if this process has one."""
    api_key = os.environ.get(API_KEY_ENV)
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def backend_of(config: dict[str, Any]) -> str | None:
    """Name of the weight-transfer backend in a server's configuration, None if it has none."""
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    return None if backend is None else str(backend)


def _host_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:  # such as a port that is no number
        pass
    raise ConfigError(f"{url!r} is not a URL such as http://127.0.0.1:8000")


def _reason(response: httpx.Response) -> str:
    """The server's own words, short: vLLM answers {"error": {"message": ...}}, {"error": ...} or {"detail": ...}."""
    try:
        answer = response.json()
    except ValueError:
        return response.text[:500]
    error = answer.get("error") or answer.get("detail") or answer if isinstance(answer, dict) else answer
    text = str(error.get("message", error) if isinstance(error, dict) else error)[:2000]
    text = text[call.end() :] if (call := _CALL_FAILED.match(text)) else text
    return worker[2] if (worker := _WORKER_FAILED.fullmatch(text)) else text
