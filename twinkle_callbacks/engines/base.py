"""The seam between a synchronizer and a transport: Twinkle's `CheckpointEngine` interface."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch

from twinkle_callbacks.buckets.layout import ALIGNMENT_BYTES
from twinkle_callbacks.errors import ConfigError

DEFAULT_BUCKET_BYTES = 512 << 20
TIMEOUT_ENV = "TWINKLE_CKPT_HCCL_META_TIMEOUT_S"


class SendStats(NamedTuple):
    """What one `send_weights` did, on the master.

    Attributes:
        tensors: number of tensors sent.
        payload_bytes: bytes of all buckets, alignment gaps included.
        source_s: seconds spent waiting for the source's next tensor.
        digest: digest of the stream in hexadecimal, empty when not computed.
        digests: 64-bit digest of each tensor in stream order, packed little-endian.
    """

    tensors: int
    payload_bytes: int
    source_s: float
    digest: str
    digests: bytes


class CheckpointEngine(ABC):
    """Carries named tensors from one master to every receiver.

    Lifecycle, and the process that runs each step:

    1. `is_master = True` on the one rank that sends (trainer rank 0).
    2. `prepare()` on every rank; the master's result is the metadata that receivers need. It contains no secret.
    3. `init_process_group(rank, world_size, master_metadata=...)` on the master (rank 0) and each receiver (1, 2, ...),
       at the same time; trainer ranks that only take part in gathers pass -1. It proves to each side that the other has
       the token, and fails on all sides when rank, world size or bucket size disagree.
    4. `send_weights(weights)` on every trainer rank, `receive_weights()` on every receiver, any number of times.
    5. `finalize()` on every rank, any number of times; also after an error, where it ends what is under way.

    Guaranteed: receivers yield exactly the names, dtypes, shapes and bytes that the master's iterable yielded, in its
    order, or raise; an error of the iterable reaches every receiver with its cause; each step ends within `timeout`
    seconds a blocking operation, or raises `DeadlineError`. Not guaranteed: secrecy of the tensors on the wire.
    Engines that share memory with receivers, not only bytes, show them such tensors themselves as last: on the master,
    `lasts(tensor)` says that nobody changes or reuses a tensor's memory while receivers work with the stream, and that
    it was written before `send_weights` was called, or on the current stream of the thread that draws it. Unless it is
    set, that is believed of the `torch.nn.Parameter`s.
    After an error in step 3 or 4 the engine is poisoned: only `finalize()` and then `prepare()` work.
    """

    name: ClassVar[str]

    def __init__(
        self,
        bucket_size: int = DEFAULT_BUCKET_BYTES,
        timeout: float | None = None,
        *,
        token: str | None = None,
        host: str = "127.0.0.1",
        verify: bool = True,
    ) -> None:
        """Makes an engine; opens nothing.

        Args:
            bucket_size: bytes of one wire bucket, a multiple of 512; the same on every rank.
            timeout: seconds one blocking operation may take. Default: `$TWINKLE_CKPT_HCCL_META_TIMEOUT_S`, else 300.
            token: shared secret. Default: `$TWINKLE_TOKEN`, else the user's token file.
            host: on the master, the address it listens on and receivers reach it at.
            verify: compute digests: on the master of what it sends, on receivers of what arrived, compared there.

        Raises:
            ConfigError: bucket size or timeout are not usable.
        """
        whole = hasattr(bucket_size, "__index__")
        if not whole or bucket_size < ALIGNMENT_BYTES or bucket_size % ALIGNMENT_BYTES:
            raise ConfigError(
                f"bucket_size={bucket_size}: must be a whole number of bytes, a positive multiple of {ALIGNMENT_BYTES}"
            )
        self.bucket_size = bucket_size
        self.timeout_s = _timeout_s(timeout)
        self.is_master = False
        self.host = host
        self.verify = verify
        self.stats: SendStats | None = None
        self.lasts: Callable[[torch.Tensor], bool] = _is_parameter
        self._token = token

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Opens what receivers connect to. Returns plain values: on the master where it is, elsewhere nothing."""

    @classmethod
    def build_topology(
        cls, trainer_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Returns the arguments of `init_process_group` for each trainer rank and for each rollout rank.

        The first trainer rank is the master (rank 0), the others get -1, rollout workers 1 to `rollout_world_size`.

        Args:
            trainer_world_size: number of trainer processes.
            rollout_world_size: number of rollout workers, over all servers.
            metadata: what `prepare()` returned on each trainer rank; the master's is used.
        """
        world_size = rollout_world_size + 1
        trainer: dict[str, list[Any]] = {
            "rank": [0] + [-1] * (trainer_world_size - 1),
            "world_size": [world_size] * trainer_world_size,
            "master_metadata": [metadata[0]] * trainer_world_size,
        }
        rollout: dict[str, list[Any]] = {
            "rank": list(range(1, world_size)),
            "world_size": [world_size] * rollout_world_size,
            "master_metadata": [metadata[0]] * rollout_world_size,
        }
        return trainer, rollout

    @abstractmethod
    def init_process_group(self, rank: int, world_size: int, *, master_metadata: dict[str, Any]) -> None:
        """Joins the group; blocks until every rank has joined.

        Raises:
            AuthenticationError: the other side has another token.
            EngineError: rank, world size, bucket size or version disagree; the message says whose.
            DeadlineError: some ranks did not come; the message names them.
        """

    def begin_stream(self, *, repeats: bool) -> None:  # noqa: B027  # most have nothing to begin
        """On the master: the next `send_weights` comes soon, with its tensors as they are now.

        Optional; waits for nothing.

        Args:
            repeats: whether it sends what the last one sent: the same names, dtypes and shapes, each tensor that lasts
                where it lay. An engine that knows where that is does not draw the iterable.
        """

    @abstractmethod
    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Sends a stream of named tensors; on ranks that are not the master it only drains `weights`.

        A tensor is read before the next one is requested. Returns when every receiver has acknowledged; `stats`
        then tells what was sent. Any dtype that torch can view as bytes; any shape; contiguous or not; on the CPU or
        the engine's device.

        Raises:
            Whatever `weights` raises, after telling the receivers; EngineError, DeadlineError, DigestMismatchError.
        """

    @abstractmethod
    def receive_weights(self) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yields the tensors of one `send_weights`. Each is a view that is valid until the next one is requested.

        Raises:
            PeerError (or the sender's own error type): the sender failed; `EngineError`, `DeadlineError`,
            `DigestMismatchError`.
        """

    def stays(self, tensor: torch.Tensor) -> bool:
        """On a receiver: whether a tensor that was yielded stays as it is until the next stream: the sender's own."""
        return False

    @property
    @abstractmethod
    def sent_digests(self) -> bytes:
        """On a receiver, after a stream: the master's digest of each tensor, packed; empty if it computed none."""

    @abstractmethod
    def post_receipt(self, topic: str, payload: bytes) -> None:
        """On a receiver: leaves a short authenticated message for the master, outside the data path."""

    def is_master_there(self) -> bool:
        """On a receiver: whether the master still answers; asks it. Engines that cannot tell say yes."""
        return True

    @abstractmethod
    def collect_receipts(self, topic: str, ranks: Iterable[int]) -> dict[int, bytes]:
        """On the master: waits for the message of each of these ranks on this topic."""

    @abstractmethod
    def finalize(self) -> None:
        """Leaves the group and frees buffers, threads and ports. Idempotent; never raises for a peer that is gone."""


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _timeout_s(timeout: float | None) -> float:
    if timeout is None:
        text = os.environ.get(TIMEOUT_ENV, "300")
        if not text.isdecimal() or int(text) == 0:
            raise ConfigError(f"{TIMEOUT_ENV}={text!r}: must be a whole number of seconds above 0")
        return float(text)
    if not (math.isfinite(timeout) and timeout > 0):
        raise ConfigError(f"timeout={timeout}: must be a number of seconds above 0")
    return float(timeout)
