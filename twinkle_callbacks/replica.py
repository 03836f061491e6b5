"""One rollout as trainer rank 0 sees it, and calls to several side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from twinkle_callbacks.errors import (
    DeadlineError,
    RolloutError,
    RolloutUnreachableError,
    TwinkleError,
    from_wire,
    text_of,
)
from twinkle_callbacks.rollouts import Rollout
from twinkle_callbacks.worker.messages import Checked, Committed, Joined, Staged

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Replica:
    """One rollout and the ranks of its workers in the engine's group.

    `may_serve`: its weights are whole, and its version and caches are theirs. `linked`: its workers were invited into
    the group, and it has answered since.
    """

    rollout: Rollout
    ranks: range
    joined: list[Joined] = field(default_factory=list)
    staged: list[Staged] = field(default_factory=list)
    in_update: bool = False
    paused: bool = False
    may_serve: bool = True
    linked: bool = False

    @property
    def name(self) -> str:
        return self.rollout.name


def attempt_each(replicas: Sequence[Replica], call: Callable[[Replica], None]) -> dict[int, TwinkleError]:
    """Calls all rollouts side by side and waits for all; the errors by the id of the replica."""

    def attempt(replica: Replica) -> TwinkleError | None:
        try:
            call(replica)
        except TwinkleError as error:
            if isinstance(error, (DeadlineError, RolloutUnreachableError)):
                replica.linked = False  # or each further call would wait as long again
            return concerning(replica, error)
        except Exception as error:  # one rollout's trouble may not keep the others from being put in order
            logger.exception("%s: unexpected error", replica.name)
            return concerning(replica, RolloutError(f"{replica.name}: {type(error).__name__}: {text_of(error)}"))
        return None

    if len(replicas) <= 1:  # stays on the caller's thread, for an engine in this process
        outcomes = [attempt(replica) for replica in replicas]
    else:
        outcomes = _side_by_side(attempt, replicas)
    return {id(r): error for r, error in zip(replicas, outcomes, strict=True) if error is not None}


def _side_by_side(call: Callable[[Replica], T], replicas: Sequence[Replica]) -> list[T]:
    with ThreadPoolExecutor(len(replicas), thread_name_prefix="twinkle-rollout") as pool:
        try:
            outcomes = [pool.submit(call, replica) for replica in replicas]
        except RuntimeError:  # the interpreter is ending, and starts no more threads
            return [call(replica) for replica in replicas]
    return [outcome.result() for outcome in outcomes]


def concerning(replica: Replica, error: TwinkleError) -> TwinkleError:
    """The error, with the rollout's name in it unless it names others."""
    error.rollouts = error.rollouts or (replica.name,)
    return error


def raise_failure(replica: Replica, receipts: Sequence[Staged | Checked | Committed]) -> None:
    """Raises what the first of a rollout's workers says went wrong, if one does, with its name and rank."""
    for rank, receipt in zip(replica.ranks, receipts, strict=True):
        if receipt.failure is not None:
            cause = from_wire(receipt.failure.type, receipt.failure.message, RolloutError)
            raise concerning(replica, type(cause)(f"{replica.name} (rank {rank}): {cause}")) from cause
