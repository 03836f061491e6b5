"""Stream a folder of safetensors files into running servers as their new weights.

The folder is a checkpoint such as `save_pretrained` writes, of the model that the servers run. They answer with the old
weights until the last of them has all new ones and has checked them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinkle_callbacks.report import SyncReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `push`."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with *.safetensors")
    add("--to", action="append", required=True, metavar="URL", help="address of a server; repeat it for several")
    add("--engine", default="auto", help="transport (default: %(default)s)")
    add("--version", type=int, default=0, metavar="N", help="weight version to set (default: %(default)s)")
    add("--bucket-size-mb", type=int, default=512, metavar="MB", help="wire bucket (default: %(default)s)")
    add("--timeout", type=float, default=300.0, metavar="SECONDS", help="for each operation (default: %(default)g)")


def run(arguments: argparse.Namespace) -> int:
    """Pushes once and prints the report."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from twinkle_callbacks.cli.progress import CountedSource
    from twinkle_callbacks.sources.checkpoint import CheckpointSource
    from twinkle_callbacks.sync import WeightSynchronizer

    checkpoint = CheckpointSource(arguments.checkpoint)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"pushing {arguments.checkpoint}")
        source = CountedSource(checkpoint, lambda nbytes: progress.advance(task, nbytes))
        progress.update(task, total=source.total_bytes)
        synchronizer = WeightSynchronizer(
            source,
            rollouts=arguments.to,
            engine=arguments.engine,
            bucket_size_mb=arguments.bucket_size_mb,
            timeout_s=arguments.timeout,
        )
        try:
            report = synchronizer.open(version=arguments.version)
        finally:
            synchronizer.close()
    print(describe(report))
    return 0


def describe(report: SyncReport) -> str:
    """The report as text: one line for the push, one for each server."""
    rate = report.bytes / 1e9 / report.transfer_s if report.transfer_s else 0.0
    lines = [
        f"version {report.version}: {report.bytes / 1e6:.1f} MB in {report.seconds:.2f} s "
        f"(read {report.gather_s:.2f} s, transfer {report.transfer_s:.2f} s at {rate:.2f} GB/s, "
        f"commit {report.commit_s:.2f} s)"
    ]
    for replica in report.replicas:
        digest = f", digest {replica.digest}" if replica.digest else ""
        lines.append(f"  {replica.rollout}: serves version {replica.version}, {replica.tensors} tensors{digest}")
    return "\n".join(lines)
