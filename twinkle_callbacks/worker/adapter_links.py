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
from twinkle_callbacks.buckets.digest import first_few
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.buckets.packing import dtype_name
from twinkle_callbacks.errors import ConfigError, RolloutError, WeightMismatchError
from twinkle_callbacks.worker.adapters import AdapterStore
from twinkle_callbacks.worker.base_digests import BaseDigests
from twinkle_callbacks.worker.link import Link, alive
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
from twinkle_callbacks.worker.sleep import WEIGHTS, require_awake
from twinkle_callbacks.worker.stage import Stage

logger = logging.getLogger("vllm.twinkle_callbacks")


class AdapterLinks:
    """All links of one worker that carry adapters. vLLM's main thread calls all methods.

    Args:
        store: the worker's adapters; None if it runs without LoRA, which the trainer is told.
        base: digests of its base.
        replicated: whether the worker is one of several data-parallel replicas.
    """

    def __init__(self, store: AdapterStore | None, base: BaseDigests, *, replicated: bool = False) -> None:
        self._store = store
        self._base = base
        self._replicated = replicated
        self._links: dict[str, Link] = {}

    def check(self, request: JoinRequest) -> None:
        """Whether this trainer may have its adapter's link. Ends the links whose trainers are gone.

        Raises:
            RolloutError: another trainer keeps an adapter of this name, or there is no slot for one more.
        """
        assert request.adapter is not None
        name = request.adapter.name
        there = alive(self._links.values())
        for other, link in list(self._links.items()):
            if link not in there:
                self._close(other)
        known = self._links.get(name)
        if known is not None and known.request.client != request.client:
            raise RolloutError(
                f"adapter {name!r} is kept fresh by another trainer; choose another adapter_name, or close that trainer"
            )
        if self._store is None:
            return
        held = {*self._store.names(), *self._links}
        if name not in held and len(held) >= self._store.max_loras:
            raise RolloutError(
                f"all {self._store.max_loras} adapter slots are taken (by {', '.join(sorted(held))}); start the server "
                f"with --max-loras {len(held) + 1}, or detach one: twinkle-callbacks adapters detach URL NAME"
            )

    def check_base(self, base_of: str) -> None:
        """Whether the base may be replaced by that of one adapter: not beneath others, which were made for this one.

        Args:
            base_of: the adapter's name; empty where the base may be replaced whatever there is.

        Raises:
            RolloutError: there are others.
        """
        if base_of and (others := self._others(base_of)):
            raise RolloutError(
                f"the base is not replaced for adapter {base_of!r}, for other adapters are on it "
                f"({', '.join(others)}); start from the server's base, or detach them"
            )

    def _others(self, name: str) -> list[str]:
        """The adapters but one: those that are loaded, and those whose trainers are there. On any thread."""
        loaded = set() if self._store is None else set(self._store.names())
        links = {link: other for other, link in list(self._links.items()) if other not in loaded | {name}}
        return sorted((loaded | {links[link] for link in alive(links)}) - {name})

    def join(self, link: Link, rank: int, describe: Callable[[LoRARuns | None], Joined]) -> None:
        """Puts a link in the place of the one that its adapter had, and starts joining."""
        assert link.request.adapter is not None
        adapter = link.request.adapter
        self._close(adapter.name)
        self._links[adapter.name] = link

        def described() -> Joined:
            link.refusal = self._refusal(adapter)
            return describe(self.runs(link.refusal))

        link.join(rank, described)

    def runs(self, refusal: Failure | None = None) -> LoRARuns | None:
        """How this worker runs LoRA, and why it cannot serve a trainer's adapter, if it cannot. On a link's thread."""
        store = self._store
        if store is None:
            return None
        return LoRARuns(store.max_loras, store.max_lora_rank, dtype_name(store.lora_dtype), self._base.id, refusal)

    def _refusal(self, adapter: Adapter) -> Failure | None:
        try:
            if self._store is None:
                raise RolloutError("this server runs without LoRA; start it with --enable-lora")
            if self._replicated:
                raise RolloutError(
                    "this server runs data-parallel replicas, which would not change to a version together; start a "
                    "server for each of them and list their URLs, or set merge_and_sync=True"
                )
            self._store.check(adapter.name, adapter.config, adapter.shapes)
        except Exception as error:  # whatever vLLM's code raises; told to the trainer
            return Failure.of(error)
        return None

    def call(self, call: AdapterCall) -> None:
        """Does what the trainer asks, in the background; it is told in a receipt.

        Raises:
            RolloutError: no trainer of this adapter has joined, or another one than asks.
            ConfigError: no such action.
        """
        link = self._links.get(call.adapter)
        if link is not None and link.request.client != call.client:
            if call.action != LEAVE:
                raise RolloutError(f"adapter {call.adapter!r} is kept fresh by another trainer by now")
            logger.info("a trainer of adapter %r left late; another one has come since", call.adapter)
        elif call.action == LEAVE:
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

    def _keep(self, link: Link, path: AdapterPath, stage: Stage) -> str:
        require_awake(WEIGHTS)
        adapter = link.request.adapter
        assert adapter is not None
        assert self._store is not None, "or the link had been refused"
        if missing := stage.missing():
            raise WeightMismatchError(
                f"{len(missing)} tensors of adapter {adapter.name!r} that its trainer announced when it joined did not "
                f"come: {first_few(missing)}"
            )
        self._store.put(adapter.name, path, adapter.config, stage.tensors, wanted=lambda: not link.closed)
        return self._base.id

    def _compare(self, link: Link, call: AdapterCall) -> None:
        differing, failure, base_id = list[str](), None, ""
        try:
            differing, base_id = self._base.differing(call.base)
        except Exception as error:  # whatever reading the checkpoint raises; told to the trainer
            logger.warning("cannot tell whether the base is that of adapter %r: %s", call.adapter, error)
            failure = Failure.of(error)
        link.post(f"compared-{call.number}", Compared(differing, failure, base_id, self._others(call.adapter)))

    def close(self) -> None:
        """Ends all links; what they sent and is loaded stays served."""
        for name in list(self._links):
            self._close(name)

    def _close(self, name: str) -> None:
        link = self._links.pop(name, None)
        if link is None:
            return
        link.close()
        if self._store is not None:
            self._store.discard(name)  # what came and nobody loaded
