"""On which GPU and which host each process is, which decides what engines reach it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from twinkle_callbacks.engines.shm import FOLDER
from twinkle_callbacks.errors import DeadlineError, text_of

if TYPE_CHECKING:
    from torch.distributed import Store

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Whereabouts(msgspec.Struct, frozen=True):
    """Where a process runs.

    Attributes:
        shared_memory: equal for processes that see the same `/dev/shm` as the same user; empty if there is none.
        gpu: UUID of its GPU, empty if it has none.
        host: as NCCL tells hosts apart.
        nccl: NCCL's version, such as 22809; 0 if there is none.
    """

    shared_memory: str = ""
    gpu: str = ""
    host: str = ""
    nccl: int = 0

    @classmethod
    def of_this_process(cls, gpu: int | None = None) -> Whereabouts:
        """Of this process; `gpu` is the index of the GPU that it works on, by default this thread's."""
        import torch

        boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
        shared = f"{boot} {os.stat(FOLDER).st_dev} {os.getuid()}" if boot and FOLDER.is_dir() else ""
        host = os.environ.get("NCCL_HOSTID", f"{socket.gethostname()} {boot}")  # NCCL's user guide, NCCL_HOSTID
        if not torch.cuda.is_available():
            return cls(shared, host=host)
        from twinkle_callbacks.engines.cuda import uuid_of
        from twinkle_callbacks.engines.nccl import version

        return cls(shared, uuid_of(torch.cuda.current_device() if gpu is None else gpu), host, version())


def exchange(store: Store, rank: int, world_size: int) -> list[Whereabouts]:
    """Tells the other ranks of a group where this one is. Returns all of them, by rank. All ranks call it.

    Raises:
        DeadlineError: a rank did not tell within the store's timeout.
    """
    mine = msgspec.msgpack.encode(Whereabouts.of_this_process())
    store.set(f"whereabouts/{rank}", mine)  # type: ignore[arg-type]  # takes bytes; its stub says str
    answers = [told(store, f"whereabouts/{r}", f"rank {r} did not tell where it is") for r in range(world_size)]
    return [msgspec.msgpack.decode(answer, type=Whereabouts) for answer in answers]


def told(store: Store, key: str, otherwise: str) -> bytes:
    """The value that another rank sets; waits for it.

    Raises:
        DeadlineError: it did not come within the store's timeout; begins with `otherwise`.
    """
    try:
        return bytes(store.get(key))
    except RuntimeError as error:
        raise DeadlineError(f"{otherwise}: {text_of(error)}") from error
