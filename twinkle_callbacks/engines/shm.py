"""Shared memory: trainer and rollouts on one host, CPU tensors, no copy through a socket.

The master packs into two files in memory, which receivers map and read in place. Each byte is copied once before a
receiver sees it. Names of files and pipes are gone as soon as all have opened them, so that nothing is left behind by a
process that is killed.
"""

from __future__ import annotations

import os
import secrets
import stat
import weakref
from pathlib import Path
from typing import ClassVar

import torch

from twinkle_callbacks.engines.backend import CollectiveBackend, Pending
from twinkle_callbacks.engines.collective import CollectiveCheckpointEngine
from twinkle_callbacks.engines.mapped import MappedBackend
from twinkle_callbacks.engines.pipes import PipeIn, PipesOut
from twinkle_callbacks.errors import EngineError

FOLDER = Path("/dev/shm")  # noqa: S108  # POSIX shared memory; names are random, and files are the user's own
PREFIX = "twinkle-"


class SharedMemoryBackend(MappedBackend):
    """Buckets are files in `/dev/shm`, with a named pipe for each receiver beside each."""

    piece_bytes = 8 << 20  # receivers digest a piece while it is in the cache that the cores share

    def __init__(self) -> None:
        super().__init__()
        self._files: list[Path] = []
        self._pipes: list[PipesOut | PipeIn] = []
        weakref.finalize(self, _unlink, self._files)  # a process may end while a receiver has not mapped them yet

    def create(self, nbytes: int) -> tuple[torch.Tensor, bytes]:
        path = FOLDER / f"{PREFIX}{secrets.token_hex(16)}"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            self._files.append(path)
            try:
                os.posix_fallocate(handle, 0, nbytes)  # or a full folder would kill this process when it writes
            finally:
                os.close(handle)
            pipes = [_pipe_beside(path, rank) for rank in self._receivers]
            self._files += pipes
            self._pipes.append(PipesOut(pipes))
            return _mapped(path, nbytes), str(path).encode()
        except (OSError, RuntimeError) as error:
            self.all_mapped()
            raise EngineError(
                f"no shared memory for a bucket of {nbytes >> 20} MiB in {FOLDER} ({error}): make "
                f"bucket_size_mb smaller, give the container more (docker run --shm-size), or use engine='gloo'"
            ) from error

    def map(self, ticket: bytes, nbytes: int) -> torch.Tensor:
        path = Path(ticket.decode())
        if path.parent != FOLDER or not path.name.startswith(PREFIX):  # a tenant's trainer may not name any file
            raise EngineError(f"the master shares {path}, which is no bucket in {FOLDER}")
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
                raise OSError(f"it has another size than this side's bucket_size={nbytes}")
            self._pipes.append(PipeIn(_pipe_beside(path, self._rank), self._timeout_s))
            return _mapped(path, nbytes)
        except (OSError, RuntimeError) as error:
            raise EngineError(
                f"cannot see the master's bucket {path} ({error}): engine='shm' needs the trainer and the rollouts on "
                f"one host, as the same user, and with the same {FOLDER} (containers: --ipc=host); else use "
                f"engine='gloo'"
            ) from error

    def all_mapped(self) -> None:
        _unlink(self._files)

    def word_of_filled(self, side: int) -> Pending:
        pipe = self._pipes[side]
        if isinstance(pipe, PipesOut):
            pipe.tell()
        return pipe

    def close(self) -> None:
        self.all_mapped()
        while self._pipes:
            self._pipes.pop().close()
        super().close()


class SharedMemoryCheckpointEngine(CollectiveCheckpointEngine):
    """Shares packed buckets with rollouts on the same host. Tensors on other devices are copied to the CPU first."""

    name: ClassVar[str] = "shm"
    backend_cls: ClassVar[type[CollectiveBackend]] = SharedMemoryBackend


def _pipe_beside(bucket: Path, rank: int) -> Path:
    return bucket.with_name(f"{bucket.name}.{rank}")


def _unlink(files: list[Path]) -> None:
    while files:
        files.pop().unlink(missing_ok=True)


def _mapped(path: Path, nbytes: int) -> torch.Tensor:
    return torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)
