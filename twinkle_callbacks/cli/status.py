"""Show what a running server serves: model, weight version, paused or not, workers, LoRA, transfer backend.

The server must have vLLM's RL routes, as one that `twinkle-callbacks serve` started has. `/server_info` is guarded, so
the token must be the server's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from twinkle_callbacks import auth
from twinkle_callbacks.errors import AuthenticationError, RolloutError, RolloutUnreachableError

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True)
class ServerStatus:
    """What a server says of itself.

    Attributes:
        url: its address.
        version: the weight version it serves; `default` until the first push.
        model: the name it serves the model under.
        paused: whether generation is paused.
        world_size: number of its workers, data parallel ones included.
        lora: whether it runs with `enable_lora`.
        backend: its weight transfer backend; pushes need `twinkle`.
    """

    url: str
    version: str
    model: str
    paused: bool
    world_size: int
    lora: bool
    backend: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `status`."""
    parser.add_argument("url", metavar="URL", help="address of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="for each request (default: 30)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the status of one server."""
    status = asdict(fetch_status(arguments.url, timeout_s=arguments.timeout))
    if arguments.json:
        print(json.dumps(status))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in status.items():
        table.add_row(name.replace("_", " "), _shown(value))
    Console().print(table)
    return 0


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def fetch_status(url: str, *, timeout_s: float = 30.0) -> ServerStatus:
    """Asks a server over HTTP.

    Args:
        url: its address.
        timeout_s: seconds for each request.

    Raises:
        RolloutUnreachableError: nobody answers there.
        RolloutError: the server has no RL routes, or answers with an error.
        AuthenticationError: the server has another token.
    """
    import httpx

    url = url.rstrip("/")
    with httpx.Client(base_url=url, timeout=timeout_s, trust_env=False) as client:
        version = _get(client, "/weight_info")["weight_version"]
        paused = _get(client, "/is_paused")["is_paused"]
        world_size = _get(client, "/get_world_size")["world_size"]
        models = _get(client, "/v1/models")["data"]
        config = _get(client, "/server_info?config_format=json")["vllm_config"]
    return ServerStatus(
        url=url,
        version=str(version),
        model=", ".join(model["id"] for model in models),
        paused=bool(paused),
        world_size=int(world_size),
        lora=bool(config.get("lora_config")),
        backend=(config.get("weight_transfer_config") or {}).get("backend"),
    )


def _get(client: httpx.Client, target: str) -> Any:
    import httpx

    try:
        headers = {auth.SIGNATURE_HEADER: auth.sign_request(auth.load_token(), "GET", target, b"")}
        response = client.get(target, headers=headers)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise RolloutUnreachableError(
            f"nobody answers at {client.base_url} ({type(error).__name__}: {error}); is the server up, is this its URL?"
        ) from None
    if response.status_code == 404:
        raise RolloutError(
            f"{client.base_url} has no {target.partition('?')[0]}: start it with `twinkle-callbacks serve`, or with "
            "VLLM_SERVER_DEV_MODE=1, and with vLLM 0.26 or later"
        )
    if response.status_code == 401:
        raise AuthenticationError(f"{client.base_url} refused {target}: {response.text.strip()}")
    if response.is_error:
        raise RolloutError(f"{client.base_url}{target} answered {response.status_code}: {response.text.strip()[:500]}")
    return response.json()
