"""Weights from a trainer to a vLLM on the same GPU, against vLLM's own way and against a plain copy; and NCCL.

    python benchmarks/bench_gpu.py --json benchmarks/results/gpu.json

`0.6B ipc`, `8B ipc`, `32B ipc`: a policy in the shape of that Qwen3, in bfloat16, and a vLLM with a process of its own,
by `engine="ipc"`, with `verify="off"` and with `digest`. The baseline is vLLM's native `ipc` backend to a second vLLM:
the faster of unpacked and packed, both of which are in `naive_s`. `copy_s` is a copy of the same bytes on the GPU, and
nothing can be faster. Second and later syncs count. Where both vLLMs do not fit beside the trainer, one comes after the
other, and `order` says so; what then fails for want of memory is named under `not_measured`.
`nccl`: 2 GiB to another process by `engine="nccl"`, against raw broadcasts of the same bytes in buffers of a bucket's
size. Both processes are on one GPU, and NCCL takes them for two hosts that it links by sockets.

Peak memory is that of the whole GPU beside what was there before the first sync, so of both sides together. Each case
runs in a process of its own; one that does not fit or fails is named under `not_run`, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import secrets
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

CASES = ["0.6B ipc", "8B ipc", "32B ipc", "nccl"]
LIMIT_S = 300.0  # for one case
LEAVE_S = 20.0  # for its processes to end by themselves


def measured(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """The entries of one case, measured in this process and those that it starts."""
    import torch

    from benchmarks.common import NotRunError

    if not torch.cuda.is_available():
        raise NotRunError("torch sees no CUDA GPU here")
    if name == "nccl":
        from benchmarks.gpu_nccl import run_nccl

        return run_nccl(args.bucket_size_mb << 20, args.rounds)
    from benchmarks.gpu_sync import run_sync

    return run_sync(name.removesuffix(" ipc"), args.bucket_size_mb, args.rounds, args.attention_backend)


def in_a_process(args: argparse.Namespace, name: str, link: Connection) -> None:
    """Entry of a case's process, which leads a process group of its own."""
    from benchmarks.common import NotRunError

    os.setsid()
    try:
        link.send((measured(args, name), ""))
    except NotRunError as reason:
        link.send(([], str(reason)))
    except BaseException as error:  # told to the parent, whatever it is
        traceback.print_exc()
        link.send(([], f"{type(error).__name__}: {error}"))


def run(args: argparse.Namespace, name: str) -> tuple[list[dict[str, Any]], str]:
    """The entries of one case, or why there are none."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=in_a_process, args=(args, name, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(LIMIT_S):
            return [], f"it still ran after {LIMIT_S:.0f} s"
        result: tuple[list[dict[str, Any]], str] = ours.recv()
        process.join(LEAVE_S)
        return result
    except EOFError:
        process.join(LEAVE_S)
        return [], f"its process ended with exit status {process.exitcode}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--rounds", type=int, default=7, help="rounds after two warm-ups (default: 7)")
    parser.add_argument(
        "--bucket-size-mb", type=int, default=512, help="bucket size in MiB (default: 512, the product's)"
    )
    parser.add_argument("--attention-backend", help="vLLM's option of this name (default: vLLM chooses)")
    parser.add_argument("--json", type=Path, help="file for the results, written after each case")
    args = parser.parse_args()
    for variable, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}.items():
        os.environ.setdefault(variable, value)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TWINKLE_TOKEN", secrets.token_urlsafe(32))
    from benchmarks.common import save, show

    entries: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    for name in args.cases:
        print(f"== {name}", file=sys.stderr, flush=True)
        found, reason = run(args, name)
        entries += found
        if reason:
            not_run[name] = reason
            print(f"{name} was not run: {reason}", file=sys.stderr, flush=True)
        save(args.json, entries, not_run=not_run)
    show(entries)
    sys.exit(0 if entries else 1)


if __name__ == "__main__":
    main()
