"""CUDA IPC: trainer and rollout on one GPU, in processes of their own, with nothing copied that need not be.

Tensors that last are mapped where they are: each allocation's handle is made once, and opened once, however many
tensors lie in it. All others go through two buckets on the GPU, which are mapped too. Handles are plain bytes, never
pickled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec
import torch

from twinkle_callbacks.engines.backend import CollectiveBackend, Place
from twinkle_callbacks.engines.collective import CollectiveCheckpointEngine
from twinkle_callbacks.engines.cuda import (
    Allocation,
    Mapping,
    Ticket,
    allocation_number,
    require_device,
    ticket_of,
    torch_bucket,
)
from twinkle_callbacks.engines.mapped import MappedBackend
from twinkle_callbacks.engines.whereabouts import Whereabouts, exchange
from twinkle_callbacks.errors import ConfigError, ProtocolError

if TYPE_CHECKING:
    from torch.distributed import Store


class IPCBackend(MappedBackend):
    """Buckets and lasting tensors in GPU memory that all ranks see."""

    def __init__(self) -> None:
        super().__init__()
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._made: list[Allocation] = []
        self._tickets: dict[int, tuple[Ticket, bytes]] = {}  # of this process's allocations, by number
        self._places: dict[int, Place | None] = {}  # of tensors, by address, until torch gives memory back
        self._freed: int | None = None
        self._bucket_tickets: set[bytes] = set()
        self._mappings: dict[bytes, Mapping] = {}  # of the master's allocations, by ticket

    @classmethod
    def device(cls) -> int | None:
        return require_device()

    def connect(self, store: Store, rank: int, world_size: int, *, host: str, timeout_s: float) -> None:
        _refuse_other_gpus(exchange(store, rank, world_size))
        super().connect(store, rank, world_size, host=host, timeout_s=timeout_s)

    def allocate_bucket(self, nbytes: int) -> torch.Tensor:
        return torch_bucket(nbytes, self._device)

    def create(self, nbytes: int) -> tuple[torch.Tensor, bytes]:
        allocation = Allocation(nbytes)
        self._made.append(allocation)
        return allocation.tensor, msgspec.msgpack.encode(ticket_of(allocation.address))

    def map(self, ticket: bytes, nbytes: int) -> torch.Tensor:
        self._bucket_tickets.add(ticket)
        return self._mapping(ticket).tensor[:nbytes]

    def filled(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def consumed(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def release(self, side: int) -> None:
        torch.cuda.current_stream(self._device).synchronize()  # digests of what is in it
        super().release(side)

    def begin_stream(self) -> bool:
        torch.cuda.synchronize(self._device)  # whatever the trainer began, on whichever stream, is written
        freed = torch.cuda.memory_stats_as_nested_dict(self._device).get("num_device_free")
        same = freed is not None and freed == self._freed
        if not same:  # an address may stand for other memory by now
            self._places, self._freed = {}, freed
        return same

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        address = tensor.data_ptr()
        if not tensor.is_cuda or not address or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            return None
        if address not in self._places:
            self._places[address] = self._find(tensor, address)
        return self._places[address]

    def _find(self, tensor: torch.Tensor, address: int) -> Place | None:
        if tensor.device != self._device:
            return None
        number = allocation_number(address)
        if number not in self._tickets:
            ticket = ticket_of(address)
            self._tickets[number] = ticket, msgspec.msgpack.encode(ticket)
        ticket, encoded = self._tickets[number]
        return Place(encoded, address - ticket.address) if ticket.handle else None

    def view(self, place: Place, nbytes: int) -> torch.Tensor:
        whole = self._mapping(place.ticket).tensor
        if not 0 <= place.offset <= place.offset + nbytes <= whole.numel():
            raise ProtocolError(f"bytes {place.offset} to {place.offset + nbytes} are not in the sender's allocation")
        return whole[place.offset : place.offset + nbytes]

    def unmap_all_but(self, tickets: set[bytes]) -> None:
        gone = [ticket for ticket in self._mappings if ticket not in tickets and ticket not in self._bucket_tickets]
        if gone:
            torch.cuda.synchronize(self._device)
        for ticket in gone:
            self._mappings.pop(ticket).close()

    def close(self) -> None:
        try:
            torch.cuda.synchronize(self._device)
        finally:  # peers see that this side has left, even if its device is broken
            super().close()
        mappings, self._mappings = self._mappings, {}
        made, self._made = self._made, []
        for mapping in mappings.values():
            mapping.close()
        for allocation in made:
            allocation.free()

    def _mapping(self, encoded: bytes) -> Mapping:
        if encoded not in self._mappings:
            self._mappings[encoded] = Mapping(msgspec.msgpack.decode(encoded, type=Ticket))
        return self._mappings[encoded]


class IPCCheckpointEngine(CollectiveCheckpointEngine):
    """Shares GPU memory with a rollout on the same GPU; tensors on the CPU are copied to the GPU first."""

    name: ClassVar[str] = "ipc"
    backend_cls: ClassVar[type[CollectiveBackend]] = IPCBackend


def _refuse_other_gpus(ranks: list[Whereabouts]) -> None:
    for rank, where in enumerate(ranks):
        if where.gpu != ranks[0].gpu:
            raise ConfigError(
                f"rank {rank} is on GPU {where.gpu}, the master on {ranks[0].gpu}: engine='ipc' needs both on the same "
                f"one; use engine='nccl'"
            )
