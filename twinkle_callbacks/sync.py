"""One push from the trainer's module into every rollout: the only orchestrator. Read this file first.

    every rank   open:  handshake with the rollouts (rank 0), the result shared; then the first push
    every rank   push:  all ranks check that the module is still the one they agreed on
                        rank 0 opens a session on each rollout
                        -> sources/  stream of (checkpoint name, full tensor), gathered by all ranks on rank 0
                        -> engines/  rank 0 sends it in buckets ==== wire ==== worker/ stages it, compares digests
                        the workers check names and shapes against vLLM's loader
                        rank 0 pauses the rollouts, they commit, it sets the version and resumes
                        the report, or the error, is shared: all ranks return it or all raise it

With `merge_and_sync=False` the rollouts are asked first whether they hold the base, which is sent once if they do not;
a push is then that of the adapter alone, which needs no pause: `adapter_fleet.py` in place of `fleet.py`.

Nothing is committed before every worker of every rollout holds the whole stream, digest for digest, and takes it. After
an error the engine is dropped, the rollouts go on with the weights they had, and the next push shakes hands anew.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar, Unpack, cast

import msgspec
import torch

from twinkle_callbacks.adapter_fleet import AdapterFleet, BaseFleet
from twinkle_callbacks.buckets.digest import Digests, digests_of
from twinkle_callbacks.buckets.layout import align
from twinkle_callbacks.buckets.packing import dtype_of, nbytes_of
from twinkle_callbacks.config import SyncOptions, SyncSettings
from twinkle_callbacks.drain import Stream, drain
from twinkle_callbacks.engines.base import CheckpointEngine, SendStats
from twinkle_callbacks.engines.thread import LoopThread
from twinkle_callbacks.errors import (
    BrokenCommitError,
    ConfigError,
    DeadlineError,
    DigestMismatchError,
    EngineError,
    RolloutError,
    SourceError,
    TwinkleError,
)
from twinkle_callbacks.fleet import Fleet
from twinkle_callbacks.report import SyncReport
from twinkle_callbacks.rollouts import LocalRollout
from twinkle_callbacks.sources import AdapterSource, WeightSource, open_source
from twinkle_callbacks.trainer_group import TrainerGroup
from twinkle_callbacks.worker.messages import Adapter

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=WeightSource)


class WeightSynchronizer:
    """Keeps rollouts on the newest weights of a module that is being trained.

    Every trainer rank builds one with the same arguments and calls the same methods in the same order; all of them are
    collective. As a context manager it opens on entry, which is the handshake and the first push, and closes on exit.

        with WeightSynchronizer(model, rollouts="http://127.0.0.1:8000") as sync:
            ...  # an optimizer step
            report = sync.push(version=1)

    Args:
        model: the trained module, plain or wrapped (DDP, FSDP, DeepSpeed, PEFT, compiled), or a `WeightSource`. It is
            never changed.
        **settings: see `twinkle_callbacks.config.SyncSettings`.

    Attributes:
        settings: the validated settings.
        report: the last push's report, or None.

    Raises:
        ConfigError: a setting is unknown, wrong, or not available in this version.
        SourceError: the module cannot be streamed.
    """

    def __init__(self, model: torch.nn.Module | WeightSource, **settings: Unpack[SyncOptions]) -> None:
        self.settings = SyncSettings.parse(settings)
        self.report: SyncReport | None = None
        self._model = model
        self._group = TrainerGroup()
        self._loop = LoopThread("twinkle-push")
        self._fleet: Fleet | None = None
        self._source: WeightSource = self._open_source(self.settings.dtype)
        self._connected = False
        self._sent_arrangement: int | None = None  # that of the source when the engine sent its last stream
        self._some_stopped = False  # rollouts that do not serve before a push succeeds
        self.is_open = False

    def open(self, version: int = 0) -> SyncReport:
        """Shakes hands with every rollout and makes the first push.

        Raises:
            ConfigError, AuthenticationError, RolloutError, EngineError, DeadlineError: the handshake failed; says which
                rollout and what to change. Raised on every rank, whatever `on_error` says: nothing can be synced.
            SyncError: the first push failed.
        """
        try:
            self._connect()
            self.is_open = True
            return self._push(version)
        except BaseException:
            self.close()
            raise

    def push(self, version: int) -> SyncReport:
        """Sends the module's weights as they are now; returns when every rollout serves them.

        Args:
            version: version that the rollouts report from then on; by convention the number of optimizer steps taken.

        Returns:
            The report, the same on every rank. With `on_error="skip"` a failed push returns one with `error` set.

        Raises:
            SyncError: phase, rollouts and cause.
            BrokenCommitError: rollouts may not serve until a push succeeds; raised whatever `on_error` says.
            ConfigError: the synchronizer is not open.
        """
        if not self.is_open:
            raise ConfigError("push() before open(): use `with WeightSynchronizer(...) as sync`, or call sync.open()")
        try:
            if not self._connected:
                self._connect()
            return self._push(version)
        except TwinkleError as error:
            if self.settings.on_error != "skip" or isinstance(error, BrokenCommitError) or self._some_stopped:
                raise
            logger.warning("push of version %d was skipped: %s", version, error)
            held = self.report.version if self.report else -1
            return SyncReport(
                version=held, bytes=0, seconds=0.0, gather_s=0.0, transfer_s=0.0, commit_s=0.0, error=str(error)
            )

    def close(self) -> None:
        """Leaves the rollouts as they are and frees everything. Idempotent; never raises for a rollout that is gone."""
        self.is_open = self._connected = False
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            fleet.leave()
        self._loop.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_source(self, dtype: str | None) -> WeightSource:
        """Opens the source on every rank, sure that all of them would stream the same."""
        wanted = None if dtype is None else dtype_of(dtype)

        return self._same_everywhere(lambda: self._make_source(wanted))

    def _make_source(self, dtype: torch.dtype | None) -> WeightSource:
        settings = self.settings
        if settings.merge_and_sync:
            return open_source(self._model, module=settings.module, dtype=dtype)
        if not isinstance(self._model, torch.nn.Module):
            raise SourceError(
                f"merge_and_sync=False needs the module that holds the base and the adapter, not a "
                f"{type(self._model).__name__}"
            )
        return AdapterSource.served_as(settings.adapter_name, self._model, module=settings.module, dtype=dtype)

    def _same_everywhere(self, make: Callable[[], S]) -> S:
        """A source, made on every rank, of which all ranks would stream the same."""

        def opened() -> tuple[S, list[str]]:
            source = make()
            return source, source.agreement() if self._group.size > 1 else []

        source, mine = self._group.agreed(opened)
        leading = self._group.share(msgspec.msgpack.encode(mine) if self._group.is_leader else None)
        self._group.agreed(lambda: _refuse_difference(mine, msgspec.msgpack.decode(leading, type=list[str])))
        self._group.connect()
        return source

    def _connect(self) -> None:
        self._sent_arrangement = None

        def handshake() -> str:
            self._fleet = self._prepared_fleet()
            self._fleet.connect()
            return self._fleet.dtype

        self._refuse_engines_of_other_ranks()
        if not self.settings.merge_and_sync:
            self._source = self._open_source(self.settings.dtype)  # the handshake tells what the adapter is by now
        try:
            dtype = self._group.on_leader(handshake)
            self._source = self._open_source(self.settings.dtype or dtype)  # after a failed push, on what is there now
            if not self.settings.merge_and_sync:
                self._ensure_base()
        except BaseException:
            self._disconnect()
            raise
        self._connected = True

    def _prepared_fleet(self) -> Fleet:
        """What connects to the rollouts: kept from one connection to the next. Rank 0 only."""
        if self.settings.merge_and_sync:
            return self._fleet or Fleet(self.settings, self._total_bytes)
        source = self._source
        assert isinstance(source, AdapterSource)
        adapter = Adapter(self._served_name, source.config, {spec.name: spec.shape for spec in source.specs()})
        if not isinstance(self._fleet, AdapterFleet):
            return AdapterFleet(self.settings, self._total_bytes, adapter)
        self._fleet.adapter = adapter
        return self._fleet

    @property
    def _total_bytes(self) -> int:
        return sum(align(nbytes_of(dtype_of(spec.dtype), spec.shape)) for spec in self._source.specs())

    @property
    def _served_name(self) -> str:
        """Under which the rollouts serve the adapter that travels alone."""
        assert isinstance(self._source, AdapterSource)
        return self.settings.adapter_name or self._source.adapter_name

    def _ensure_base(self) -> None:
        """Makes sure that the rollouts hold the base that the adapter was made for: compares, and sends if it must."""
        dtype = self._group.on_leader(
            lambda: None if self._leading_adapter.knows_base() else self._leading_adapter.base_dtype
        )
        if dtype is None:
            return
        wanted = dtype_of(self.settings.dtype or dtype)
        base = self._same_everywhere(
            lambda: open_source(self._model, module=self.settings.module, dtype=wanted, merge=False)
        )
        digests: Digests = {}

        def digest(stream: Stream) -> None:
            digests.update(digests_of(stream))

        def compare() -> list[str]:
            return self._leading_adapter.compare_base(digests)

        failure = drain(self._group, base, digest)
        self._group.on_leader(lambda: _raise(failure))
        differing = self._group.on_leader(compare)
        if not any(differing):
            return
        self._group.on_leader(lambda: self._leading_adapter.refuse_another_base(differing))
        rollouts = [rollout for rollout, text in zip(self.settings.rollouts, differing, strict=True) if text]
        settings = dict(self.settings) | {"merge_and_sync": True, "adapter_name": None, "on_error": "raise"}
        settings |= {"rollouts": rollouts}
        with _BaseSynchronizer(base, base_of=self._served_name, **cast("SyncOptions", settings)):
            logger.info("the base was sent")
        still = [text for text in self._group.on_leader(compare) if text]
        if still:
            raise RolloutError(f"the base was sent, and still: {'; '.join(still)}")

    def _refuse_engines_of_other_ranks(self) -> None:
        mine = not self._group.is_leader and any(isinstance(each, LocalRollout) for each in self.settings.rollouts)
        if self._group.first_failure("a LocalRollout" if mine else "") is not None:
            raise ConfigError(
                "only trainer rank 0 reaches rollouts, so the LocalRollout of another rank would keep its old weights; "
                "serve with `twinkle-callbacks serve` and give its URL, or train with one process"
            )

    def _disconnect(self) -> None:
        self._connected = False
        if self._fleet is not None:
            self._fleet.leave()

    def _push(self, version: int) -> SyncReport:
        try:
            self.report = self._take_through(version)
        except TwinkleError as error:  # raised on every rank
            self._connected = False
            stopped = self._group.on_leader(self._put_in_order)
            self._some_stopped = bool(stopped)
            if stopped:
                text = f"{error}; {', '.join(stopped)} may not serve before a push succeeds, and stay paused until then"
                raise BrokenCommitError(text, getattr(error, "phase", ""), tuple(stopped)) from error
            raise
        except BaseException:
            self._connected = False
            self._put_in_order()
            raise
        self._some_stopped = False
        logger.info("pushed version %d: %d bytes in %.3f s", version, self.report.bytes, self.report.seconds)
        return self.report

    def _put_in_order(self) -> list[str]:
        return [] if self._fleet is None else self._fleet.abort()

    def _take_through(self, version: int) -> SyncReport:
        """All phases of a push; the seconds are those of rank 0."""
        began = time.perf_counter()
        self._group.agreed(self._source.check, phase="start")
        self._group.on_leader(lambda: self._begin(version), phase="start")
        sending = time.perf_counter()
        failure = self._send()
        stats = self._group.on_leader(lambda: self._finish_sending(failure), phase="transfer")
        committing = time.perf_counter()
        self._group.on_leader(lambda: self._leading.check(), phase="check")

        def commit() -> SyncReport:
            replicas = self._leading.commit()
            ended = time.perf_counter()
            sent = msgspec.convert(stats, SendStats)
            return SyncReport(
                version=version,
                bytes=sent.payload_bytes,
                seconds=ended - began,
                gather_s=sent.source_s,
                transfer_s=committing - sending - sent.source_s,
                commit_s=ended - committing,
                digest=sent.digest,
                replicas=replicas,
            )

        return msgspec.convert(self._group.on_leader(commit, phase="commit"), SyncReport)

    @property
    def _leading(self) -> Fleet:
        assert self._fleet is not None, "only rank 0 leads, and only when connected"
        return self._fleet

    @property
    def _leading_adapter(self) -> AdapterFleet:
        assert isinstance(self._fleet, AdapterFleet)
        return self._fleet

    @property
    def _engine(self) -> CheckpointEngine:
        engine = self._leading.engine
        assert engine is not None, "a fleet that is connected has one"
        return engine

    def _begin(self, version: int) -> None:
        self._engine.lasts = self._source.lasts
        arrangement, sent = self._source.arrangement, self._sent_arrangement
        self._engine.begin_stream(repeats=arrangement is not None and arrangement == sent)
        self._leading.begin(version)

    def _send(self) -> Exception | None:
        """Every rank drains the source; rank 0 sends it. Returns what went wrong, on whichever rank it was."""

        def send(stream: Stream) -> None:
            self._loop.run(lambda: self._engine.send_weights(stream))

        failure = drain(self._group, self._source, send)
        if self._group.is_leader and isinstance(failure, (EngineError, DeadlineError)):
            return self._leading.located(failure)
        return failure

    def _finish_sending(self, failure: Exception | None) -> SendStats:
        if failure is not None:
            raise failure
        stats = self._engine.stats
        assert stats is not None
        self._sent_arrangement = self._source.arrangement
        digest = self._leading.collect_staged()
        if digest != stats.digest:
            raise DigestMismatchError(f"the rollouts staged a stream of digest {digest}, sent was {stats.digest}")
        return stats


class _BaseSynchronizer(WeightSynchronizer):
    """Sends the base, once, to rollouts that serve adapters on it; with `base_of`, if that is the only one."""

    def __init__(
        self, model: torch.nn.Module | WeightSource, base_of: str = "", **settings: Unpack[SyncOptions]
    ) -> None:
        super().__init__(model, **settings)
        self._base_of = base_of

    def _prepared_fleet(self) -> Fleet:
        return self._fleet or BaseFleet(self.settings, self._total_bytes, self._base_of)


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _refuse_difference(mine: list[str], leading: list[str]) -> None:
    for own, other in itertools.zip_longest(mine, leading, fillvalue="nothing"):
        if own != other:
            raise SourceError(
                f"the ranks would stream different tensors: this one {own} where rank 0 has {other}; build and wrap "
                f"the same model on every rank"
            )
