"""The trainer's ranks as far as a synchronizer needs them: who leads, and how all come to one outcome of each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec
import torch

from twinkle_callbacks.errors import RolloutError, SourceError, SyncError, TwinkleError, from_wire, text_of
from twinkle_callbacks.sources.gather import wire_device

T = TypeVar("T")


class _Outcome(msgspec.Struct):
    """What rank 0 tells the others after each step it takes alone."""

    value: Any = None
    error_type: str = ""
    error: str = ""
    rollouts: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.error if self.error_type == "SyncError" else f"{self.error_type}: {self.error}"


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

    def agreed(self, call: Callable[[], T], phase: str = "") -> T:
        """Runs a local step on every rank: all go on, or all raise, with the cause of the lowest rank that failed.

        With a `phase`, errors become `SyncError`s of that phase.
        """
        result, failure = None, None
        try:
            result = call()
        except Exception as error:  # whatever a trained module's own code raises
            failure = error
        first = self.first_failure(text_of_failure(failure))
        if first is None:
            return cast("T", result)
        rank, text = first
        text = f"trainer rank {rank}: {text}" if rank else text
        if phase:
            raise SyncError(f"push failed in the phase {phase!r}: {text}", phase) from failure
        raise failure if isinstance(failure, TwinkleError) else SourceError(text) from failure

    def on_leader(self, call: Callable[[], Any], phase: str = "") -> Any:
        """Runs a step on rank 0 alone and shares its result: every rank returns it, or raises its error.

        With a `phase`, errors become `SyncError`s of that phase.
        """
        outcome, cause = _Outcome(), None
        if self.is_leader:
            try:
                outcome.value = msgspec.to_builtins(call())
            except Exception as error:  # shared with the other ranks, and raised on all of them
                cause = error
                rollouts = error.rollouts if isinstance(error, TwinkleError) else ()
                outcome = _Outcome(None, type(error).__name__, text_of(error), rollouts)
            outcome = msgspec.msgpack.decode(self.share(msgspec.msgpack.encode(outcome)), type=_Outcome)
        else:
            outcome = msgspec.msgpack.decode(self.share(None), type=_Outcome)
        if not outcome.error_type:
            return outcome.value
        if phase:
            raise SyncError(f"push failed in the phase {phase!r}: {outcome.text}", phase, outcome.rollouts) from cause
        if isinstance(cause, TwinkleError):
            raise cause
        raise from_wire(outcome.error_type, outcome.error, RolloutError) from cause


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


def text_of_failure(failure: Exception | None) -> str:
    """How a failure is told to the other ranks; empty for none."""
    return "" if failure is None else f"{type(failure).__name__}: {text_of(failure)}"
