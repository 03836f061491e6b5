"""Which engine fits a trainer and its rollouts, by what each process tells of its GPU and its host: `engine="auto"`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from twinkle_callbacks.engines.shm import FOLDER

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Place(msgspec.Struct, frozen=True):
    """Where a process runs.

    Attributes:
        shared_memory: equal for processes that see the same `/dev/shm` as the same user; empty if there is none.
        gpu: UUID of its GPU, empty if it has none.
        host: as NCCL tells hosts apart.
        nccl: NCCL's version, 0 if there is none.
    """

    shared_memory: str = ""
    gpu: str = ""
    host: str = ""
    nccl: int = 0

    @classmethod
    def of_this_process(cls, gpu: int | None = None) -> Place:
        """Of this process; `gpu` is the index of the GPU that it works on, by default this thread's."""
        import torch

        host, shared = "", ""
        if _BOOT.exists():
            host = _BOOT.read_text().strip()
            shared = f"{host} {os.stat(FOLDER).st_dev} {os.getuid()}" if FOLDER.is_dir() else ""
        if not torch.cuda.is_available():
            return cls(shared, host=host)
        from twinkle_callbacks.engines.cuda import uuid_of
        from twinkle_callbacks.engines.nccl import version

        index = torch.cuda.current_device() if gpu is None else gpu
        return cls(shared, uuid_of(index), os.environ.get("NCCL_HOSTID", host), version())


def choose(trainer: Place, workers: Sequence[Place], bucket_bytes: int) -> tuple[str, str]:
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
