"""Versions of adapters in the process that makes vLLM's requests: the API server, or that of an offline `LLM`.

Each version is one `LoRARequest` object with an id of its own. Requests keep the object of the version they began with;
once nobody does any more, vLLM is told to forget it.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# Above those that people number their own adapters with. One count for the process, since several objects may give ids
# to one engine, which takes an id that it knows for the version that it knows.
_ids = itertools.count(1 << 20)


def next_id() -> int:
    """A `lora_int_id` for an engine in this process, where there is no server to give one. On any thread."""
    return next(_ids)


def new_version(name: str, lora_id: int, path: str, when_unused: Callable[[int], Any], **more: Any) -> LoRARequest:
    """A `LoRARequest` that calls `when_unused(lora_id)` once it is replaced and the last request with it has ended.

    Args:
        name: the model name that requests give.
        lora_id: never used before on this engine.
        path: as `AdapterPath` writes it.
        when_unused: called once, on whichever thread drops the last reference.
        more: further fields of `LoRARequest`.
    """
    version: LoRARequest = _version_class()(lora_name=name, lora_int_id=lora_id, lora_path=path, **more)
    weakref.finalize(version, when_unused, lora_id).atexit = False
    return version


@functools.cache
def _version_class() -> Any:
    from vllm.lora.request import LoRARequest

    class Version(LoRARequest, weakref=True):  # type: ignore[call-arg,misc]  # vLLM is not seen by the type checker
        """A `LoRARequest` whose end can be seen; the same on the wire to vLLM's engine."""

    return Version
