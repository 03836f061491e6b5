"""Two real processes: DDP and FSDP2 stream, on rank 0 alone, what one process alone would.

Run as a script, this file is one rank; each case there compares with a reference built from the same seed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.distributed.launch import run_ranks
from tests.tiny_models import KINDS, build
from twinkle_callbacks.sources import WeightSource, open_source

WORLD = 2
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
Pairs = list[tuple[str, torch.Tensor]]


# The test's side


@pytest.mark.parametrize("group", ["ddp", "fsdp2", "dtensor"])
def test_rank_0_streams_what_a_single_process_would_and_the_others_nothing(group: str, tmp_path: Path) -> None:
    env = {"GROUP": group, "FOLDER": str(tmp_path)}
    for rank, log in enumerate(run_ranks(Path(__file__), WORLD, 240, env)):
        ended = [line.split() for line in log.splitlines() if line.startswith("streamed ")]
        assert [case for _, case, _ in ended] == list(GROUPS[group])
        assert all((int(tensors) > 0) == (rank == 0) for _, _, tensors in ended)


# A rank's side


def drained(source: WeightSource) -> Pairs:
    pairs = [(name, tensor.clone()) for name, tensor in source.stream()]
    specs = [(spec.name, spec.dtype, spec.shape) for spec in source.specs()]
    assert dist.get_rank() or specs == [
        (name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in pairs
    ]
    assert not any(isinstance(tensor, DTensor) for _, tensor in pairs)
    return pairs


def assert_equal(got: Pairs, want: Iterable[tuple[str, torch.Tensor]]) -> None:
    wanted = dict(want)
    assert [name for name, _ in got] == list(wanted)
    for name, tensor in got:
        assert tensor.dtype == wanted[name].dtype, (name, tensor.dtype, wanted[name].dtype)
        assert torch.equal(tensor, wanted[name]), name


def reference(model: nn.Module, dtype: torch.dtype | None = None) -> Pairs:
    return [(name, tensor.clone()) for name, tensor in open_source(model, dtype=dtype).stream()]


def shard(model: Any, policy: MixedPrecisionPolicy | None = None) -> Any:
    kwargs = {"mp_policy": policy} if policy else {}
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for layer in layers:
        fully_shard(layer, **kwargs)
    fully_shard(model, **kwargs)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor) and p.to_local().numel() < p.numel()]
    assert len(sharded) == len(list(model.parameters())), "the model is not sharded as this test thinks"
    return model


def step(model: Any, tokens: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def ddp(kind: str) -> Pairs:
    model = DistributedDataParallel(build(kind))
    source = open_source(model, dtype=torch.bfloat16)
    assert_equal(drained(source), reference(build(kind), torch.bfloat16))
    step(model, torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank())))
    got = drained(source)
    assert_equal(got, reference(copy.deepcopy(model.module), torch.bfloat16))
    return got


def fsdp2(kind: str, **config: Any) -> Pairs:
    plain, tokens = build(kind, **config), torch.arange(16).reshape(2, 8)
    model = shard(build(kind, **config))
    source = open_source(model)
    assert_equal(drained(source), reference(plain))
    step(plain, tokens)  # the same batch on both ranks, so that the mean of the gradients is exactly each
    step(model, tokens)
    got = drained(source)
    assert_equal(got, reference(plain))
    return got


def fsdp2_mixed_precision() -> Pairs:
    model = shard(build("llama"), HALF)
    got = drained(open_source(model))
    assert_equal(got, reference(build("llama")))
    return got


def fsdp2_casts_before_the_gather() -> Pairs:
    model, sent = shard(build("qwen3_moe"), HALF), []
    source, start = open_source(model, dtype=torch.bfloat16), dist.batch_isend_irecv
    with pytest.MonkeyPatch.context() as patch:

        def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
            sent.extend(each.tensor.numel() for each in operations if each.op is dist.isend)
            return start(operations)

        patch.setattr(dist, "batch_isend_irecv", counted)
        got = drained(source)
    parts = [parameter.to_local().numel() for parameter in model.parameters()]
    half = sum(2 * numel for numel in parts) if dist.get_rank() else 0
    assert half <= sum(sent) <= half + 16 * len(parts), "each element of the other rank travels once, as bfloat16"
    assert_equal(got, reference(build("qwen3_moe"), torch.bfloat16))
    return got


def fsdp2_after_validation() -> Pairs:
    model = shard(build("llama"), HALF)
    before = open_source(model)
    for opened in (lambda: before, lambda: open_source(model)):
        with torch.no_grad():
            model(input_ids=torch.arange(8).reshape(1, 8))
        assert not isinstance(model.model.embed_tokens.weight, DTensor), "the root was expected to stay unsharded"
        got = drained(opened())
        assert_equal(got, reference(build("llama")))
    step(model, torch.arange(8).reshape(1, 8))
    return got


def fsdp2_inside_a_sharded_holder() -> Pairs:
    holder = nn.Module()
    holder.net = build("qwen3_moe")
    holder.value = nn.Linear(4, 4)
    for layer in holder.net.model.layers:
        fully_shard(layer, mp_policy=HALF)
    fully_shard(holder, mp_policy=HALF).unshard()  # as a validation leaves it
    assert not isinstance(holder.net.model.embed_tokens.weight, DTensor)
    got = drained(open_source(holder, module="net"))
    assert_equal(got, reference(build("qwen3_moe")))
    return got


def fsdp2_against_torchs_own_state_dict() -> Pairs:
    model = shard(build("qwen3"))
    step(model, torch.arange(8).reshape(1, 8) + dist.get_rank())
    want = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    want = {name: want[name] if want else None for name, _ in build("qwen3").named_parameters()}
    got = drained(open_source(model))
    assert_equal(got, {} if dist.get_rank() else want.items())
    return got


def tensor_parallel() -> Pairs:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 5))
    want = reference(module)
    mesh = init_device_mesh("cpu", (WORLD,))
    parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    got = drained(open_source(module))
    assert_equal(got, want)
    return got


def transformers_tensor_parallel(kind: str) -> Pairs:
    """Cut by transformers' own plan, which packs gate and up projections of fused experts."""
    folder = Path(os.environ["FOLDER"]) / kind
    if dist.get_rank() == 0:
        build(kind).save_pretrained(folder)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=WORLD))
    cut = [p for p in model.parameters() if isinstance(p, DTensor) and p.to_local().numel() < p.numel()]
    assert len(cut) > len(model.model.layers) * 4
    got = drained(open_source(model))
    assert_equal(got, reference(build(kind)))
    return got


def sharded_buffer() -> Pairs:
    module = nn.Linear(2, 2)
    table = torch.arange(10.0).reshape(5, 2)
    module.register_buffer("table", distribute_tensor(table, init_device_mesh("cpu", (WORLD,)), [Shard(0)]))
    got = drained(open_source(module, dtype=torch.bfloat16))
    assert dist.get_rank() or torch.equal(dict(got)["table"], table.to(torch.bfloat16))
    return got


GROUPS: dict[str, dict[str, Callable[[], Pairs]]] = {
    "ddp": {kind: (lambda kind=kind: ddp(kind)) for kind in ("llama", "qwen3_moe")},
    "fsdp2": {
        **{kind: (lambda kind=kind: fsdp2(kind)) for kind in KINDS},
        "uneven_shards": lambda: fsdp2("llama", vocab_size=67, intermediate_size=193),
        "mixed_precision": fsdp2_mixed_precision,
        "cast_before_gather": fsdp2_casts_before_the_gather,
        "after_validation": fsdp2_after_validation,
        "sharded_holder": fsdp2_inside_a_sharded_holder,
        "torch_state_dict": fsdp2_against_torchs_own_state_dict,
    },
    "dtensor": {
        "tensor_parallel": tensor_parallel,
        "transformers_dense": lambda: transformers_tensor_parallel("qwen3"),
        "transformers_experts": lambda: transformers_tensor_parallel("qwen3_moe"),
        "sharded_buffer": sharded_buffer,
    },
}


def main() -> None:
    dist.init_process_group("gloo")
    for case, run in GROUPS[os.environ["GROUP"]].items():
        print("case", case)
        print("streamed", case, len(run()))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
