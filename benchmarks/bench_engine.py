"""A checkpoint engine against raw broadcasts of the same bytes between the same processes, in turn, in one run.

    python benchmarks/bench_engine.py --engine gloo --json benchmarks/results/engine_gloo.json
    python benchmarks/bench_engine.py --engine shm --against gloo --json benchmarks/results/engine_shm.json

`1GiB`: a model of 1 GiB (one tensor of 128 MiB, the rest 2 to 16 MiB), against one raw broadcast of 1 GiB.
`1GiB, verify off`: the same without digests, which the raw broadcast has none of either: the wire alone.
`small`: 10,000 tensors of 4 KiB, against one broadcast for each. All with one receiver, and with two. Settings are the
product's defaults where the case does not say otherwise. With `--against` another engine takes the broadcasts' place.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

TIMEOUT_S = 120.0
MIB = 1 << 20


VERIFY_OFF = "1GiB, verify off"
CASES = ["1GiB", VERIFY_OFF, "small"]


def shapes(kind: str) -> list[int]:
    """Sizes in bytes of the model's tensors."""
    if kind == "small":
        return [4096] * 10_000
    layer = [16 * MIB, 16 * MIB, 16 * MIB, 8 * MIB, 4 * MIB, 2 * MIB, 2 * MIB]
    return [128 * MIB] + layer * 14


def sender(args: argparse.Namespace, kind: str, links: list[Connection], token: str) -> dict[str, Any]:
    """Rank 0: drives every round, over the engine and raw, and times both until all receivers have everything."""
    import torch

    from benchmarks.common import peak_memory, reset_peak_memory

    world_size = len(links) + 1
    tensors = {f"t{i}": torch.randint(0, 255, (n,), dtype=torch.uint8) for i, n in enumerate(shapes(kind))}
    if args.against:
        other = joined_master(args.against, args, kind, links, token)
        baseline_call = lambda: asyncio.run(other.send_weights(tensors.items()))  # noqa: E731
        timed(links, args.against, baseline_call)  # takes the memory that it takes
    else:
        group, store = raw_group(0, world_size)
        for rank, link in enumerate(links, start=1):
            link.send(("raw", rank, world_size, store.port))
        raw = group()
        buffers = raw_buffers(kind, list(tensors.values()))
        baseline_call = lambda: broadcast(raw, buffers)  # noqa: E731
    baseline_name = args.against or "raw"
    before = reset_peak_memory()
    engine = joined_master(args.engine, args, kind, links, token)
    ours, baseline = [], []
    peak = 0
    for round_ in range(args.rounds + 1):
        reset_peak_memory()
        seconds = timed(links, args.engine, lambda: asyncio.run(engine.send_weights(tensors.items())))
        peak = max(peak, peak_memory() - before)
        baseline_seconds = timed(links, baseline_name, baseline_call)
        if round_:  # the first round warms both up
            ours.append(seconds)
            baseline.append(baseline_seconds)
    peaks = []
    for link in links:
        link.send(("stop",))
        peaks.append(link.recv())
    engine.finalize()
    return {"ours": ours, "baseline": baseline, "sender_peak": peak, "receiver_peak": max(peaks)}


def receiver(args: argparse.Namespace, kind: str, link: Connection, token: str) -> None:
    """Ranks 1 and up: does what the sender says, and answers when everything has arrived."""
    import torch

    from benchmarks.common import peak_memory, reset_peak_memory

    before = peak = 0
    raw = None
    engines: dict[str, Any] = {}
    buffers = [] if args.against else [torch.zeros(n, dtype=torch.uint8) for n in raw_sizes(kind)]
    while (order := link.recv())[0] != "stop":
        if len(order) == 4 and order[0] == "raw":
            group, _ = raw_group(order[1], order[2], order[3])
            raw = group()
        elif len(order) == 4:
            if order[0] == args.engine:
                before = reset_peak_memory()
            engine = engines[order[0]] = make_engine(order[0], args, kind, token)
            engine.prepare()
            engine.init_process_group(order[1], order[2], master_metadata=order[3])
        else:
            reset_peak_memory()
            link.send("ready")
            link.recv()
            if order[0] == "raw":
                broadcast(raw, buffers)
            else:
                asyncio.run(drain(engines[order[0]]))
            if order[0] == args.engine:
                peak = max(peak, peak_memory() - before)
            link.send("done")
    link.send(peak)
    for engine in engines.values():
        engine.finalize()


async def drain(engine: Any) -> int:
    count = 0
    async for _ in engine.receive_weights():
        count += 1
    return count


def timed(links: list[Connection], what: str, send: Any) -> float:
    for link in links:
        link.send((what,))
    for link in links:
        link.recv()
    began = time.perf_counter()
    for link in links:
        link.send("go")
    send()
    for link in links:
        link.recv()
    return time.perf_counter() - began


def joined_master(name: str, args: argparse.Namespace, kind: str, links: list[Connection], token: str) -> Any:
    engine = make_engine(name, args, kind, token)
    engine.is_master = True
    metadata = engine.prepare()
    for rank, link in enumerate(links, start=1):
        link.send((name, rank, len(links) + 1, metadata))
    engine.init_process_group(0, len(links) + 1, master_metadata=metadata)
    return engine


def make_engine(name: str, args: argparse.Namespace, kind: str, token: str) -> Any:
    from twinkle_callbacks.engines import get_engine

    return get_engine(name)(
        bucket_size=args.bucket_size_mb * MIB, timeout=TIMEOUT_S, token=token, verify=kind != VERIFY_OFF
    )


def raw_group(rank: int, world_size: int, port: int = 0) -> tuple[Any, Any]:
    from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

    limit = timedelta(seconds=TIMEOUT_S)
    store = TCPStore("127.0.0.1", port, None, rank == 0, limit, wait_for_workers=False)
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = limit
    return lambda: ProcessGroupGloo(PrefixStore("raw", store), rank, world_size, options), store


def raw_sizes(kind: str) -> list[int]:
    return shapes(kind) if kind == "small" else [sum(shapes(kind))]


def raw_buffers(kind: str, tensors: list[Any]) -> list[Any]:
    import torch

    return tensors if kind == "small" else [torch.cat(tensors)]


def broadcast(group: Any, buffers: list[Any]) -> None:
    for buffer in buffers:
        group.broadcast(buffer, 0).wait()


def run(args: argparse.Namespace, kind: str, receivers: int) -> dict[str, Any]:
    import secrets

    from benchmarks.common import case

    context = multiprocessing.get_context("spawn")
    token = secrets.token_urlsafe(32)
    links, processes = [], []
    for _ in range(receivers):
        ours, theirs = context.Pipe()
        process = context.Process(target=receiver, args=(args, kind, theirs, token), daemon=True)
        process.start()
        links.append(ours)
        processes.append(process)
    result = sender(args, kind, links, token)
    for process in processes:
        process.join(TIMEOUT_S)
    total = sum(shapes(kind))
    return case(
        kind if receivers == 1 else f"{kind}, {receivers} receivers",
        result["ours"],
        baseline_of(args, kind),
        result["baseline"],
        total,
        peak_extra_mb=max(result["sender_peak"], result["receiver_peak"]) / 1e6,
        sender_peak_extra_mb=result["sender_peak"] / 1e6,
        receiver_peak_extra_mb=result["receiver_peak"] / 1e6,
        allowed_extra_mb=(2 * args.bucket_size_mb * MIB + max(shapes(kind))) / 1e6,
        receivers=receivers,
        tensors=len(shapes(kind)),
    )


def baseline_of(args: argparse.Namespace, kind: str) -> str:
    if args.against:
        return f"engine {args.against}"
    return "one raw broadcast for each tensor" if kind == "small" else "one raw broadcast of the same bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="gloo", help="engine to measure (default: gloo)")
    parser.add_argument("--against", help="engine that is the baseline (default: raw broadcasts)")
    parser.add_argument(
        "--bucket-size-mb", type=int, default=512, help="bucket size in MiB (default: 512, the product's)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds after one warm-up (default: 7)")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--receivers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from benchmarks.common import write

    write(args.json, [run(args, kind, receivers) for receivers in args.receivers for kind in args.cases])


if __name__ == "__main__":
    main()
