"""What a push tells its caller: one `SyncReport`, and in it one `ReplicaReport` for each rollout."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReplicaReport:
    """What one rollout did with a push.

    Attributes:
        rollout: its address, or the name of the in-process engine.
        version: the weight version it serves now.
        digest: digest over every tensor it committed, in hexadecimal; empty with `verify="off"`.
        tensors: number of tensors it received.
        commit_s: seconds its slowest worker spent in check and commit.
    """

    rollout: str
    version: int
    digest: str
    tensors: int
    commit_s: float


@dataclass(frozen=True)
class SyncReport:
    """Receipt of one push, the same on every trainer rank.

    Attributes:
        version: weight version that the rollouts serve from now on.
        bytes: payload bytes that travelled to each rollout worker.
        seconds: wall time of the push on rank 0, in seconds.
        gather_s: part of it spent waiting for the next full tensor (gather, merge, cast, rename).
        transfer_s: part spent packing, sending, and waiting for the receivers' acknowledgements.
        commit_s: part spent in pause, check, commit, cache reset and resume.
        digest: the trainer's digest over every tensor, in hexadecimal; equals that of each replica.
        replicas: one entry for each rollout.
        error: why the push was skipped (`on_error="skip"`), else empty; `version` is then the one still served.
    """

    version: int
    bytes: int
    seconds: float
    gather_s: float
    transfer_s: float
    commit_s: float
    digest: str = ""
    replicas: list[ReplicaReport] = field(default_factory=list)
    error: str = ""

    def metrics(self, prefix: str = "weight_sync/") -> dict[str, float]:
        """The report as plain numbers for a logger, such as `weight_sync/seconds`."""
        values = {
            "version": self.version,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "gather_s": self.gather_s,
            "transfer_s": self.transfer_s,
            "commit_s": self.commit_s,
            "replicas": len(self.replicas),
            "skipped": bool(self.error),
        }
        return {prefix + name: float(value) for name, value in values.items()}
