"""One of two trainer ranks; what $SCENARIO names goes wrong on one of them, and both must learn of it.

The rollout, of rank 0, is the fake one: what is tested is how ranks agree.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from datetime import timedelta

import pytest
import torch

from tests.unit.fake_rollout import FakeRollout
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.engines import sender
from twinkle_callbacks.errors import ConfigError, SourceError, SyncError
from twinkle_callbacks.rollouts import LocalRollout, Rollout
from twinkle_callbacks.sources import WeightSource

GROUP_TIMEOUT_S = 20.0
CHECKED = 10  # added to the rank that fails: already in its check


class Gathering(WeightSource):
    """Every tensor is a collective; on rank `fails_on` one cannot be read, which is told when all is over."""

    def __init__(self) -> None:
        self.fails_on, self.gathered, self.rank = -1, 0, torch.distributed.get_rank()
        self.names = [f"t{number}" for number in range(6)]

    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(name, "float32", (3,)) for name in self.names]

    def check(self) -> None:
        if self.fails_on == self.rank + CHECKED:
            raise SourceError("t2 is gone")

    def stream(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        self.gathered = 0
        try:
            for name in self.names:
                tensor = self._gather()
                if self.rank == 0:
                    yield name, tensor
        finally:
            while self.gathered < len(self.names):
                self._gather()
        if self.fails_on == self.rank:
            raise ValueError("the shard is lost")

    def _gather(self) -> torch.Tensor:
        tensor = torch.full((3,), float(self.gathered))
        torch.distributed.all_reduce(tensor)
        self.gathered += 1
        return tensor


def synchronizer(source: WeightSource, rollout: Rollout, **settings) -> WeightSynchronizer:  # type: ignore[no-untyped-def]
    return WeightSynchronizer(source, **{"rollouts": rollout, "bucket_size_mb": 1, "timeout_s": 10, **settings})


def part_that_a_rank_cannot_read_fails_on_all_with_its_cause(rollout: FakeRollout) -> None:
    source = Gathering()
    with synchronizer(source, rollout) as sync:
        for rank in (1, 0):
            source.fails_on = rank
            with pytest.raises(SyncError, match="ValueError: the shard is lost") as caught:
                sync.push(version=1)
            assert caught.value.phase == "transfer"
            assert ("trainer rank 1" in str(caught.value)) == (rank == 1)
            assert source.gathered == 6
        source.fails_on = -1
        report = sync.push(version=2)
    assert report.version == 2


def change_that_one_rank_sees_is_told_on_all_before_anything_is_sent(rollout: FakeRollout) -> None:
    source = Gathering()
    with synchronizer(source, rollout) as sync:
        source.gathered, source.fails_on = 0, 1 + CHECKED
        with pytest.raises(SyncError, match="'start': trainer rank 1: SourceError: t2 is gone"):
            sync.push(version=1)
        assert source.gathered == 0
        source.fails_on = -1
        assert sync.push(version=2).version == 2


def ranks_that_would_stream_other_tensors_are_refused(rollout: FakeRollout) -> None:
    source = Gathering()
    if source.rank == 1:
        source.names = source.names[:5]
    with pytest.raises(SourceError, match=r"this one nothing where rank 0 has t5 float32\[3\]"):
        synchronizer(source, rollout)


def engine_fails_before_it_draws_anything(rollout: FakeRollout) -> None:
    source = Gathering()
    sync = synchronizer(source, rollout)
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("no room for a bucket")

        patch.setattr(sender.BucketPlanner, "__init__", full)
        with pytest.raises(SyncError, match="OutOfMemoryError: no room for a bucket"):
            sync.open()
    assert source.gathered == 6
    with sync:
        assert sync.push(version=1).version == 1


def unexpected_error_in_the_handshake_is_skipped_on_all_ranks_or_none(rollout: FakeRollout) -> None:
    with synchronizer(Gathering(), rollout, on_error="skip") as sync:
        rollout.fail["start"] = RuntimeError("first")
        assert "first" in sync.push(version=1).error
        rollout.fail["world_size"] = OSError("second")
        assert "second" in sync.push(version=2).error
        assert sync.push(version=3).error == ""


def engine_in_the_process_of_another_rank_is_refused(rollout: FakeRollout) -> None:
    leads = torch.distributed.get_rank() == 0
    other: Rollout = rollout if leads else object.__new__(LocalRollout)
    with pytest.raises(ConfigError, match="only trainer rank 0 reaches rollouts"):
        synchronizer(Gathering(), other).open()


def report_is_the_same_on_every_rank(rollout: FakeRollout) -> None:
    with synchronizer(Gathering(), rollout) as sync:
        mine = repr(sync.push(version=1)).encode()
    size = torch.tensor([len(mine)])
    torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)
    assert int(size) == len(mine)
    data = [torch.zeros(len(mine), dtype=torch.uint8) for _ in range(2)]
    torch.distributed.all_gather(data, torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    assert bytes(data[0].numpy()) == bytes(data[1].numpy())


def main() -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    rollout = FakeRollout()
    globals()[os.environ["SCENARIO"]](rollout)
    rollout.end()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
