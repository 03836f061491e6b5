"""Show what a running server serves: model, weight version, paused or not, workers, LoRA, transfer backend.

The server must have vLLM's RL routes, as one that `twinkle-callbacks serve` started has. `/server_info` is guarded, so
the token must be the server's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinkle_callbacks.rollouts.registry import ServedAdapter


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
        adapters: what it serves beside the base model, each with its version or folder.
        backend: its weight transfer backend; pushes need `twinkle`.
    """

    url: str
    version: str
    model: str
    paused: bool
    world_size: int
    lora: bool
    adapters: dict[str, str]
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
    if isinstance(value, dict):
        value = ", ".join(f"{name} ({version})" for name, version in value.items()) or None
    return "none" if value is None else str(value)


def _version(adapter: ServedAdapter) -> str:
    return adapter.folder if adapter.folder is not None else f"version {adapter.version}"


def fetch_status(url: str, *, timeout_s: float = 30.0) -> ServerStatus:
    """Asks a server over HTTP.

    Args:
        url: its address.
        timeout_s: seconds for each request.

    Raises:
        ConfigError: the URL is not an http(s) one.
        RolloutUnreachableError: nobody answers there.
        RolloutError: the server has no RL routes, or answers with an error.
        AuthenticationError: the server has another token.
    """
    from twinkle_callbacks.rollouts.http import HTTPRollout, backend_of
    from twinkle_callbacks.rollouts.registry import AdapterRegistry

    server = HTTPRollout(url, timeout_s=timeout_s)
    try:
        config = server.config()
        return ServerStatus(
            url=server.name,
            version=server.version(),
            model=", ".join(server.models()),
            paused=server.is_paused(),
            world_size=server.world_size(),
            lora=bool(config.get("lora_config")),
            adapters={adapter.name: _version(adapter) for adapter in AdapterRegistry(server).list()},
            backend=backend_of(config),
        )
    finally:
        server.close()
