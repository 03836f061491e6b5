"""The little of CUDA that torch does not show: which allocation a tensor lies in, and its handle for other processes.

Called through the driver's own library (`libcuda`, CUDA Driver API, sections Memory Management and Unified Addressing).
"""

from __future__ import annotations

import ctypes
import functools
import os
import secrets
from typing import Any

import msgspec
import torch

from twinkle_callbacks.errors import ConfigError, EngineError, text_of

_LOADED = secrets.token_hex(8)
_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """What another process needs to see an allocation.

    Attributes:
        number: unique in the process that owns it; never used again for another allocation.
        process: that process, told from those of other containers with the same number.
        address: where the allocation begins there.
        nbytes: its size.
        handle: CUDA's own; empty if the memory cannot be shared.
    """

    number: int
    process: str
    address: int
    nbytes: int
    handle: bytes


def require_device() -> int:
    """The index of this thread's GPU.

    Raises:
        ConfigError: there is none.
    """
    if not torch.cuda.is_available():
        raise ConfigError("this engine needs a CUDA device, and torch sees none here; use engine='gloo' or 'shm'")
    return torch.cuda.current_device()


def uuid_of(index: int) -> str:
    """The UUID of a GPU, the same in every process."""
    return str(torch.cuda.get_device_properties(index).uuid)


class Allocation:
    """GPU memory of our own, freed when it is closed, whatever else torch's allocator keeps."""

    def __init__(self, nbytes: int) -> None:
        torch.cuda.current_stream().synchronize()  # makes this thread's context current
        address = ctypes.c_uint64()
        if _driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes)):
            torch.cuda.empty_cache()
            try:
                _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
            except EngineError as error:
                raise no_room(nbytes, error) from None
        self.address = int(address.value)
        self.tensor = tensor_at(self.address, nbytes)

    def free(self) -> None:
        """Gives the memory back; nobody may look at it any more."""
        address, self.address = self.address, 0
        if address:
            _call("cuMemFree_v2", ctypes.c_uint64(address))


def torch_bucket(nbytes: int, device: torch.device) -> torch.Tensor:
    """A flat uint8 tensor of torch's own memory.

    Raises:
        EngineError: there is none.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise no_room(nbytes, error) from None


def no_room(nbytes: int, error: Exception) -> EngineError:
    """What to say when there is no memory for a bucket."""
    free, total = torch.cuda.mem_get_info()
    return EngineError(
        f"no memory for a bucket of {nbytes / (1 << 20):.1f} MiB: {free >> 20} of {total >> 20} MiB are free on the "
        f"GPU; make bucket_size_mb smaller ({type(error).__name__}: {text_of(error)})"
    )


def allocation_number(address: int) -> int:
    """The number of the allocation that an address lies in.

    Raises:
        EngineError: it is no memory of a GPU.
    """
    number = ctypes.c_uint64()
    _call("cuPointerGetAttribute", ctypes.byref(number), ctypes.c_int(_BUFFER_ID), ctypes.c_uint64(address))
    return int(number.value)


def ticket_of(address: int) -> Ticket:
    """The ticket of the allocation that an address lies in; without a handle where CUDA gives none."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    handle = (ctypes.c_char * _HANDLE_BYTES)()
    failed = _driver().cuIpcGetMemHandle(ctypes.byref(handle), base)  # such as expandable segments
    known = b"" if failed else bytes(handle.raw)
    return Ticket(allocation_number(address), _this_process(), int(base.value), int(size.value), known)


class Mapping:
    """Another process's allocation, seen from this one. In the process that owns it, the memory itself."""

    def __init__(self, ticket: Ticket) -> None:
        self._opened = ctypes.c_uint64()
        address = ticket.address
        if ticket.process != _this_process():
            handle = _Handle.from_buffer_copy(ticket.handle)
            torch.cuda.current_stream().synchronize()  # makes this thread's context current
            try:
                _call("cuIpcOpenMemHandle_v2", ctypes.byref(self._opened), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
            except EngineError as error:
                raise EngineError(
                    f"cannot map the trainer's GPU memory ({error}): engine='ipc' needs trainer and rollout on one "
                    f"GPU of one host (containers: --ipc=host); else use engine='nccl'"
                ) from None
            address = int(self._opened.value)
        self.tensor = tensor_at(address, ticket.nbytes)

    def close(self) -> None:
        """Unmaps it; nobody may look at it any more."""
        address, self._opened = self._opened, ctypes.c_uint64()
        if address.value:
            _call("cuIpcCloseMemHandle", address)


def tensor_at(address: int, nbytes: int) -> torch.Tensor:
    """Memory of the current GPU as a flat uint8 tensor, which does not own it."""
    return torch.as_tensor(_Memory(address, nbytes), device="cuda")


def _this_process() -> str:
    return f"{os.getpid()} {_LOADED}"  # a forked process has the same second part


class _Memory:
    """Memory as torch takes it from other libraries (CUDA Array Interface, version 3)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigError(f"the CUDA driver's library cannot be loaded: {error}") from error


def _call(name: str, *args: Any) -> None:
    status = getattr(_driver(), name)(*args)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        raise EngineError(f"{name}: {(text.value or b'error').decode()} ({status})")
