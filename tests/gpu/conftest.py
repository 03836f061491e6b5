"""Tests that need an NVIDIA GPU; without one each is skipped with the reason. One GPU is enough for all."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.common import machine
from tests.gpu.served import host, make_policy


def pytest_report_header() -> str:
    """The machine, for logs that are kept."""
    from vllm.version import __version__

    described = {**machine(), "vllm": __version__}
    return ", ".join(f"{what} {value}" for what, value in described.items())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} sees no NVIDIA GPU"))
        # vLLM and what it imports warn in plenty; our own warnings stay errors
        item.add_marker(pytest.mark.filterwarnings(r"ignore:::(?!twinkle_callbacks|tests|recipes)"))


@pytest.fixture(scope="module", autouse=True)
def this_process_is_a_host_of_its_own() -> Iterator[None]:
    with host("trainer"):
        yield


@pytest.fixture(scope="module")
def served_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that every engine is started with, which no test trains."""
    folder = tmp_path_factory.mktemp("served")
    make_policy(seed=0).save_pretrained(folder)
    return folder


def pytest_sessionfinish() -> None:
    """Collects what vLLM's clients leave behind, which complains of sockets, while a warning is no error."""
    gc.unfreeze()  # vLLM freezes what there is when it starts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
