"""A trained policy on the GPU, and vLLM engines beside it, each with a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.gpu_nccl import HOST_ENV
from tests.tiny_models import build
from tests.vllm.engines import Answers, answers, end, make_llm
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.rollouts import LocalRollout

ENGINES = ["ipc", "nccl"]
DEVICE = "cuda"
SEED = 1
BUCKET_MB = 4
TIMEOUT_S = 20.0
MIB = 1 << 20


class Served(NamedTuple):
    """An engine, and the process that it runs in."""

    llm: Any
    pid: int

    def ask(self, question: str) -> Any:
        """A question of `probe.Probe`."""
        [answer] = self.llm.collective_rpc(f"twinkle_{question}")
        return answer


class Memory(NamedTuple):
    """In MiB: what torch holds here and in the worker, and what all processes take of the GPU."""

    trainer: float
    worker: float
    gpu: float

    @classmethod
    def now(cls, served: Served) -> Memory:
        gc.collect()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        sizes = torch.cuda.memory_reserved(), served.ask("reserved_bytes"), total - free
        return cls(*(size / MIB for size in sizes))

    def assert_flat(self, later: Memory, slack_mib: float) -> None:
        growth = max(b - a for a, b in zip(self, later, strict=True))
        assert growth <= slack_mib, f"{self} became {later}"


@contextmanager
def host(name: str) -> Iterator[None]:
    """What NCCL takes this process for, or one that is started here, when it first looks."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in HOST_ENV.items():
            patch.setenv(variable, value.format(rank=f"-{name}"))
        yield


def serve(folder: Path, *, synced: bool, **settings: Any) -> Served:
    """An engine with a process of its own, ended by `tests.vllm.engines.release`; `settings` are vLLM's."""
    before = set(multiprocessing.active_children())
    with host("worker"):
        probe = {"worker_extension_cls": "tests.gpu.probe.Probe"}
        llm = small_llm(folder, own_process=True, synced=synced, **probe, **settings)
    [process] = set(multiprocessing.active_children()) - before
    assert process.pid not in (None, os.getpid())
    return Served(llm, process.pid)


def small_llm(folder: Path, *, own_process: bool, synced: bool, **settings: Any) -> Any:
    """A `vllm.LLM` that takes little of the GPU; `settings` are vLLM's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(own_process)))
        settings |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.05}  # of the GPU, free when it starts
        return make_llm(folder, synced=synced, **settings)


def fresh_answers(folder: Path, **settings: Any) -> Answers:
    """What an engine answers that loads the folder's weights itself; in this process, where it starts much faster."""
    llm = small_llm(folder, own_process=False, synced=False, **settings)
    found = answers(llm)
    end(llm)
    return found


def synchronizer(policy: torch.nn.Module, rollout: LocalRollout, engine: str, **settings: Any) -> WeightSynchronizer:
    settings = {"timeout_s": TIMEOUT_S, "bucket_size_mb": BUCKET_MB, **settings}
    return WeightSynchronizer(policy, rollouts=rollout, engine=engine, **settings)


def make_policy(seed: int, kind: str = "qwen3") -> torch.nn.Module:
    """A model of two layers; its norms are small enough to share a block of torch's memory with each other.

    `kind` is one of `tests.tiny_models.KINDS` whose configuration has `head_dim`.
    """
    policy: torch.nn.Module = build(kind, seed=seed, head_dim=64).to(DEVICE, torch.bfloat16)
    return policy


def train(policy: torch.nn.Module, step: int) -> None:
    """Changes all weights in place, the same way for the same step; at times some move to other memory."""
    values = torch.Generator(DEVICE).manual_seed(step)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=values, device=DEVICE, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.01)
        if step % 10 == 5:
            for parameter in list(policy.parameters())[::3]:
                parameter.data = parameter.data.clone()
