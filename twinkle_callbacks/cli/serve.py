"""Start stock vLLM so that trainers with this package can push weights into it, and say when it is ready.

The server listens on loopback unless --host says otherwise. Its control routes answer only to holders of the token
($TWINKLE_TOKEN, else the user's token file, which is made when missing, readable by the user only). Everything after
MODEL that is not listed here goes to vLLM as it is. Ctrl-C or SIGTERM stops the server and all its processes.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

from twinkle_callbacks import auth
from twinkle_callbacks.errors import ConfigError

if TYPE_CHECKING:
    from twinkle_callbacks.cli.process import ServerProcess

logger = logging.getLogger(__name__)

DEFAULT_READY_TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `serve`."""
    parser.usage = "twinkle-callbacks serve MODEL [--host HOST] [--port PORT] [--tenant-folder DIR] [vLLM's own flags]"
    parser.set_defaults(passes_on="vllm_args", comes_first="MODEL")
    parser.add_argument("model", metavar="MODEL", help="folder or name of the model; comes first")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 picks a free one (default: %(default)s)")
    parser.add_argument(
        "--tenant-folder",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="let tenants attach adapter files below this folder, best one that they cannot write to; may be given "
        "several times (default: none, which leaves attaching files to holders of the server's token)",
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="also write the server's output to this file")
    parser.add_argument(
        "--ready-timeout",
        type=float,
        default=DEFAULT_READY_TIMEOUT_S,
        metavar="SECONDS",
        help="how long the start may take (default: %(default)g)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until interrupted, or until the server ends by itself, which is an error."""
    with serving(
        arguments.model,
        port=arguments.port,
        host=arguments.host,
        vllm_args=arguments.vllm_args,
        tenant_folders=arguments.tenant_folder,
        ready_timeout_s=arguments.ready_timeout,
        log_path=arguments.log,
        echo=sys.stdout.buffer,
    ) as server:
        print(f"twinkle-callbacks: ready at {server.url}, serving {arguments.model}", flush=True)
        server.wait()
    return 0


@contextmanager
def serving(
    model: str,
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    vllm_args: Sequence[str] = (),
    tenant_folders: Sequence[Path] = (),
    ready_timeout_s: float = DEFAULT_READY_TIMEOUT_S,
    log_path: Path | None = None,
    echo: BinaryIO | None = None,
) -> Iterator[ServerProcess]:
    """Runs a vLLM server as a child process for as long as the block runs; inside the block it is ready.

    Nothing of the server outlives the block, nor this process, however they end. In the main thread SIGTERM, unless
    somebody handles it already, raises `SystemExit` in the block, so that a plain `kill` cleans up too.

    Args:
        model: folder or name of the model.
        port: port to listen on; 0 picks a free one.
        host: address to listen on. Anything but loopback lets everyone who reaches it sample.
        vllm_args: vLLM's own flags.
        tenant_folders: folders below which tenants may attach adapter files; default: none.
        ready_timeout_s: seconds that the start may take.
        log_path: file for the server's output. None: a temporary file, gone after the block.
        echo: binary stream that the output is also copied to.

    Yields:
        The server: `url`, `port`, `log_path`, `pid`, and `wait()` to block while it runs.

    Raises:
        ConfigError: the port is taken, a flag contradicts what is set here, or a tenant folder is none.
        AuthenticationError: the token is missing or unsafe.
        MissingExtraError: vLLM is not installed.
        RolloutError: the server ended before it was ready; carries the end of its log.
        DeadlineError: it was not ready in time.
    """
    from twinkle_callbacks.cli.launch import current_environment, plan_launch
    from twinkle_callbacks.cli.process import ServerProcess

    auth.load_token()  # fails here rather than in the child, and makes the file that both sides read
    port = _claim_port(host, port)
    launch = plan_launch(model, host, port, vllm_args, current_environment(), tenant_folders)
    if not _is_loopback(host):
        logger.warning("listening on %s: whoever reaches port %d can sample; weights travel unencrypted", host, port)
    with ExitStack() as stack:
        if log_path is None:
            log_path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twinkle-serve-"))) / "server.log"
        stack.enter_context(_sigterm_raises())
        server = ServerProcess(launch.command, env=launch.env, url=_url(host, port), log_path=log_path, echo=echo)
        stack.callback(server.stop)
        server.wait_ready(ready_timeout_s)
        yield server


def _claim_port(host: str, port: int) -> int:
    """Returns the port, or a free one for 0; makes sure that it is ours to take, or another server would look ready."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}); choose another port, 0 for a free one") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _url(host: str, port: int) -> str:
    """Where the server is reached from this machine: a wildcard address by loopback."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 -- looked up, not bound
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
