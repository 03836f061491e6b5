"""Callbacks that push a policy's newest weights into running vLLM servers after each optimizer step.

The framework callbacks live in `twinkle_callbacks.lightning`, `.transformers` and `.accelerate`; all three use
`WeightSynchronizer`, which loops of one's own call directly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinkle_callbacks.report import SyncReport
    from twinkle_callbacks.sync import WeightSynchronizer

__version__ = "0.1.0"
__all__ = ["SyncReport", "WeightSynchronizer", "__version__"]

# Resolved at first use, so that importing the package, as vLLM's API server and `twinkle-callbacks --help` do, stays
# cheap: the synchronizer imports torch.
_HOMES = {"SyncReport": "twinkle_callbacks.report", "WeightSynchronizer": "twinkle_callbacks.sync"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
