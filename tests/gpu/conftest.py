"""Tests that need an NVIDIA GPU; without one each is skipped with the reason. One GPU is enough for all."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} sees no NVIDIA GPU"))
        # vLLM and what it imports warn in plenty; our own warnings stay errors
        item.add_marker(pytest.mark.filterwarnings(r"ignore:::(?!twinkle_callbacks|tests|recipes)"))


def pytest_sessionfinish() -> None:
    """Collects what vLLM's clients leave behind, which complains of sockets, while a warning is no error."""
    gc.unfreeze()  # vLLM freezes what there is when it starts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
