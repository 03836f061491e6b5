"""A push of an adapter alone, as trainer rank 0 takes the rollouts through it.

Nothing is paused and no session is opened: the workers receive and build the version beside what they serve, and then
requests that come from now on get it. Those under way end on the version they began with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import msgspec

from twinkle_callbacks import auth
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.buckets.digest import Digests, first_few
from twinkle_callbacks.config import SyncSettings
from twinkle_callbacks.errors import RolloutError, from_wire
from twinkle_callbacks.fleet import Fleet
from twinkle_callbacks.replica import Replica
from twinkle_callbacks.report import ReplicaReport
from twinkle_callbacks.worker.messages import COMPARE, RECEIVE, Adapter, Compared, JoinRequest, LoRARuns

logger = logging.getLogger(__name__)

# An adapter fits into one bucket of the usual size, and workers would stage none of it before all is there. Measured
# with 20 MB: 38 ms a transfer with 512 MiB, 24 ms with 4, the same with 2.
MAX_BUCKET_BYTES = 4 << 20


class BaseFleet(Fleet):
    """Takes rollouts that serve adapters through a push of the base below them.

    Args:
        settings: the synchronizer's settings.
        total_bytes: about those of a push.
        base_of: the only adapter that it may be replaced beneath; empty for any.
    """

    def __init__(self, settings: SyncSettings, total_bytes: int, base_of: str) -> None:
        super().__init__(settings, total_bytes)
        self._base_of = base_of

    def _request(self, replica: Replica, metadata: dict[str, object], world_size: int) -> JoinRequest:
        return msgspec.structs.replace(super()._request(replica, metadata, world_size), base_of=self._base_of)

    def _check_lora(self, replica: Replica) -> None:
        """Refuses none: servers with LoRA are what this is for, and without it is fine too."""


class AdapterFleet(Fleet):
    """Connects to the rollouts as the trainer of one adapter, and takes them through its pushes. Rank 0 only.

    Args:
        settings: the synchronizer's settings.
        total_bytes: about those of a push.
        adapter: the adapter; may be set anew before `connect`.
    """

    def __init__(self, settings: SyncSettings, total_bytes: int, adapter: Adapter) -> None:
        super().__init__(settings, total_bytes)
        self.adapter = adapter
        self._path = AdapterPath.sent(0)
        self._comparisons = 0
        self._base_ids: list[list[str]] = []  # by rollout and worker, of the base when it was the trainer's; else none
        self._others: list[set[str]] = []  # by rollout, the other adapters on its base when it was compared

    @property
    def _adapter_name(self) -> str:
        return self.adapter.name

    def _request(self, replica: Replica, metadata: dict[str, object], world_size: int) -> JoinRequest:
        if self.adapter.name in replica.rollout.models():
            raise RolloutError(
                f"{replica.name} serves its base model as {self.adapter.name!r}; choose another adapter_name"
            )
        return msgspec.structs.replace(super()._request(replica, metadata, world_size), adapter=self.adapter)

    def _take_over(self, replica: Replica) -> None:
        """Takes nothing over: an update of the base that is open is its own trainer's to end."""

    def _check_lora(self, replica: Replica) -> None:
        for rank, runs in zip(replica.ranks, replica.joined, strict=True):
            if runs.lora is None:
                raise RolloutError(
                    f"{replica.name} runs with enable_lora=False, but merge_and_sync=False sends an adapter; start the "
                    f"server with --enable-lora, or set merge_and_sync=True"
                )
            if runs.lora.refusal is not None:
                cause = from_wire(runs.lora.refusal.type, runs.lora.refusal.message, RolloutError)
                raise type(cause)(f"{replica.name} (rank {rank}) cannot serve adapter {self.adapter.name!r}: {cause}")
        wanted, has = self.settings.dtype, _lora(replica).dtype
        if wanted is not None and wanted != has:
            raise RolloutError(
                f"dtype={wanted!r}, but {replica.name} keeps adapters in {has}; start the server with "
                f"--lora-dtype {wanted}, or leave dtype at None"
            )

    @property
    def bucket_size_bytes(self) -> int:
        return min(super().bucket_size_bytes, MAX_BUCKET_BYTES)

    @property
    def dtype(self) -> str:
        return _lora(self.replicas[0]).dtype

    @property
    def base_dtype(self) -> str:
        """The dtype that the servers run the base in, by its torch name."""
        return self.replicas[0].joined[0].dtype

    def knows_base(self) -> bool:
        """Whether every rollout is known to hold the trainer's base, from before."""
        return self._base_ids == [_base_ids(replica) for replica in self.replicas]

    def compare_base(self, base: Digests) -> list[str]:
        """Asks every worker whether it holds the trainer's base.

        Returns:
            What differs, for each rollout in turn; empty where it holds it.
        """
        self._comparisons += 1
        self._each(lambda replica: self._call(replica, COMPARE, number=self._comparisons, base=base))
        answers = [self._receipts_of(each, f"compared-{self._comparisons}", Compared) for each in self.replicas]
        differing = [_difference(of_workers, len(base)) for of_workers in answers]
        self._base_ids = [
            [] if text else [worker.base_id for worker in of_workers]
            for of_workers, text in zip(answers, differing, strict=True)
        ]
        self._others = [{name for worker in of_workers for name in worker.others} for of_workers in answers]
        return differing

    def refuse_another_base(self, differing: Sequence[str]) -> None:
        """Whether the base may be sent to rollouts that hold another one. Their workers have the last word.

        Raises:
            RolloutError: this trainer is a tenant, or they serve other adapters, which were made for theirs.
        """
        for replica, difference, others in zip(self.replicas, differing, self._others, strict=True):
            if not difference:
                continue
            text = f"{replica.name} serves another base than the trainer adapts: {difference}"
            if auth.tenant_of(self._token):
                raise RolloutError(f"{text}; a tenant may not replace it, so start from the server's base")
            if others:
                raise RolloutError(
                    f"{text}; it is not replaced, for other adapters are on it ({', '.join(sorted(others))}); start "
                    f"from the server's base, or detach them"
                )
            logger.info("%s; the base is sent once", text)

    def _begin(self, replica: Replica) -> None:
        self._resume(replica)  # one that sleeps has no memory for adapters
        self._call(replica, RECEIVE, number=self._push_number, path=str(self._path))

    def begin(self, version: int) -> None:
        self._path = AdapterPath.sent(version)
        super().begin(version)

    def check(self) -> None:
        """Whether the adapter is still for the base that the rollouts hold; the workers built it when staging."""
        for replica, known in zip(self.replicas, self._base_ids, strict=True):
            if [staged.base_id for staged in replica.staged] != known:
                raise RolloutError(
                    f"the base of {replica.name} was replaced by another trainer since adapter {self.adapter.name!r} "
                    f"was connected; it goes on serving the adapter's last version"
                )

    def commit(self) -> list[ReplicaReport]:
        """Lets every rollout answer later requests with the new version.

        Raises:
            TwinkleError: some do not. Those that do serve the new version; the error names another.
        """
        return self._commit_each()

    def _commit(self, replica: Replica) -> ReplicaReport:
        began = time.perf_counter()
        replica.rollout.load_adapter(self.adapter.name, str(self._path))
        staged, seconds = replica.staged[0], time.perf_counter() - began
        return ReplicaReport(replica.name, self._version, staged.digest, staged.tensors, seconds)


def _lora(replica: Replica) -> LoRARuns:
    runs = replica.joined[0].lora
    assert runs is not None, "checked when it joined"
    return runs


def _base_ids(replica: Replica) -> list[str]:
    return [runs.lora.base_id for runs in replica.joined if runs.lora is not None]


def _difference(answers: Sequence[Compared], tensors: int) -> str:
    """What the workers of a rollout have that is not the trainer's base of so many tensors; empty for nothing."""
    for answer in answers:
        if answer.failure is not None:
            return f"it cannot be told ({answer.failure.message})"
        if answer.differing:
            return f"{len(answer.differing)} of {tensors} tensors differ: {first_few(answer.differing)}"
    return ""
