"""A stock vLLM server for the policy, as the recipes start it that do everything by themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from twinkle_callbacks.cli.serve import serving

if TYPE_CHECKING:
    from twinkle_callbacks.cli.process import ServerProcess

# Everything beyond the model: a small cache and no compilation, so that the server starts in half a minute on a CPU.
SERVER_ARGS = (
    *("--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "256"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "64M", "--generation-config", "vllm"),
)
READY_TIMEOUT_S = 300.0


@contextmanager
def served(policy: Path, log_path: Path, flags: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """Runs a server of the policy's folder while the block runs, with further flags of vLLM's; inside it is ready."""
    with ExitStack() as stack:
        with _heartbeat():
            server = stack.enter_context(
                serving(
                    str(policy), vllm_args=(*SERVER_ARGS, *flags), ready_timeout_s=READY_TIMEOUT_S, log_path=log_path
                )
            )
        yield server


@contextmanager
def _heartbeat() -> Iterator[None]:
    """Says every ten seconds that the block still runs."""
    done, started = threading.Event(), time.perf_counter()

    def beat() -> None:
        while not done.wait(10.0):
            print(f"... {time.perf_counter() - started:.0f} s", flush=True)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
