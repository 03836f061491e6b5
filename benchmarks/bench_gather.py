"""Gathering a sharded policy: our stream against what users do today, in turn, in one run, two processes on this host.

    python benchmarks/bench_gather.py --json benchmarks/results/gather.json

For each kind of sharding:
`dense`: 67 M parameters in 16 layers. `adapter`: the LoRA adapter of the same, alone. `moe`: 73 M parameters, experts
fused, delivered in the checkpoint's layout. `4 layers`, `16`, `64`: dense with a small vocabulary, for the memory.

The baseline is the fastest of the naive ways, which are all in `naive_s`. Before the rounds, all must deliver the same
tensors bit for bit on rank 0. A round takes until both processes are through.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

WORLD = 2
CASE_TIMEOUT_S = 300.0
KINDS = ["fsdp2", "fsdp1", "zero3", "tp"]
POLICIES = ["dense", "adapter", "moe"]
DEPTHS = [4, 16, 64]
SMALL_VOCAB = 8_000


def plan(kind: str, policies: list[str], depths: list[int], layers: int | None) -> list[Any]:
    """The cases of one kind. Tensor parallelism has none with experts: torch has no plan that cuts fused ones."""
    from benchmarks.gather_ranks import Case

    chosen = [policy for policy in policies if (kind, policy) != ("tp", "moe")]
    cases = [Case(f"{kind} {policy}", kind, policy, layers) for policy in chosen]
    return cases + [Case(f"{kind} {depth} layers", kind, "dense", depth, SMALL_VOCAB) for depth in depths]


def measure(cases: list[Any], rounds: int, advance: Any) -> list[dict[str, Any]]:
    """Runs the cases of one kind in two processes; calls `advance(case name)` after each round.

    Raises:
        RuntimeError: a process failed or took too long; holds the end of its log.
    """
    from benchmarks.gather_ranks import run
    from benchmarks.ports import free_port

    context = multiprocessing.get_context("spawn")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(WORLD)]
        reports, sending = context.Pipe(duplex=False)
        ranks = [
            context.Process(target=run, args=(rank, WORLD, port, cases, rounds, sending, logs[rank]), daemon=True)
            for rank in range(WORLD)
        ]
        for process in ranks:
            process.start()
        sending.close()
        try:
            return _collect(ranks, reports, len(cases), advance)
        except (EOFError, TimeoutError) as error:
            shown = "\n".join(f"===== rank {rank} =====\n{_end_of(log)}" for rank, log in enumerate(logs))
            raise RuntimeError(f"{cases[0].kind}: {error or 'a process ended early'}\n{shown}") from error
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(ranks: list[Any], reports: Connection, count: int, advance: Any) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    deadline = time.monotonic() + CASE_TIMEOUT_S
    while len(results) < count:
        ready = wait([reports, *(process.sentinel for process in ranks)], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no result within {CASE_TIMEOUT_S:.0f} s")
        if reports not in ready:
            raise EOFError
        what, value = reports.recv()
        if what == "round":
            advance(value)
        else:
            results.append(value)
            deadline = time.monotonic() + CASE_TIMEOUT_S
    return results


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:] if log.exists() else "(nothing)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--policies", nargs="*", default=POLICIES, choices=POLICIES)
    parser.add_argument("--depths", nargs="*", type=int, default=DEPTHS, help="layers of the memory cases")
    parser.add_argument("--layers", type=int, help="layers of the other cases (default: as above)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds after a warm-up that compares (default: 7)")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed leaves the process, so that peaks are real
    from rich.console import Console
    from rich.progress import Progress

    from benchmarks.common import write

    plans = [plan(kind, args.policies, args.depths, args.layers) for kind in args.kinds]
    results: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=args.rounds * sum(map(len, plans)))
        for cases in plans:
            results += measure(cases, args.rounds, lambda name: progress.update(task, advance=1, description=name))
    write(args.json, results)


if __name__ == "__main__":
    main()
