"""Engines carry weights from the trainer to the rollouts. `get_engine` finds one by name, this package's or another's.

Others register theirs under the entry-point group `twinkle_callbacks.engines`, as `name = module:Class`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from twinkle_callbacks.errors import ConfigError

if TYPE_CHECKING:
    from twinkle_callbacks.engines.base import CheckpointEngine
    from twinkle_callbacks.engines.gloo import GlooCheckpointEngine
    from twinkle_callbacks.engines.ipc import IPCCheckpointEngine
    from twinkle_callbacks.engines.nccl import NCCLCheckpointEngine
    from twinkle_callbacks.engines.shm import SharedMemoryCheckpointEngine

__all__ = [
    "CheckpointEngine",
    "GlooCheckpointEngine",
    "IPCCheckpointEngine",
    "NCCLCheckpointEngine",
    "SharedMemoryCheckpointEngine",
    "get_engine",
]

ENTRY_POINT_GROUP = "twinkle_callbacks.engines"
BUILTIN = {
    "gloo": "twinkle_callbacks.engines.gloo:GlooCheckpointEngine",
    "ipc": "twinkle_callbacks.engines.ipc:IPCCheckpointEngine",
    "nccl": "twinkle_callbacks.engines.nccl:NCCLCheckpointEngine",
    "shm": "twinkle_callbacks.engines.shm:SharedMemoryCheckpointEngine",
}
_EXPORTS = {
    "CheckpointEngine": "twinkle_callbacks.engines.base",
    "GlooCheckpointEngine": "twinkle_callbacks.engines.gloo",
    "IPCCheckpointEngine": "twinkle_callbacks.engines.ipc",
    "NCCLCheckpointEngine": "twinkle_callbacks.engines.nccl",
    "SharedMemoryCheckpointEngine": "twinkle_callbacks.engines.shm",
}


def get_engine(name: str) -> type[CheckpointEngine]:
    """Returns the engine class registered under `name`.

    Raises:
        ConfigError: no such engine, or it could not be imported; lists what there is.
    """
    targets = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)} | BUILTIN
    if name not in targets:
        raise ConfigError(f"engine={name!r}: there is no such engine; installed are {', '.join(sorted(targets))}")
    module, _, attribute = targets[name].partition(":")
    try:
        engine: type[CheckpointEngine] = getattr(import_module(module), attribute)
    except Exception as error:  # importing a package of others may raise anything
        raise ConfigError(f"engine={name!r}: {targets[name]} cannot be imported: {error}") from error
    return engine


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
