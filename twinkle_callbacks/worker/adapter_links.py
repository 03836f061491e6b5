"""The links of trainers that send adapters alone: one for each adapter, all at the same time, beside the base's own.

An adapter needs none of vLLM's update session. Its trainer calls `receive`; the worker receives, builds the version and
keeps it in the `AdapterStore`; then vLLM's own `add_lora` loads it between two steps of the engine. All of this leaves
what is served alone until that last call, which adds a version and changes none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.buckets.packing import dtype_name
from twinkle_callbacks.errors import ConfigError, RolloutError, TwinkleError
from twinkle_callbacks.worker.adapters import AdapterStore
from twinkle_callbacks.worker.base_digests import BaseDigests
from twinkle_callbacks.worker.link import Link
from twinkle_callbacks.worker.messages import (
    COMPARE,
    LEAVE,
    RECEIVE,
    Adapter,
    AdapterCall,
    Compared,
    Joined,
    JoinRequest,
    LoRARuns,
)
from twinkle_callbacks.worker.stage import Stage

logger = logging.getLogger("vllm.twinkle_callbacks")


class AdapterLinks:
    """All links of one worker that carry adapters. vLLM's main thread calls all methods.

    Args:
        store: the worker's adapters; None if it runs without LoRA, which the trainer is told.
        base: digests of its base.
    """

    def __init__(self, store: AdapterStore | None, base: BaseDigests) -> None:
        self._store = store
        self._base = base
        self._links: dict[str, Link] = {}

    def check(self, request: JoinRequest) -> None:
        """Whether this trainer may have its adapter's link.

        Raises:
            RolloutError: another trainer keeps an adapter of this name, or there is no slot for one more.
        """
        assert request.adapter is not None
        name = request.adapter.name
        known = self._links.get(name)
        if known is not None and known.request.client != request.client and known.is_alive():
            raise RolloutError(
                f"adapter {name!r} is kept fresh by another trainer; choose another adapter_name, or close that trainer"
            )
        if self._store is None:
            return
        held = set(self._store.names())
        for other, link in list(self._links.items()):
            if other not in held | {name} and not link.is_alive():
                self._close(other)
        held |= set(self._links)
        if name not in held and len(held) >= self._store.max_loras:
            raise RolloutError(
                f"all {self._store.max_loras} adapter slots are taken (by {', '.join(sorted(held))}); start the server "
                f"with --max-loras {len(held) + 1}, or detach one: twinkle-callbacks adapters detach URL NAME"
            )

    def join(self, link: Link, rank: int, describe: Callable[[LoRARuns | None], Joined]) -> None:
        """Puts a link in the place of the one that its adapter had, and starts joining."""
        assert link.request.adapter is not None
        adapter = link.request.adapter
        self._close(adapter.name)
        self._links[adapter.name] = link
        link.join(rank, lambda: describe(self.runs(adapter)))

    def runs(self, adapter: Adapter | None) -> LoRARuns | None:
        """How this worker runs LoRA, and why it cannot serve `adapter`, if it cannot. On a link's thread."""
        store = self._store
        if store is None:
            return None
        refusal = None
        if adapter is not None:
            try:
                store.check(adapter.name, adapter.config, adapter.shapes)
            except TwinkleError as error:
                refusal = Failure.of(error)
        return LoRARuns(
            store.max_loras,
            store.max_lora_rank,
            dtype_name(store.lora_dtype),
            store.names(),
            self._base.commits,
            refusal,
        )

    def call(self, call: AdapterCall) -> None:
        """Does what the trainer asks, in the background; it is told in a receipt.

        Raises:
            RolloutError: no trainer of this adapter has joined.
            ConfigError: no such action.
        """
        link = self._links.get(call.adapter)
        if call.action == LEAVE:
            self._close(call.adapter)
        elif link is None:
            raise RolloutError(f"the trainer of adapter {call.adapter!r} has not joined, or has left")
        elif call.action == RECEIVE:
            path = AdapterPath.parse(call.path)
            if path is None:
                raise ConfigError(f"{call.path!r} is not the path of a version")
            link.receive(call.number, partial(self._keep, link, path))
        elif call.action == COMPARE:
            link.submit(partial(self._compare, link, call))
        else:
            raise ConfigError(f"an adapter's trainer cannot ask for {call.action!r}")

    def _keep(self, link: Link, path: AdapterPath, stage: Stage) -> int:
        adapter = link.request.adapter
        assert adapter is not None
        if self._store is None:
            raise RolloutError("this server runs without LoRA; start it with --enable-lora")
        shapes = {name: tuple(tensor.shape) for name, tensor in stage.tensors.items()}
        if shapes != adapter.shapes:
            raise RolloutError(f"adapter {adapter.name!r} has other tensors than its trainer said when it joined")
        self._store.put(adapter.name, path, adapter.config, stage.tensors)
        return self._base.commits

    def _compare(self, link: Link, call: AdapterCall) -> None:
        commits = self._base.commits  # before it is looked at, which takes a while
        try:
            compared = Compared(self._base.differing(call.base), base_commits=commits)
        except Exception as error:  # whatever reading the checkpoint raises; told to the trainer
            logger.warning("cannot tell whether the base is that of adapter %r: %s", call.adapter, error)
            compared = Compared(failure=Failure.of(error), base_commits=self._base.commits)
        link.post(f"compared-{call.number}", compared)

    def close(self) -> None:
        """Ends all links; what they sent stays served."""
        for name in list(self._links):
            self._close(name)

    def _close(self, name: str) -> None:
        link = self._links.pop(name, None)
        if link is not None:
            link.close()
