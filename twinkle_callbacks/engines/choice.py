"""Which engine fits a trainer and its rollouts, by what each process tells of its GPU and its host: `engine="auto"`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from twinkle_callbacks.engines.shm import FOLDER
from twinkle_callbacks.engines.whereabouts import Whereabouts


def choose(trainer: Whereabouts, workers: Sequence[Whereabouts], bucket_bytes: int) -> tuple[str, str]:
    """The name of the fastest engine that reaches all workers, and why.

    Args:
        trainer: where rank 0 runs.
        workers: where the vLLM workers run.
        bucket_bytes: of one bucket, two of which `shm` needs room for.
    """
    everybody = [trainer, *workers]
    if trainer.gpu and all(worker.gpu == trainer.gpu for worker in workers):
        return "ipc", "trainer and rollouts are on one GPU"
    gpus = {(each.host, each.gpu) for each in everybody}
    if all(each.gpu and each.nccl // 100 == trainer.nccl // 100 for each in everybody) and len(gpus) == len(everybody):
        return "nccl", "each process has a GPU of its own, and all the same NCCL"
    if trainer.shared_memory and all(worker.shared_memory == trainer.shared_memory for worker in workers):
        free = os.statvfs(FOLDER).f_bavail * os.statvfs(FOLDER).f_frsize
        if free > 2 * bucket_bytes:
            return "shm", "trainer and rollouts share this host's memory"
        return "gloo", f"{FOLDER} has {free >> 20} MiB free, less than two buckets"
    return "gloo", "it reaches every host and device, through the CPU"
