"""All rollouts of a synchronizer and the engine that joins them, as trainer rank 0 sees them.

Each server has its own rank offset in one group, so several plain servers are synced by one broadcast.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from twinkle_callbacks import auth
from twinkle_callbacks.addresses import address_towards
from twinkle_callbacks.buckets.layout import align
from twinkle_callbacks.config import SyncSettings
from twinkle_callbacks.engines import get_engine
from twinkle_callbacks.engines.base import CheckpointEngine
from twinkle_callbacks.engines.choice import choose
from twinkle_callbacks.engines.whereabouts import Whereabouts
from twinkle_callbacks.errors import (
    ConfigError,
    DeadlineError,
    RolloutError,
    RolloutUnreachableError,
    SyncError,
    TwinkleError,
)
from twinkle_callbacks.replica import Replica, attempt_each, concerning, raise_failure
from twinkle_callbacks.report import ReplicaReport
from twinkle_callbacks.rollouts import Rollout, open_rollout
from twinkle_callbacks.worker.messages import (
    ABORT,
    CHECK,
    LEAVE,
    RECEIVE,
    AdapterCall,
    Checked,
    Committed,
    Joined,
    JoinRequest,
    Staged,
)

logger = logging.getLogger(__name__)
AUTO = "auto"
T = TypeVar("T")


class Fleet:
    """Connects to the rollouts, takes them through a push, and back to order when it fails. Rank 0 only."""

    def __init__(self, settings: SyncSettings, total_bytes: int) -> None:
        """Opens nothing; `total_bytes` are about those of a push, alignment included."""
        self.settings = settings
        self._total_bytes = max(total_bytes, 1)
        self.engine: CheckpointEngine | None = None
        self.replicas: list[Replica] = []
        self._token = auth.load_token(settings.token)
        self._client = secrets.token_hex(8)
        self._push_number = 0
        self._version = 0
        self._engine_name = settings.engine
        self._stopped: set[str] = set()  # names of rollouts that may not serve before a push succeeds

    def connect(self) -> None:
        """The handshake: joins every worker of every rollout into one new group.

        Raises:
            ConfigError, RolloutError, AuthenticationError, EngineError, DeadlineError: says which and what to change.
        """
        if self._engine_name == AUTO:
            self._connect("gloo")
            workers = [worker.whereabouts for replica in self.replicas for worker in replica.joined]
            self._engine_name, why = choose(Whereabouts.of_this_process(), workers, self.bucket_size_bytes)
            logger.info("engine=auto: chose %s: %s", self._engine_name, why)
            if self._engine_name == "gloo":
                return
        self._connect(self._engine_name)

    def _connect(self, engine_name: str) -> None:
        self.disconnect()
        settings = self.settings
        rollouts = [open_rollout(r, token=self._token, timeout_s=settings.timeout_s) for r in settings.rollouts]
        first_rank = 1
        for rollout in rollouts:
            if rollout.token not in (None, self._token):
                raise ConfigError(f"{rollout.name} has another token than the setting `token`; give both the same")
            size = rollout.world_size()
            self.replicas.append(Replica(rollout, range(first_rank, first_rank + size)))
            first_rank += size
        engine = self.engine = self._make_engine(engine_name, rollouts)
        metadata = engine.prepare()
        self._each(lambda replica: self._invite(replica, metadata, first_rank))
        try:
            engine.init_process_group(0, first_rank, master_metadata=metadata)
        except TwinkleError as error:
            raise type(error)(f"{error} ({self._who()}; its own log may say more)") from error
        for replica in self.replicas:
            replica.joined = self._receipts_of(replica, "joined", Joined)
            self._take_over(replica)
        self._check_servers()
        self._each(self._end_update)
        logger.info("synced with %s over engine %s", ", ".join(r.name for r in self.replicas), engine.name)

    def _take_over(self, replica: Replica) -> None:
        """Finds out what an earlier trainer left behind."""
        replica.in_update = any(worker.in_update for worker in replica.joined)
        replica.may_serve = all(worker.intact for worker in replica.joined) and replica.name not in self._stopped
        replica.paused = replica.rollout.is_paused()

    @property
    def bucket_size_bytes(self) -> int:
        """Of a wire bucket: no larger than all that there is to send."""
        return min(self.settings.bucket_size_bytes, align(self._total_bytes))

    def _make_engine(self, name: str, rollouts: Sequence[Rollout]) -> CheckpointEngine:
        engine = get_engine(name)(
            bucket_size=self.bucket_size_bytes,
            timeout=self.settings.timeout_s,
            token=self._token,
            host=address_towards([rollout.host for rollout in rollouts]),
            verify=self.settings.verify != "off",
        )
        engine.is_master = True
        return engine

    def _invite(self, replica: Replica, metadata: dict[str, object], world_size: int) -> None:
        replica.rollout.join(self._request(replica, metadata, world_size).signed(self._token))
        replica.linked = True

    def _request(self, replica: Replica, metadata: dict[str, object], world_size: int) -> JoinRequest:
        return JoinRequest(
            engine=str(metadata["engine"]),
            metadata=metadata,
            rank_offset=replica.ranks.start,
            world_size=world_size,
            bucket_size=self.bucket_size_bytes,
            timeout_s=self.settings.timeout_s,
            verify=self.settings.verify != "off",
            client=self._client,
        )

    def _check_servers(self) -> None:
        """Compares what the servers run with the settings and with each other."""
        first = self.replicas[0]
        for replica in self.replicas:
            runs = replica.joined[0]
            self._check_lora(replica)
            if runs.quantization is not None:
                raise RolloutError(
                    f"{replica.name} runs a model quantized with {runs.quantization}, which this version cannot sync; "
                    f"start the server on a plain checkpoint without --quantization, or, on one GPU and without LoRA, "
                    f"with --quantization fp8"
                )
            if _shape(runs) != _shape(first.joined[0]):
                raise RolloutError(
                    f"the rollouts serve different models: {first.name} {_shape(first.joined[0])}, "
                    f"{replica.name} {_shape(runs)}; start all with the same one"
                )

    def _check_lora(self, replica: Replica) -> None:
        if replica.joined[0].lora is not None:
            raise RolloutError(
                f"{replica.name} runs with enable_lora=True, but merge_and_sync=True sends merged weights; "
                f"start the server without --enable-lora, or set merge_and_sync=False"
            )

    @property
    def dtype(self) -> str:
        """The dtype in which the servers run what is sent, by its torch name."""
        return self.replicas[0].joined[0].dtype

    def begin(self, version: int) -> None:
        """Lets the workers of each rollout receive what becomes `version`."""
        self._push_number += 1
        self._version = version
        self._each(self._begin)

    def _begin(self, replica: Replica) -> None:
        replica.rollout.start()
        replica.in_update = True
        replica.rollout.update({"action": RECEIVE, "push": self._push_number})

    def collect_staged(self) -> str:
        """Waits until every worker holds the whole stream. Returns its digest."""
        for replica in self.replicas:
            replica.staged = self._receipts_of(replica, f"staged-{self._push_number}", Staged)
            raise_failure(replica, replica.staged)
        return self.replicas[0].staged[0].digest

    def check(self) -> None:
        """Asks the workers that do not know it yet whether their model takes what they staged. Nobody is paused."""
        self._each(self._check)

    def _check(self, replica: Replica) -> None:
        if all(worker.fits for worker in replica.staged):
            return
        replica.rollout.update({"action": CHECK, "push": self._push_number})
        raise_failure(replica, self._receipts_of(replica, f"checked-{self._push_number}", Checked))

    def located(self, error: TwinkleError) -> SyncError:
        """An error of the data plane, which knows ranks only, with the rollouts behind them."""
        names = tuple(replica.name for replica in self.replicas)
        return SyncError(f"{type(error).__name__}: {error} ({self._who()})", "transfer", names)

    def _who(self) -> str:
        return "; ".join(
            f"rank {r.ranks[0]} is {r.name}"
            if len(r.ranks) == 1
            else f"ranks {r.ranks[0]} to {r.ranks[-1]} are {r.name}"
            for r in self.replicas
        )

    def commit(self) -> list[ReplicaReport]:
        """Pauses, commits on every rollout, sets the version, resumes.

        Raises:
            TwinkleError: some did not commit. Those that did serve the new version; the error names another.
        """
        self._each(self._pause)
        reports = self._commit_each()
        self._each(self._resume)
        return reports

    def _commit_each(self) -> list[ReplicaReport]:
        reports: dict[int, ReplicaReport] = {}

        def commit(replica: Replica) -> None:
            reports[id(replica)] = self._commit(replica)

        self._each(commit)
        return [reports[id(replica)] for replica in self.replicas]

    def _pause(self, replica: Replica) -> None:
        replica.paused = True  # also if it fails: vLLM pauses first, then waits and clears its caches
        replica.rollout.pause(self.settings.pause_mode, clear_cache=self.settings.stale_kv != "keep")

    def _commit(self, replica: Replica) -> ReplicaReport:
        could_serve, replica.may_serve = replica.may_serve, False
        try:
            replica.rollout.finish()
        except (DeadlineError, RolloutUnreachableError):
            raise  # nobody knows how far it came
        except TwinkleError:
            replica.may_serve = could_serve
            raise
        replica.in_update = False
        committed = self._receipts_of(replica, f"committed-{self._push_number}", Committed)
        if any(worker.failure for worker in committed):
            replica.may_serve = all(worker.intact for worker in committed)
        raise_failure(replica, committed)
        replica.rollout.set_version(self._version)
        if self.settings.stale_kv != "keep":
            replica.rollout.reset_cache()
        replica.may_serve = True
        self._stopped.discard(replica.name)
        staged = replica.staged[0]
        seconds = max(worker.seconds for worker in committed)
        return ReplicaReport(replica.name, self._version, staged.digest, staged.tensors, seconds)

    def _resume(self, replica: Replica) -> None:
        if replica.paused or replica.rollout.held:
            replica.rollout.resume()
            replica.paused = False

    def _end_update(self, replica: Replica) -> None:
        if replica.in_update:
            replica.rollout.update({"action": ABORT})
            replica.rollout.finish()
            replica.in_update = False

    def abort(self) -> list[str]:
        """After a failure: closes open sessions and resumes every rollout that may serve, with old weights or new.

        Returns:
            Names of those that do not serve until a push succeeds: their weights are not whole, or they did not resume.
            What else cannot be put in order is logged.
        """

        def put_in_order(replica: Replica) -> None:
            if replica.may_serve:
                self._resume(replica)
            self._end_update(replica)

        for error in attempt_each(self.replicas, put_in_order).values():
            logger.error("%s could not be put in order: %s", ", ".join(error.rollouts), error)
        stopped = [replica.name for replica in self.replicas if replica.paused or not replica.may_serve]
        self._stopped.update(stopped)
        self.leave()
        return stopped

    def leave(self) -> None:
        """Lets the rollouts that answer free their end of the engine, then disconnects. Idempotent."""

        def leave(replica: Replica) -> None:
            if replica.linked:
                self._call(replica, LEAVE)

        for error in attempt_each(self.replicas, leave).values():
            logger.info("%s keeps its end of the engine until the next trainer comes: %s", error.rollouts[0], error)
        self.disconnect()

    def _call(self, replica: Replica, action: str, **fields: Any) -> None:
        """Asks the workers of a rollout, which answer in a receipt if at all; `fields` are those of `AdapterCall`."""
        call = AdapterCall(action=action, adapter=self._adapter_name, client=self._client, **fields)
        replica.rollout.call(call.signed(self._token))

    @property
    def _adapter_name(self) -> str:
        """The adapter that is synced, empty for whole weights."""
        return ""

    def disconnect(self) -> None:
        """Leaves the engine's group and closes connections. Idempotent."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.finalize()
        for replica in self.replicas:
            replica.rollout.close()
        self.replicas = []

    def _receipts_of(self, replica: Replica, topic: str, kind: type[T]) -> list[T]:
        """What each worker of a rollout answers on a topic; waits for all."""
        assert self.engine is not None
        try:
            messages = self.engine.collect_receipts(topic, replica.ranks)
        except TwinkleError as error:
            raise concerning(replica, type(error)(f"{replica.name}: {error}")) from error
        return [msgspec.msgpack.decode(messages[rank], type=kind) for rank in replica.ranks]

    def _each(self, call: Callable[[Replica], None]) -> None:
        for error in attempt_each(self.replicas, call).values():
            raise error


def _shape(runs: Joined) -> str:
    return f"{runs.architecture}(hidden_size={runs.hidden_size}, layers={runs.layers}, vocab_size={runs.vocab_size})"
