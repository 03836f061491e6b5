"""List, attach and detach the LoRA adapters of a running server.

    twinkle-callbacks adapters list URL
    twinkle-callbacks adapters attach URL NAME FOLDER    also replaces what has that name
    twinkle-callbacks adapters detach URL NAME

The server must run with --enable-lora. Requests name an adapter as their model. FOLDER holds what PEFT's
save_pretrained writes, and is a path on the server's host; for tenants it lies below one that the server was started
with, serve --tenant-folder. Requests under way end on the version they began with.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `adapters`: a subcommand each."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, what in (
        ("list", "show what requests can name, with version or folder"),
        ("attach", "serve the adapter in a folder under a name"),
        ("detach", "take an adapter away that no request uses"),
    ):
        command = commands.add_parser(action, help=what, description=what, allow_abbrev=False)
        command.add_argument("url", metavar="URL", help="address of the server, such as http://127.0.0.1:8000")
        command.add_argument(
            "--timeout", type=float, default=60.0, metavar="SECONDS", help="for each request (default: %(default)g)"
        )
        if action == "list":
            command.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
        else:
            command.add_argument("name", metavar="NAME", help="the model name that requests give")
        if action == "attach":
            command.add_argument("folder", metavar="FOLDER", help="absolute path on the server's host")


def run(arguments: argparse.Namespace) -> int:
    """Does one action on one server."""
    from twinkle_callbacks.rollouts.registry import AdapterRegistry

    with AdapterRegistry(arguments.url, timeout_s=arguments.timeout) as registry:
        if arguments.action == "attach":
            registry.attach(arguments.name, arguments.folder)
            print(f"{arguments.url} serves {arguments.folder} as {arguments.name}")
        elif arguments.action == "detach":
            registry.detach(arguments.name)
            print(f"{arguments.url} serves {arguments.name} no more")
        else:
            _show([adapter._asdict() for adapter in registry.list()], as_json=arguments.json)
    return 0


def _show(adapters: list[dict[str, object]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(adapters))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "version", "folder")
    for adapter in adapters:
        table.add_row(*("" if value is None else str(value) for value in adapter.values()))
    Console().print(table)
