"""One worker's end of one synchronizer: the engine, and the thread on which it receives while generation goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from twinkle_callbacks import auth
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.engines import get_engine
from twinkle_callbacks.engines.base import CheckpointEngine
from twinkle_callbacks.errors import EngineError, RolloutError, from_wire
from twinkle_callbacks.worker.messages import Joined, JoinRequest, Staged
from twinkle_callbacks.worker.stage import Stage

logger = logging.getLogger("vllm.twinkle_callbacks")
T = TypeVar("T")

PROBE_S = 2.0


class Link:
    """Joins the trainer's group in the background and receives from it. vLLM's main thread calls all methods.

    Args:
        request: the trainer's invitation, checked.
        token: the server's token.

    Attributes:
        request: as given.
        refusal: why nothing is received, as the trainer was told when it joined; None where all is well.
        closed: whether the worker has ended it.

    Raises:
        ConfigError, MissingExtraError: there is no such engine here, or its settings are wrong.
    """

    def __init__(self, request: JoinRequest, token: str) -> None:
        self.request = request
        self.refusal: Failure | None = None
        self.closed = False
        self._engine: CheckpointEngine = get_engine(request.engine)(
            bucket_size=request.bucket_size,
            timeout=request.timeout_s,
            token=auth.key_of(token, request.tenant),
            verify=False,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="twinkle-worker")
        self._joining: Future[None] | None = None

    def join(self, rank: int, describe: Callable[[], Joined]) -> None:
        """Starts joining as `rank`; `describe` runs on the link's thread."""
        self._joining = self._thread.submit(self._join, rank, describe)

    def _join(self, rank: int, describe: Callable[[], Joined]) -> None:
        try:
            self._engine.prepare()
            self._engine.init_process_group(rank, self.request.world_size, master_metadata=self.request.metadata)
            self._engine.post_receipt("joined", msgspec.msgpack.encode(describe()))
        except Exception:  # nobody waits for this thread, and the trainer only sees that this rank does not come
            logger.exception("could not join the trainer as rank %d", rank)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Runs a call on the link's thread, after those before it."""
        return self._thread.submit(call)

    def receive(self, push: int, keep: Callable[[Stage], str]) -> Future[Stage]:
        """Starts receiving one stream; what becomes of it is told in the receipt `staged-<push>`.

        Of an adapter, only what was announced is taken; the first tensor that was not ends the stream.

        Args:
            push: number of the push.
            keep: runs on the link's thread with the whole stage; returns the id of the base, and what it raises is told
                to the trainer.
        """
        adapter = self.request.adapter

        def receive() -> Stage:
            stage = Stage(verify=self.request.verify, announced=None if adapter is None else adapter.shapes)
            try:
                if self.refusal is not None:
                    raise from_wire(self.refusal.type, self.refusal.message, RolloutError)
                asyncio.run(_fill(stage, self._engine))
                digest = stage.verify(self._engine.sent_digests)
                base_id = keep(stage)
            except Exception as error:
                logger.error("push %d was not received, the old weights go on serving: %s", push, error)
                self.post(f"staged-{push}", Staged(failure=Failure.of(error)))
                raise
            self.post(f"staged-{push}", Staged(len(stage.tensors), digest, base_id=base_id, fits=stage.fits))
            return stage

        return self._thread.submit(receive)

    def post(self, topic: str, message: Any) -> None:
        """Leaves the trainer a receipt; a trainer that is gone is only logged."""
        try:
            self._engine.post_receipt(topic, msgspec.msgpack.encode(message))
        except EngineError as error:
            logger.warning("could not tell the trainer %s: %s", topic, error)

    def has_trainer(self) -> bool:
        """Asks whether the trainer at the other end is still there; may take long, see `alive`.

        Until the link has joined there is nobody to ask: it counts as alive, and joining ends by its own timeout.
        """
        joining = self._joining is not None and not self._joining.done()
        return joining or self._engine.is_master_there()

    def close(self) -> None:
        """Leaves the group, without waiting for what is under way."""
        self.closed = True
        self._engine.finalize()
        self._thread.shutdown(wait=False, cancel_futures=True)


def alive(links: Iterable[Link]) -> list[Link]:
    """Those of the links whose trainers are still there. Asks all of them side by side, for at most two seconds."""
    there: list[Link] = []

    def probe(link: Link) -> None:
        if link.has_trainer():
            there.append(link)

    probers = [threading.Thread(target=probe, args=(link,), name="twinkle-probe", daemon=True) for link in links]
    until = time.monotonic() + PROBE_S
    for prober in probers:
        prober.start()
    for prober in probers:
        prober.join(max(0.0, until - time.monotonic()))
    return list(there)


async def _fill(stage: Stage, engine: CheckpointEngine) -> None:
    async for name, tensor in engine.receive_weights():
        stage.add(name, tensor, stays=engine.stays(tensor))
