"""NCCL: GPU to GPU, between processes and hosts; packing, sending and unpacking overlap, each on its own stream."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import torch

from twinkle_callbacks.engines.backend import CollectiveBackend, Pending
from twinkle_callbacks.engines.collective import CollectiveCheckpointEngine
from twinkle_callbacks.engines.cuda import require_device, uuid_of
from twinkle_callbacks.errors import ConfigError, DeadlineError, EngineError, text_of

if TYPE_CHECKING:
    from torch.distributed import Store

_SPIN_S = 0.001
_POLL_S = 0.00005
_NEVER = timedelta(days=365)


class Peer(msgspec.Struct, frozen=True):
    """What a rank must agree on with the others before NCCL is asked to connect them."""

    gpu: str
    host: str
    nccl: tuple[int, ...]


class _NCCLWork:
    """A broadcast under way on NCCL's stream."""

    def __init__(self, backend: NCCLBackend, work: Any) -> None:
        self._backend, self._work = backend, work

    def wait(self) -> None:
        began = time.monotonic()
        while not self._work.is_completed():
            waited = time.monotonic() - began
            if waited > self._backend.timeout_s:
                self._backend.abort()
                raise DeadlineError(
                    f"a broadcast took longer than {self._backend.timeout_s:g} s: a peer is stuck or slow; raise "
                    f"timeout_s if it is only slow"
                )
            if waited > _SPIN_S:
                time.sleep(_POLL_S)
                self._raise_if_broken()
        self._raise_if_broken()

    def _raise_if_broken(self) -> None:
        error = self._backend.error()
        if error:
            self._backend.abort()
            raise EngineError(f"the connection to a peer broke in a broadcast: {error}")


class NCCLBackend(CollectiveBackend):
    """A `ProcessGroupNCCL` of its own, independent of the default group of torch.distributed.

    Deadlines are kept here, by looking whether a broadcast has ended: torch's own watchdog would end the process, which
    may be somebody's trainer or a server.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._device = torch.device("cuda", torch.cuda.current_device())
        self.timeout_s = 0.0

    @classmethod
    def device(cls) -> int | None:
        return require_device()

    def connect(self, store: Store, rank: int, world_size: int, *, host: str, timeout_s: float) -> None:
        from torch.distributed import ProcessGroupNCCL

        self.timeout_s = timeout_s
        _check_peers(store, rank, world_size)
        options = ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        try:
            with _no_watchdog():
                self._group = ProcessGroupNCCL(store, rank, world_size, options)
        except RuntimeError as error:
            raise EngineError(f"NCCL could not connect rank {rank} of {world_size}: {text_of(error)}") from error

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def broadcast(self, buffer: torch.Tensor) -> Pending:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            return _NCCLWork(self, self._group.broadcast([buffer], options))
        except RuntimeError as error:
            raise EngineError(f"NCCL refused a broadcast of {buffer.numel()} bytes: {text_of(error)}") from error

    def consumed(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def error(self) -> str:
        """What NCCL says went wrong since the group was made, empty if nothing did."""
        from torch._C._distributed_c10d import ErrorType

        found = self._group.get_error()
        return "" if found == ErrorType.SUCCESS else str(found)

    def abort(self) -> None:
        """Ends all broadcasts on this side; peers see the connection close."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def close(self) -> None:
        self.abort()


class NCCLCheckpointEngine(CollectiveCheckpointEngine):
    """Broadcasts over NCCL, to GPUs other than the trainer's; tensors on the CPU are copied to the GPU first."""

    name: ClassVar[str] = "nccl"
    backend_cls: ClassVar[type[CollectiveBackend]] = NCCLBackend


def _check_peers(store: Store, rank: int, world_size: int) -> None:
    """Refuses what NCCL would refuse, or hang on, in words that say what to change; the same on every rank."""
    mine = Peer(
        uuid_of(torch.cuda.current_device()),
        os.environ.get("NCCL_HOSTID", socket.gethostname()),
        tuple(torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
    )
    store.set(f"peer/{rank}", msgspec.msgpack.encode(mine))  # type: ignore[arg-type]  # takes bytes; its stub says str
    try:
        peers = [msgspec.msgpack.decode(store.get(f"peer/{other}"), type=Peer) for other in range(world_size)]
    except RuntimeError as error:
        raise DeadlineError(f"a rank did not tell which GPU it has: {text_of(error)}") from error
    seen: dict[tuple[str, str], int] = {}
    for other, peer in enumerate(peers):
        if peer.nccl[:2] != peers[0].nccl[:2]:
            raise ConfigError(
                f"rank {other} runs NCCL {_dotted(peer.nccl)}, the master {_dotted(peers[0].nccl)}; install the same "
                f"torch beside the trainer and beside vLLM"
            )
        first = seen.setdefault((peer.host, peer.gpu), other)
        if first != other:
            raise ConfigError(
                f"ranks {first} and {other} are on the same GPU ({peer.gpu}), which NCCL refuses; use engine='ipc'"
            )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@contextmanager
def _no_watchdog() -> Iterator[None]:
    """Makes groups that torch's watchdog only watches. It is asked when a group is made, and only through these."""
    wanted = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
