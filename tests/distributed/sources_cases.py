"""One of the ranks of the conformance test: every case of $KINDS in turn, whatever fails.

Each prints `result KIND CASE ok`, or the error, and all ranks go on together; a rank that stays behind in a gather is
ended by the deadline of the test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from tests import peft_cases
from tests.distributed.sources_checks import conforms, run_all, saved, saved_adapter
from tests.distributed.sources_sharding import shard
from tests.distributed.sources_trained import Tensors, layers
from tests.tiny_models import VOCAB, build
from twinkle_callbacks.sources import AdapterSource, WeightSource, open_source

GROUP_TIMEOUT_S = 60.0


def whole(model: Any, dtype: torch.dtype | None) -> WeightSource:
    return open_source(model, dtype=dtype)


def below_adapters(model: Any, dtype: torch.dtype | None) -> WeightSource:
    return open_source(model, dtype=dtype, merge=False)


def adapter_alone(model: Any, dtype: torch.dtype | None) -> WeightSource:
    return AdapterSource(model, dtype=dtype)


class Case(NamedTuple):
    """A policy, what is streamed of it, and what the stream of a filled one has to be."""

    build: Callable[[], Any]
    source: Callable[[Any, torch.dtype | None], WeightSource] = whole
    want: Callable[[Any], Tensors] = saved


def merged(name: str) -> Case:
    return Case(lambda: peft_cases.CASES[name](torch.float32))


def base(name: str, kind: str) -> Case:
    """Wanted is a model of this kind that has never met PEFT or a shard: what `name` is built on does not train."""
    return Case(
        lambda: peft_cases.CASES[name](torch.float32),
        below_adapters,
        lambda _: saved(peft_cases.base(kind, torch.float32)),
    )


def adapter(name: str) -> Case:
    return Case(lambda: peft_cases.CASES[name](torch.float32), adapter_alone, saved_adapter)


def frozen() -> nn.Module:
    policy = build("qwen3")
    layers(policy)[0].requires_grad_(False)
    return policy


CASES: dict[str, Case] = {
    "full": Case(lambda: build("qwen3", attention_bias=True)),
    "uneven": Case(lambda: build("llama", vocab_size=67, intermediate_size=194)),
    "tied": Case(lambda: build("llama")),
    "tied gpt2": Case(lambda: build("gpt2")),
    "frozen": Case(frozen),
    "moe": Case(lambda: build("qwen3_moe")),
    "moe mixtral": Case(lambda: build("mixtral")),
    "lora merged": merged("lora"),
    "lora merged two active": merged("lora_two_active"),
    "lora merged modules to save": merged("modules_to_save"),
    "lora merged tied tokens": merged("trainable_tokens_tied"),
    "dora merged": merged("dora"),
    "moe lora merged": merged("moe_experts"),
    "base only": base("modules_to_save", "qwen3"),
    "base only moe": base("moe_experts", "qwen3_moe"),
    "adapter only": adapter("lora"),
    "adapter only moe": adapter("moe_experts"),
}

_IN_PLACE = "PEFT adds to the views of FSDP1 in place in its forward pass"

KINDS_OF_TWO = ["ddp", "fsdp1", "fsdp1_flat", "fsdp2", "tp", "zero1", "zero2", "zero3"]
OTHER_SETTINGS = ["fsdp1_no_shard", "fsdp1_grad_op", "fsdp1_mixed_precision", "zero3_persistent", "zero3_bfloat16"]
KINDS_OF_FOUR = ["fsdp2_tp", "hsdp", "fsdp1_hybrid"]
FEW_CASES = ["tied", "moe", "lora merged", "adapter only"]
UNFIT = {
    ("tp", "tied gpt2"): "its fused projections are no nn.Linear, which torch's plans cut",
    ("fsdp1_flat", "lora merged tied tokens"): "the tokens that train lie in one unit with the frozen embedding",
}
"""What a framework cannot hold at all: (kind, case) -> why."""

UNTRAINED = {
    ("tp", "dora merged"): "PEFT's DoRA adds plain tensors to DTensors in its forward pass",
    ("fsdp1", "moe lora merged"): _IN_PLACE,
    ("fsdp1", "base only moe"): _IN_PLACE,
    ("fsdp1", "adapter only moe"): _IN_PLACE,
    ("fsdp1_flat", "moe lora merged"): _IN_PLACE,
    ("fsdp1_flat", "base only moe"): _IN_PLACE,
    ("fsdp1_flat", "adapter only moe"): _IN_PLACE,
}
"""What a framework holds but cannot train, so that it is streamed as it was built: (kind, case) -> why."""


def run(kind: str, name: str) -> None:
    case = CASES[name]
    trained = shard(kind, case.build())
    if (kind, name) not in UNTRAINED:
        same_on_all_ranks = "tp" in kind
        generator = torch.Generator().manual_seed(0 if same_on_all_ranks else dist.get_rank())
        trained.step(torch.randint(0, VOCAB, (1, 8), generator=generator))
        assert trained.optimizer_state(), "no optimizer state to protect"
    conforms(trained, case.build, case.source, case.want)


def main() -> None:
    chosen = product(os.environ["KINDS"].split(","), os.environ["CASES"].split(","))
    fit = [(kind, name) for kind, name in chosen if (kind, name) not in UNFIT]
    run_all({f"{kind} | {name}": partial(run, kind, name) for kind, name in fit}, GROUP_TIMEOUT_S)


if __name__ == "__main__":
    main()
