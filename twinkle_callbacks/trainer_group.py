"""The trainer's ranks as far as a synchronizer needs them: who leads, and one rank's message to all."""

from __future__ import annotations

import torch

from twinkle_callbacks.sources.gather import wire_device


class TrainerGroup:
    """All ranks of torch.distributed's default group, or a single process when there is none."""

    @property
    def _distributed(self) -> bool:
        return torch.distributed.is_available() and torch.distributed.is_initialized() and self.size > 1

    @property
    def size(self) -> int:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 1
        return torch.distributed.get_world_size()

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def rank(self) -> int:
        return 0 if self.size == 1 else torch.distributed.get_rank()

    def first_failure(self, failure: str) -> tuple[int, str] | None:
        """Collective: every rank returns the lowest rank that gave a text, and the text; None if all are empty."""
        if not self._distributed:
            return (0, failure) if failure else None
        first = torch.tensor([self.rank if failure else self.size], device=_collective_device())
        torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        if (rank := int(first)) == self.size:
            return None
        return rank, self.share(failure.encode() if rank == self.rank else None, rank).decode()

    def share(self, message: bytes | None, source: int = 0) -> bytes:
        """Collective: every rank returns the message of rank `source`. Plain bytes, never pickle."""
        if not self._distributed:
            assert message is not None
            return message
        return broadcast(message, source)

    def connect(self) -> None:
        """Collective: makes the links of gathers, in which not every rank may take part.

        torch wants all ranks of a group in its first operation on a device, see `torch.distributed.batch_isend_irecv`.
        """
        if self._distributed and (device := wire_device()).type != "cpu":
            torch.distributed.all_reduce(torch.zeros(1, device=device))


def broadcast(message: bytes | None, source: int, group: torch.distributed.ProcessGroup | None = None) -> bytes:
    """Collective: every rank of a process group (the default one for None) returns the message of global rank `source`.

    Plain bytes, never pickle.
    """
    device = _collective_device()
    length = torch.tensor([len(message) if message is not None else 0], device=device)
    torch.distributed.broadcast(length, source, group)
    data = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if message:
        data.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
    torch.distributed.broadcast(data, source, group)
    return bytes(data.cpu().numpy())


def _collective_device() -> torch.device:
    """A device on which the default group can broadcast: the CPU if it can, else this rank's accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "cpu:" in torch.distributed.get_backend_config():
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
