"""One of two trainer ranks whose policy cannot be streamed, on one of them or on both: each learns why, none hangs.

Rank 0 has the fake rollout at the seam, which shows whether anything was sent.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests import peft_cases
from tests.distributed.sources_checks import run_all
from tests.distributed.sources_fsdp1 import fsdp1
from tests.distributed.sources_sharding import fsdp2, zero3
from tests.tiny_models import VOCAB, build
from tests.unit.fake_rollout import FakeRollout
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.errors import SourceError, SyncError
from twinkle_callbacks.sources import dtensor, gather
from twinkle_callbacks.sources import fsdp1 as flat_handles
from twinkle_callbacks.sources import zero3 as zero3_handles
from twinkle_callbacks.sources.adapter import AdapterSource
from twinkle_callbacks.sources.handles import Handle

GROUP_TIMEOUT_S = 30.0
SENDING = ("start", "update:")
Scenario = Callable[[FakeRollout], None]


def synchronizer(model: Any, rollout: FakeRollout) -> WeightSynchronizer:
    return WeightSynchronizer(model, rollouts=rollout, bucket_size_mb=1, timeout_s=20)


def sent(rollout: FakeRollout) -> list[str]:
    return [call for call in rollout.calls if call.startswith(SENDING)]


def refused(model: Any, rollout: FakeRollout, match: str) -> None:
    """Construction fails on this rank, with the cause, before any rollout is reached."""
    with pytest.raises(SourceError, match=match):
        synchronizer(model, rollout)
    assert rollout.calls == []


@contextmanager
def refused_at_the_next_push(model: Any, rollout: FakeRollout, match: str) -> Iterator[WeightSynchronizer]:
    """What is changed inside fails the next push on this rank, with the cause, before it reaches a rollout."""
    with synchronizer(model, rollout) as sync:
        yield sync
        weights = dict(rollout.weights)
        rollout.calls.clear()
        with pytest.raises(SyncError, match=match) as caught:
            sync.push(version=1)
        assert caught.value.phase == "start"
        assert sent(rollout) == []
        assert rollout.weights.keys() == weights.keys()
        assert all(rollout.weights[name] is tensor for name, tensor in weights.items())


def on_rank(rank: int) -> bool:
    return dist.get_rank() == rank


# Parameters that no rank owns


def parameter_on_a_mesh_without_the_rank_that_sends(rollout: FakeRollout) -> None:
    policy = build("llama")
    weight = policy.model.norm.weight.detach()
    mesh = DeviceMesh("cpu", [1])
    lost = DTensor.from_local(weight if on_rank(1) else weight[:0], mesh, [Shard(0)], shape=weight.shape, stride=(1,))
    policy.model.norm.weight = nn.Parameter(lost)
    refused(policy, rollout, r"model\.norm\.weight.*no rank that sends holds any part")


def partition_that_one_rank_freed(rollout: FakeRollout) -> None:
    trained = zero3(build("llama"))
    if on_rank(1):
        trained.policy.model.norm.weight.ds_tensor.data = torch.empty(0)
    refused(trained.model, rollout, r"trainer rank 1.*rank 1 holds 0 of 128" if on_rank(0) else "rank 1 holds 0 of 128")


def flat_parameter_that_one_rank_freed(rollout: FakeRollout) -> None:
    trained = fsdp1(build("llama"))
    if on_rank(1):
        flat = trained.model._handle.flat_param
        flat.data = torch.empty(0)
        flat._local_shard = flat.data
    refused(trained.model, rollout, "hold")


def parameter_without_values(rollout: FakeRollout) -> None:
    policy = build("llama")
    if on_rank(1):
        policy.model.norm.to("meta")
    refused(policy, rollout, r"model\.norm\.weight.*meta")


# Shapes that differ between ranks


def shape_that_differs_between_ranks(rollout: FakeRollout) -> None:
    policy = build("llama", intermediate_size=192 + 2 * dist.get_rank())
    refused(policy, rollout, r"model\.layers\.0\.mlp\.gate_proj\.weight.*\[192, 128\]")


def part_of_another_size_than_its_placement_says(rollout: FakeRollout) -> None:
    policy = build("llama")
    weight = policy.model.norm.weight.detach()
    rows = 64 + dist.get_rank()
    cut = DTensor.from_local(weight[:rows], init_device_mesh("cpu", (2,)), [Shard(0)], shape=weight.shape, stride=(1,))
    policy.model.norm.weight = nn.Parameter(cut)
    refused(policy, rollout, r"rank 1 holds \[65\] of \[128\]")


# Adapters


def adapter_of_another_rank_on_one_rank(rollout: FakeRollout) -> None:
    """What is sent has the same shapes on both; what it is merged from has not."""
    config = peft.LoraConfig(**{**peft_cases.LORA, "r": 8 if on_rank(1) else 4})
    refused(
        fsdp2(peft_cases.wrap(build("qwen3"), config)).model, rollout, r"from \[8, 128\], .* rank 0 has .*\[4, 128\]"
    )


def adapter_that_does_not_exist(rollout: FakeRollout) -> None:
    model = fsdp2(peft_cases.CASES["lora"](torch.float32)).model
    with pytest.raises(SourceError, match=r"'missing'.*'default'"):
        synchronizer(AdapterSource(model, adapter_name="missing"), rollout)
    assert rollout.calls == []


def adapter_removed_after_the_handshake(rollout: FakeRollout) -> None:
    model = peft_cases.CASES["lora_two_active"](torch.float32)
    with refused_at_the_next_push(AdapterSource(model, adapter_name="second"), rollout, "second"):
        if on_rank(1):
            model.delete_adapter("second")


def policy_merged_before_it_is_synced(rollout: FakeRollout) -> None:
    model = peft_cases.CASES["lora"](torch.float32)
    model.merge_adapter()
    refused(model, rollout, "merged")


def policy_merged_after_the_handshake(rollout: FakeRollout) -> None:
    model = peft_cases.CASES["lora"](torch.float32)
    with refused_at_the_next_push(model, rollout, "merged"):
        if on_rank(1):
            model.merge_adapter()


# Changes since the handshake


def parameter_replaced_on_one_rank_after_the_handshake(rollout: FakeRollout) -> None:
    policy = build("qwen3")
    with refused_at_the_next_push(policy, rollout, r"(trainer rank 1.*)?lm_head\.weight was .*\[64, 128\] and is"):
        if on_rank(1):
            policy.lm_head = nn.Linear(128, VOCAB + 1, bias=False)


def parameter_added_on_all_ranks_after_the_handshake(rollout: FakeRollout) -> None:
    policy = build("qwen3")
    model = fsdp2(policy).model
    with refused_at_the_next_push(model, rollout, "lm_head.bias is new"):
        policy.lm_head.bias = nn.Parameter(torch.zeros(VOCAB))


# A read that fails in the middle of a gather


def _read_fails(rollout: FakeRollout, model: Any, module: Any, name: str, failing_rank: int) -> None:
    """Makes what one rank holds of `name` unreadable, by the handle that each stream makes of it."""
    original = getattr(module, name)

    def unreadable(*args: Any) -> Any:
        def fail() -> torch.Tensor:
            raise OSError("the shard is lost")

        made = original(*args)
        if isinstance(made, Handle):
            return dataclasses.replace(made, local=fail) if re.search("layers.1.mlp.up_proj", args[0]) else made
        places = list(made)
        made[places[-1]] = dataclasses.replace(made[places[-1]], local=fail)
        return made

    with synchronizer(model, rollout) as sync:
        wanted = dict(rollout.weights)
        with pytest.MonkeyPatch.context() as patch:
            if on_rank(failing_rank):
                patch.setattr(module, name, unreadable)
            with pytest.raises(SyncError, match="OSError: the shard is lost") as caught:
                sync.push(version=1)
        assert caught.value.phase == "transfer"
        assert (f"trainer rank {failing_rank}" in str(caught.value)) == (failing_rank != 0)
        assert rollout.weights.keys() == wanted.keys(), "a failed push was committed"
        assert all(rollout.weights[name] is tensor for name, tensor in wanted.items()), "a failed push was committed"
        assert sync.push(version=2).version == 2
    assert wanted.keys() == rollout.weights.keys()
    assert all(torch.equal(rollout.weights[name], tensor) for name, tensor in wanted.items())


def read_fails_in_the_middle_of_a_gather_of_fsdp2(rollout: FakeRollout) -> None:
    _read_fails(rollout, fsdp2(build("qwen3")).model, dtensor, "handle", 1)


def read_fails_on_the_rank_that_sends(rollout: FakeRollout) -> None:
    _read_fails(rollout, fsdp2(build("qwen3")).model, dtensor, "handle", 0)


def read_fails_in_the_middle_of_a_gather_of_fsdp1(rollout: FakeRollout) -> None:
    _read_fails(rollout, fsdp1(build("qwen3")).model, flat_handles, "handles", 1)


def read_fails_in_the_middle_of_a_gather_of_zero3(rollout: FakeRollout) -> None:
    _read_fails(rollout, zero3(build("qwen3")).model, zero3_handles, "handle", 1)


def no_memory_for_a_bucket_on_the_rank_that_sends(rollout: FakeRollout) -> None:
    make, made = gather._Bucket, []

    def second_finds_none(*args: Any) -> Any:
        made.append(args)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no room for a bucket")
        return make(*args)

    with synchronizer(fsdp2(build("qwen3")).model, rollout) as sync:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gather, "BUCKET_BYTES", 100_000)
            patch.setattr(gather, "_Bucket", second_finds_none)
            with pytest.raises(SyncError, match="OutOfMemoryError: no room for a bucket"):
                sync.push(version=1)
        assert sync.push(version=2).version == 2


SCENARIOS: list[Scenario] = [
    parameter_on_a_mesh_without_the_rank_that_sends,
    partition_that_one_rank_freed,
    flat_parameter_that_one_rank_freed,
    parameter_without_values,
    shape_that_differs_between_ranks,
    part_of_another_size_than_its_placement_says,
    adapter_of_another_rank_on_one_rank,
    adapter_that_does_not_exist,
    adapter_removed_after_the_handshake,
    policy_merged_before_it_is_synced,
    policy_merged_after_the_handshake,
    parameter_replaced_on_one_rank_after_the_handshake,
    parameter_added_on_all_ranks_after_the_handshake,
    read_fails_in_the_middle_of_a_gather_of_fsdp2,
    read_fails_on_the_rank_that_sends,
    read_fails_in_the_middle_of_a_gather_of_fsdp1,
    read_fails_in_the_middle_of_a_gather_of_zero3,
    no_memory_for_a_bucket_on_the_rank_that_sends,
]


def run(scenario: Scenario) -> None:
    rollout = FakeRollout()
    try:
        scenario(rollout)
    finally:
        rollout.end()


def main() -> None:
    chosen = os.environ.get("SCENARIOS", "").split(",")
    wanted = [scenario for scenario in SCENARIOS if chosen == [""] or scenario.__name__ in chosen]
    run_all({scenario.__name__: partial(run, scenario) for scenario in wanted}, GROUP_TIMEOUT_S)


if __name__ == "__main__":
    main()
