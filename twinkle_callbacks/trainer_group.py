"""The trainer's ranks as far as a synchronizer needs them: who leads, and one message from the leader to all."""

from __future__ import annotations

import torch


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
        return self.size == 1 or torch.distributed.get_rank() == 0

    def share(self, message: bytes | None) -> bytes:
        """Collective: every rank returns the leader's message. Plain bytes, never pickle."""
        if not self._distributed:
            assert message is not None
            return message
        device = _collective_device()
        length = torch.tensor([len(message) if message is not None else 0], device=device)
        torch.distributed.broadcast(length, 0)
        data = torch.zeros(int(length), dtype=torch.uint8, device=device)
        if message:
            data.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        torch.distributed.broadcast(data, 0)
        return bytes(data.cpu().numpy())


def _collective_device() -> torch.device:
    """A device on which the default group can broadcast: the CPU if it can, else this rank's accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "cpu:" in torch.distributed.get_backend_config():
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
