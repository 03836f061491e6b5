"""NCCL: GPU to GPU, between processes and hosts; packing, sending and unpacking overlap, each on its own stream.

NCCL's own library is called, not torch's `ProcessGroupNCCL`: that ends the whole process, somebody's trainer or a
server, when a peer is gone, and with its watchdog off still dumps through the store until it deadlocks (torch 2.11).
Functions and types: NCCL's user guide, "NCCL API"; all calls are non-blocking, so that each has a deadline.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from twinkle_callbacks.engines.backend import CollectiveBackend, Pending
from twinkle_callbacks.engines.collective import CollectiveCheckpointEngine
from twinkle_callbacks.engines.cuda import require_device, torch_bucket
from twinkle_callbacks.engines.whereabouts import Whereabouts, exchange, told
from twinkle_callbacks.errors import ConfigError, DeadlineError, EngineError, text_of

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)

_SPIN_S = 0.001
_POLL_S = 0.00005
_LEAVE_S = 2.0
_SUCCESS, _IN_PROGRESS = 0, 7  # of ncclResult_t
_UINT8 = 1  # of ncclDataType_t


class NCCLBackend(CollectiveBackend):
    """A communicator of its own. All calls but `device` and `consumed` are made on the engine's thread."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._wire = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._communicator = ctypes.c_void_p()
        self._is_broken = self._is_left = False
        self._timeout_s = 0.0

    @classmethod
    def device(cls) -> int | None:
        return require_device()

    def connect(self, store: Store, rank: int, world_size: int, *, host: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        _check_peers(exchange(store, rank, world_size), rank)
        unique = _UniqueId()
        if rank == 0:
            _check(_library().ncclGetUniqueId(ctypes.byref(unique)), "make an id")
            store.set("nccl", bytes(unique))  # type: ignore[arg-type]  # takes bytes; its stub says str
        else:
            unique = _UniqueId.from_buffer_copy(told(store, "nccl", "the master did not start NCCL"))
        config = _Config(size=ctypes.sizeof(_Config), magic=0xCAFEBEEF, version=21400, blocking=0)
        status = _library().ncclCommInitRankConfig(
            ctypes.byref(self._communicator), ctypes.c_int(world_size), unique, ctypes.c_int(rank), ctypes.byref(config)
        )
        self._finish(status, f"connect rank {rank} of {world_size}")

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch_bucket(nbytes, self._device)

    def broadcast(self, buffer: torch.Tensor) -> Pending:
        self._wire.wait_stream(torch.cuda.current_stream(self._device))
        address, nbytes = ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(buffer.numel())
        stream = ctypes.c_void_p(self._wire.cuda_stream)
        status = _library().ncclBroadcast(
            address, address, nbytes, ctypes.c_int(_UINT8), ctypes.c_int(0), self._communicator, stream
        )
        self._finish(status, f"broadcast {buffer.numel()} bytes")
        ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ended.record(self._wire)
        return _NCCLWork(self, ended, buffer)

    def consumed(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def _finish(self, status: int, doing: str) -> None:
        """Waits until NCCL has taken what was asked of it."""
        state = ctypes.c_int(status)

        def is_taken() -> bool:
            if state.value == _IN_PROGRESS:
                _check(_library().ncclCommGetAsyncError(self._communicator, ctypes.byref(state)), doing)
            return state.value != _IN_PROGRESS

        self.wait_until(is_taken, doing)
        if state.value != _SUCCESS:
            self.abort()
            raise EngineError(f"NCCL could not {doing}: {_text(state.value)}")

    def wait_until(self, is_done: Callable[[], bool], doing: str) -> None:
        """Looks until it is done.

        Raises:
            DeadlineError: it took longer than the timeout; nothing is under way on this side any more.
        """
        began = time.monotonic()
        while not is_done():
            waited = time.monotonic() - began
            if self._is_left:
                self.abort()  # or its kernel would stay on the GPU, and all that waits for the whole of that
                raise EngineError(f"this side left while NCCL was to {doing}")
            if waited > self._timeout_s:
                self.abort()
                raise DeadlineError(
                    f"NCCL did not {doing} within {self._timeout_s:g} s: a peer is stuck or slow; raise timeout_s if "
                    f"it is only slow"
                )
            if waited > _SPIN_S:
                time.sleep(_POLL_S)

    def raise_if_broken(self) -> None:
        """Whether the links to the peers are whole.

        Raises:
            EngineError: a peer is gone, or this side has left.
        """
        state = ctypes.c_int(_SUCCESS)
        if self._is_broken:
            raise EngineError("the connection to a peer broke before")
        _check(_library().ncclCommGetAsyncError(self._communicator, ctypes.byref(state)), "tell how it is")
        if state.value not in (_SUCCESS, _IN_PROGRESS):
            self.abort()
            raise EngineError(f"the connection to a peer broke in a broadcast: {_text(state.value)}")

    def interrupt(self) -> None:
        self._is_left = True

    def abort(self) -> None:
        """Ends all that is under way on this side; peers see the connection close."""
        if self._communicator.value:
            self._let_go("ncclCommAbort", time.monotonic() + _LEAVE_S)

    def close(self) -> None:
        """Leaves; waits a moment until all that was started has ended here and is on its way to the peers.

        NCCL's own threads send what its kernels left to them. `ncclCommAbort` stops them in the middle, and whoever
        is next in the ring would lose the end of a stream; `ncclCommDestroy` lets them finish (NCCL 2.28, proxy.cc).
        """
        if not self._communicator.value:
            return
        ends_at = time.monotonic() + _LEAVE_S
        try:
            has_ended = _comes_true(self._wire.query, ends_at) and self._finalizes(ends_at)
        except RuntimeError as error:
            logger.warning("engine nccl: the GPU cannot tell whether all was sent: %s", text_of(error))
            has_ended = False
        if has_ended:
            self._let_go("ncclCommDestroy", ends_at)
        else:
            self.abort()

    def _finalizes(self, ends_at: float) -> bool:
        """Whether NCCL, told that nothing more comes, is done by then."""
        state = ctypes.c_int(_library().ncclCommFinalize(self._communicator))

        def is_final() -> bool:
            status = _library().ncclCommGetAsyncError(self._communicator, ctypes.byref(state))
            return status != _SUCCESS or state.value != _IN_PROGRESS

        return _comes_true(is_final, ends_at) and state.value == _SUCCESS

    def _let_go(self, how: str, ends_at: float) -> None:
        """Ends the communicator, on a thread of its own: NCCL waits for peers of the same host without a deadline."""
        communicator, self._communicator = self._communicator, ctypes.c_void_p()
        self._is_broken = True

        def leave() -> None:
            torch.cuda.set_device(self._device)
            getattr(_library(), how)(communicator)

        leaving = threading.Thread(target=leave, name="twinkle-nccl-leave", daemon=True)
        leaving.start()
        leaving.join(max(0.0, ends_at - time.monotonic()))
        if leaving.is_alive():
            logger.warning("engine nccl: a peer stands still; %s goes on until it leaves or ends", how)


class _NCCLWork:
    """A broadcast under way."""

    def __init__(self, backend: NCCLBackend, ended: torch.cuda.Event, buffer: torch.Tensor) -> None:
        self._backend, self._ended = backend, ended
        self._buffer: torch.Tensor | None = buffer  # not given to others meanwhile

    def wait(self) -> None:
        self._backend.wait_until(self._has_ended, "end a broadcast")
        self._buffer = None

    def _has_ended(self) -> bool:
        if self._ended.query():  # type: ignore[no-untyped-call]
            return True
        self._backend.raise_if_broken()
        return False


class NCCLCheckpointEngine(CollectiveCheckpointEngine):
    """Broadcasts over NCCL, to GPUs other than the trainer's; tensors on the CPU are copied to the GPU first."""

    name: ClassVar[str] = "nccl"
    backend_cls: ClassVar[type[CollectiveBackend]] = NCCLBackend


def version() -> int:
    """NCCL's version, such as 22809.

    Raises:
        ConfigError: there is no NCCL.
    """
    found = ctypes.c_int()
    _check(_library().ncclGetVersion(ctypes.byref(found)), "tell its version")
    return found.value


def _comes_true(condition: Callable[[], bool], ends_at: float) -> bool:
    """Looks until the condition holds, or that moment has come."""
    while not condition():
        if time.monotonic() > ends_at:
            return False
        time.sleep(_POLL_S)
    return True


def _check_peers(peers: list[Whereabouts], rank: int) -> None:
    """Refuses what NCCL would refuse, or hang on, in words that say what to change; the same on every rank."""
    mine = peers[rank]
    seen: dict[tuple[str, str], int] = {}
    for other, peer in enumerate(peers):
        if peer.nccl // 100 != mine.nccl // 100:
            raise ConfigError(
                f"rank {other} runs NCCL {_dotted(peer.nccl)}, rank {rank} {_dotted(mine.nccl)}; install the same "
                f"torch beside the trainer and beside vLLM"
            )
        first = seen.setdefault((peer.host, peer.gpu), other)
        if first != other:
            raise ConfigError(
                f"ranks {first} and {other} are on the same GPU ({peer.gpu}), which NCCL refuses; use engine='ipc'"
            )


def _dotted(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * 128),)


class _Config(ctypes.Structure):
    """The part of `ncclConfig_t` that NCCL 2.14 has; later ones take their defaults for the rest."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL("libnccl.so.2")  # the one that torch has loaded
    except OSError as error:
        raise ConfigError(f"engine='nccl': NCCL's library cannot be loaded: {error}") from error
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def _check(status: int, doing: str) -> None:
    if status not in (_SUCCESS, _IN_PROGRESS):
        raise EngineError(f"NCCL could not {doing}: {_text(status)}")


def _text(status: int) -> str:
    text: bytes = _library().ncclGetErrorString(ctypes.c_int(status))
    return f"{text.decode()} ({status})"
