"""One of two trainer ranks; what $SCENARIO names goes wrong on one of them, and both must learn of it.

The rollout, of rank 0, is the fake one: what is tested is how ranks agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

from tests.unit.fake_rollout import FakeRollout
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.engines import sender
from twinkle_callbacks.errors import ConfigError, SyncError
from twinkle_callbacks.rollouts import LocalRollout, Rollout
from twinkle_callbacks.sources import WeightSource

GROUP_TIMEOUT_S = 20.0


class Gathering(WeightSource):
    """Every tensor is a collective, if `gathers`; raises on rank `fails_on` before the third."""

    def __init__(self, *, gathers: bool) -> None:
        self.gathers, self.fails_on, self.drawn = gathers, -1, 0

    @property
    def is_collective(self) -> bool:
        return self.gathers

    def specs(self) -> list[TensorSpec]:
        raise AssertionError("not asked for")

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.drawn = 0
        for number in range(6):
            if number == 2 and self.fails_on == torch.distributed.get_rank():
                raise ValueError("the shard is lost")
            tensor = torch.full((3,), float(number))
            if self.gathers:
                torch.distributed.all_reduce(tensor)
            self.drawn += 1
            yield f"t{number}", tensor


def synchronizer(source: WeightSource, rollout: Rollout, **settings) -> WeightSynchronizer:  # type: ignore[no-untyped-def]
    return WeightSynchronizer(source, **{"rollouts": rollout, "bucket_size_mb": 1, "timeout_s": 10, **settings})


def source_fails_on_one_rank(rollout: FakeRollout) -> None:
    source = Gathering(gathers=False)
    with synchronizer(source, rollout) as sync:
        source.fails_on = 1
        with pytest.raises(SyncError, match="trainer rank 1: ValueError: the shard is lost") as caught:
            sync.push(version=1)
        assert caught.value.phase == "transfer"
        source.fails_on = -1
        report = sync.push(version=2)
    assert report.version == 2


def engine_fails_before_it_draws_anything(rollout: FakeRollout) -> None:
    source = Gathering(gathers=True)
    sync = synchronizer(source, rollout)
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("no room for a bucket")

        patch.setattr(sender.BucketPlanner, "__init__", full)
        with pytest.raises(SyncError, match="OutOfMemoryError: no room for a bucket"):
            sync.open()
    assert source.drawn == 6
    with sync:
        assert sync.push(version=1).version == 1


def unexpected_error_in_the_handshake_is_skipped_on_all_ranks_or_none(rollout: FakeRollout) -> None:
    with synchronizer(Gathering(gathers=True), rollout, on_error="skip") as sync:
        rollout.fail["start"] = RuntimeError("first")
        assert "first" in sync.push(version=1).error
        rollout.fail["world_size"] = OSError("second")
        assert "second" in sync.push(version=2).error
        assert sync.push(version=3).error == ""


def engine_in_the_process_of_another_rank_is_refused(rollout: FakeRollout) -> None:
    leads = torch.distributed.get_rank() == 0
    other: Rollout = rollout if leads else object.__new__(LocalRollout)
    with pytest.raises(ConfigError, match="only trainer rank 0 reaches rollouts"):
        synchronizer(Gathering(gathers=False), other).open()


def report_is_the_same_on_every_rank(rollout: FakeRollout) -> None:
    with synchronizer(Gathering(gathers=True), rollout) as sync:
        mine = repr(sync.push(version=1)).encode()
    size = torch.tensor([len(mine)])
    torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)
    assert int(size) == len(mine)
    data = [torch.zeros(len(mine), dtype=torch.uint8) for _ in range(2)]
    torch.distributed.all_gather(data, torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    assert bytes(data[0].numpy()) == bytes(data[1].numpy())


def rank_that_leaves_a_gather_ends_with_its_cause_and_the_others_fail_soon(rollout: FakeRollout) -> None:
    source = Gathering(gathers=True)
    sync = synchronizer(source, rollout)
    sync.open()
    source.fails_on = 1
    leads = torch.distributed.get_rank() == 0
    with pytest.raises((SyncError, RuntimeError), match="" if leads else "rank 1: the shard is lost"):
        sync.push(version=1)
    rollout._end()
    os._exit(0)  # as a rank ends that raised: its links break, and the others notice


def main() -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    rollout = FakeRollout()
    globals()[os.environ["SCENARIO"]](rollout)
    rollout.leave()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
