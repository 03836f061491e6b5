"""All rollouts of a synchronizer and the engine that joins them, as trainer rank 0 sees them.

Each server has its own rank offset in one group, so several plain servers are synced by one broadcast.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from twinkle_callbacks import auth
from twinkle_callbacks.config import SyncSettings
from twinkle_callbacks.engines import get_engine
from twinkle_callbacks.engines.base import CheckpointEngine
from twinkle_callbacks.errors import (
    ConfigError,
    DeadlineError,
    RolloutError,
    RolloutUnreachableError,
    SyncError,
    TwinkleError,
    from_wire,
)
from twinkle_callbacks.report import ReplicaReport
from twinkle_callbacks.rollouts import Rollout, open_rollout
from twinkle_callbacks.worker.messages import ABORT, RECEIVE, Committed, Joined, JoinRequest, Staged

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Replica:
    """One rollout and the ranks of its workers in the engine's group."""

    rollout: Rollout
    ranks: range
    joined: list[Joined] = field(default_factory=list)
    staged: list[Staged] = field(default_factory=list)
    in_update: bool = False
    paused: bool = False
    intact: bool = True

    @property
    def name(self) -> str:
        return self.rollout.name


class Fleet:
    """Connects to the rollouts, takes them through a push, and back to order when it fails. Rank 0 only."""

    def __init__(self, settings: SyncSettings) -> None:
        self.settings = settings
        self.engine: CheckpointEngine | None = None
        self.replicas: list[Replica] = []
        self._token = auth.load_token(settings.token)
        self._push = 0

    def connect(self) -> None:
        """The handshake: joins every worker of every rollout into one new group.

        Raises:
            ConfigError, RolloutError, AuthenticationError, EngineError, DeadlineError: says which and what to change.
        """
        self.disconnect()
        settings = self.settings
        rollouts = [open_rollout(r, token=self._token, timeout_s=settings.timeout_s) for r in settings.rollouts]
        first_rank = 1
        for rollout in rollouts:
            size = rollout.world_size()
            self.replicas.append(Replica(rollout, range(first_rank, first_rank + size)))
            first_rank += size
        engine = self.engine = self._make_engine(rollouts)
        metadata = engine.prepare()
        self._each(lambda replica: replica.rollout.join(self._invitation(replica, metadata, first_rank)))
        engine.init_process_group(0, first_rank, master_metadata=metadata)
        for replica, joined in zip(self.replicas, self._receipts("joined", Joined), strict=True):
            replica.joined = joined
            replica.in_update = any(worker.in_update for worker in joined)
        self._each(self._end_update)
        self._check_servers()
        logger.info("synced with %s over engine %s", ", ".join(r.name for r in self.replicas), engine.name)

    def _make_engine(self, rollouts: Sequence[Rollout]) -> CheckpointEngine:
        name = self.settings.engine
        if name == "auto":
            name = "gloo"
            logger.info("engine=auto: chose gloo, which reaches every host and device from the CPU")
        engine = get_engine(name)(
            bucket_size=self.settings.bucket_size_bytes,
            timeout=self.settings.timeout_s,
            token=self._token,
            host=_address_towards([rollout.host for rollout in rollouts]),
            verify=self.settings.verify != "off",
        )
        engine.is_master = True
        return engine

    def _invitation(self, replica: Replica, metadata: dict[str, object], world_size: int) -> dict[str, object]:
        request = JoinRequest(
            engine=str(metadata["engine"]),
            metadata=metadata,
            rank_offset=replica.ranks.start,
            world_size=world_size,
            bucket_size=self.settings.bucket_size_bytes,
            timeout_s=self.settings.timeout_s,
            verify=self.settings.verify != "off",
        )
        return request.signed(self._token)

    def _check_servers(self) -> None:
        """Compares what the servers run with the settings and with each other."""
        first = self.replicas[0]
        for replica in self.replicas:
            runs = replica.joined[0]
            if runs.enable_lora and self.settings.merge_and_sync:
                raise RolloutError(
                    f"{replica.name} runs with enable_lora=True, but merge_and_sync=True sends merged weights; "
                    f"start the server without --enable-lora, or set merge_and_sync=False"
                )
            if not runs.enable_lora and not self.settings.merge_and_sync:
                raise RolloutError(
                    f"{replica.name} runs with enable_lora=False, but merge_and_sync=False sends an adapter; "
                    f"start the server with --enable-lora, or set merge_and_sync=True"
                )
            if runs.quantization is not None:
                raise RolloutError(
                    f"{replica.name} runs a model quantized with {runs.quantization}, which this version cannot sync; "
                    f"start the server without --quantization"
                )
            if _shape(runs) != _shape(first.joined[0]):
                raise RolloutError(
                    f"the rollouts serve different models: {first.name} {_shape(first.joined[0])}, "
                    f"{replica.name} {_shape(runs)}; start all with the same one"
                )

    @property
    def dtype(self) -> str:
        """The dtype that the servers run, by its torch name."""
        return self.replicas[0].joined[0].dtype

    def begin(self) -> None:
        """Opens an update session on each rollout and lets its workers receive."""
        self._push += 1
        self._each(self._begin)

    def _begin(self, replica: Replica) -> None:
        replica.rollout.start()
        replica.in_update = True
        replica.rollout.update({"action": RECEIVE, "push": self._push})

    def collect_staged(self) -> str:
        """Waits until every worker holds the whole stream. Returns its digest."""
        for replica, staged in zip(self.replicas, self._receipts(f"staged-{self._push}", Staged), strict=True):
            replica.staged = staged
            _raise_failure(replica, staged, "transfer")
        return self.replicas[0].staged[0].digest

    def commit(self, version: int) -> list[ReplicaReport]:
        """Pauses, commits on every rollout, sets the version, resumes.

        Raises:
            SyncError: some did not commit. Those that did serve the new version; the error names the others.
        """
        keep_cache = self.settings.stale_kv == "keep"
        self._each(lambda replica: self._pause(replica, self.settings.pause_mode, clear_cache=not keep_cache))
        failures = self._attempt_each(self._finish)
        reports = []
        for replica in [r for r in self.replicas if id(r) not in failures]:
            try:
                reports.append(self._read_commit(replica, version))
            except TwinkleError as error:
                failures[id(replica)] = error
        for replica in [r for r in self.replicas if id(r) not in failures]:
            replica.rollout.set_version(version)
            if not keep_cache:
                replica.rollout.reset_cache()
        if failures:
            raise next(iter(failures.values()))
        self._each(self._resume)
        return reports

    def _read_commit(self, replica: Replica, version: int) -> ReplicaReport:
        committed = self._receipts_of(replica, f"committed-{self._push}", Committed)
        replica.intact = all(worker.intact for worker in committed)
        _raise_failure(replica, committed, "commit")
        staged = replica.staged[0]
        seconds = max(worker.seconds for worker in committed)
        return ReplicaReport(replica.name, version, staged.digest, staged.tensors, seconds)

    def _pause(self, replica: Replica, mode: str, *, clear_cache: bool) -> None:
        replica.rollout.pause(mode, clear_cache=clear_cache)
        replica.paused = True

    def _finish(self, replica: Replica) -> None:
        try:
            replica.rollout.finish()
        except (DeadlineError, RolloutUnreachableError):
            replica.intact = False  # nobody knows how far it came
            raise
        replica.in_update = False

    def _resume(self, replica: Replica) -> None:
        if replica.paused:
            replica.rollout.resume()
            replica.paused = False

    def _end_update(self, replica: Replica) -> None:
        if replica.in_update:
            replica.rollout.update({"action": ABORT})
            self._finish(replica)

    def abort(self) -> None:
        """After a failure: closes open sessions and resumes every rollout whose weights are whole, old or new.

        A rollout whose commit broke off stays paused until a push succeeds. Logs what it cannot put in order; raises
        nothing.
        """
        for replica in self.replicas:
            try:
                self._end_update(replica)
                if replica.intact:
                    self._resume(replica)
                else:
                    logger.error("%s failed in the commit and stays paused until the next push succeeds", replica.name)
            except TwinkleError as error:
                logger.error("%s could not be put in order: %s", replica.name, error)
        self.disconnect()

    def disconnect(self) -> None:
        """Leaves the engine's group and closes connections. Idempotent."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.finalize()
        for replica in self.replicas:
            replica.rollout.close()
        self.replicas = []

    def _receipts(self, topic: str, kind: type[T]) -> list[list[T]]:
        return [self._receipts_of(replica, topic, kind) for replica in self.replicas]

    def _receipts_of(self, replica: Replica, topic: str, kind: type[T]) -> list[T]:
        assert self.engine is not None
        messages = self.engine.collect_receipts(topic, replica.ranks)
        return [msgspec.msgpack.decode(messages[rank], type=kind) for rank in replica.ranks]

    def _each(self, call: Callable[[Replica], None]) -> None:
        for error in self._attempt_each(call).values():
            raise error

    def _attempt_each(self, call: Callable[[Replica], None]) -> dict[int, TwinkleError]:
        """Calls all rollouts side by side and waits for all; the errors by the id of the replica."""

        def attempt(replica: Replica) -> TwinkleError | None:
            try:
                call(replica)
            except TwinkleError as error:
                return error
            return None

        if len(self.replicas) == 1:  # stays on the caller's thread, for an engine in this process
            outcomes = [attempt(self.replicas[0])]
        else:
            with ThreadPoolExecutor(len(self.replicas), thread_name_prefix="twinkle-rollout") as pool:
                outcomes = list(pool.map(attempt, self.replicas))
        return {id(r): error for r, error in zip(self.replicas, outcomes, strict=True) if error is not None}


def _raise_failure(replica: Replica, receipts: Sequence[Staged] | Sequence[Committed], phase: str) -> None:
    receipts_by_rank: Iterable[tuple[int, Staged | Committed]] = zip(replica.ranks, receipts, strict=True)
    for rank, receipt in receipts_by_rank:
        if receipt.failure is not None:
            cause = from_wire(receipt.failure.type, receipt.failure.message, RolloutError)
            raise SyncError(f"{replica.name} (rank {rank}): {cause}", phase, (replica.name,)) from cause


def _shape(runs: Joined) -> str:
    return f"{runs.architecture}(hidden_size={runs.hidden_size}, layers={runs.layers}, vocab_size={runs.vocab_size})"


def _address_towards(hosts: Sequence[str]) -> str:
    """This host's address that all of `hosts` can reach: loopback if all are here, else that of the outgoing interface.

    Raises:
        ConfigError: a host's name does not resolve.
    """
    address = "127.0.0.1"
    for host in hosts:
        try:
            family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing; only picks the interface
                mine = str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError(f"rollouts: the host {host!r} cannot be resolved or reached: {error}") from error
        if not ipaddress.ip_address(mine).is_loopback:
            address = mine
    return address
