"""Two tensor-parallel workers: both get the weights, agree on every outcome, and stay in step after errors."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.launch import run_ranks
from tests.tiny_models import build

# one thread a worker and no binding: on two cores vLLM's workers otherwise wait for each other's
ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def test_tensor_parallel_engine_answers_like_a_fresh_load(tmp_path: Path) -> None:
    for seed in (0, 1):
        build("qwen3", seed=seed).save_pretrained(tmp_path / str(seed))
    results = []
    for mode, seed in (("synced", 0), ("fresh", 1)):
        output = tmp_path / f"{mode}.json"
        case = {"MODE": mode, "FOLDER": str(tmp_path / str(seed)), "OUTPUT": str(output)}
        run_ranks("tests.vllm.tensor_parallel", 1, timeout_s=240, env=ENV | case)
        results.append(json.loads(output.read_text()))
    assert results[0] == results[1]


def test_adapters_are_on_both_workers_or_on_none(tmp_path: Path) -> None:
    build("qwen3", seed=0).save_pretrained(tmp_path)
    case = {"FOLDER": str(tmp_path), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # functions go to the workers as pickles
    run_ranks("tests.vllm.adapter_ranks", 1, timeout_s=240, env=ENV | case)
