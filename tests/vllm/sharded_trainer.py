"""One rank of a sharded trainer: opens with the policy of seed 1, then pushes that of seed 2 as version 8."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.tiny_models import build
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.errors import SyncError
from twinkle_callbacks.sources import WeightSource, open_source


def wrap(model: torch.nn.Module) -> torch.nn.Module:
    if os.environ["KIND"] == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


class _FailsOnce(WeightSource):
    """Raises on every rank in the middle of the second stream."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._source = open_source(model)
        self._streams = 0

    def specs(self):  # type: ignore[no-untyped-def]
        return self._source.specs()

    def stream(self):  # type: ignore[no-untyped-def]
        self._streams += 1
        for number, item in enumerate(self._source.stream()):
            if self._streams == 2 and number == 3:
                raise ValueError("out of luck")
            yield item


def push() -> None:
    rank = torch.distributed.get_rank()
    url = os.environ["URL"]
    with pytest.raises(Exception, match="nobody answers"):  # rank 0 meets the error, all ranks raise it
        WeightSynchronizer(wrap(build("qwen3", seed=1)), rollouts="http://127.0.0.1:9", timeout_s=60).open()
    with WeightSynchronizer(_FailsOnce(wrap(build("qwen3", seed=2))), rollouts=url, timeout_s=60) as sync:
        with pytest.raises(SyncError, match="out of luck"):
            sync.push(version=1)
        report = sync.push(version=8)
    assert report.version == 8
    assert report.replicas[0].rollout == url
    print("rank", rank, report)


def main() -> None:
    torch.distributed.init_process_group("gloo")
    push()
    # What DDP holds last ends with the GIL held, and waits for threads that may want it (torch 2.13): a hang at times.
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
