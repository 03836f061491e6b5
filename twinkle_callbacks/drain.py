"""Takes a source's stream to its end on every trainer rank, whatever fails on one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any

import torch

from twinkle_callbacks.errors import SourceError, text_of
from twinkle_callbacks.sources import WeightSource
from twinkle_callbacks.trainer_group import TrainerGroup, text_of_failure

logger = logging.getLogger(__name__)

Stream = Generator[tuple[str, torch.Tensor], None, None]


def drain(group: TrainerGroup, source: WeightSource, use: Callable[[Stream], None]) -> Exception | None:
    """Collective: rank 0 gives the stream to `use`, the others do their part of the gathers.

    Returns:
        What went wrong, on whichever rank it was; None if nothing did. Raised by the caller, once it is in order.
    """
    stream = _on_this_device(source.stream())
    failure: Exception | None = None
    try:
        if group.is_leader:
            use(stream)
        else:
            for _ in stream:
                pass
    except Exception as error:  # whatever a source raises; reported once all ranks are past the gathers
        failure = error
        logger.error("trainer rank %d: %s: %s", group.rank, type(error).__name__, text_of(error))
        _leave(stream)
    first = group.first_failure(text_of_failure(failure))
    if first is None:
        return None
    rank, text = first
    return SourceError(f"trainer rank {rank}: {text}") if rank else failure


def _leave(stream: Generator[Any, None, None]) -> None:
    """Ends a stream early. One that never began does not know that others gather for it, so it begins first."""
    try:
        next(stream, None)
        stream.close()
    except Exception as error:  # the push has failed already, with another cause
        logger.error("leaving the gather: %s: %s", type(error).__name__, text_of(error))


def _on_this_device(stream: Stream) -> Stream:
    """The stream, drained on this thread's accelerator in whichever thread: a new thread starts on device 0."""
    if not torch.accelerator.is_available():
        return stream
    index = torch.accelerator.current_device_index()

    def pinned() -> Stream:
        torch.accelerator.set_device_index(index)
        yield from stream

    return pinned()
