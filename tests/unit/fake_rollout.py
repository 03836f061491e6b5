"""A rollout without vLLM: real engines and real messages, and a dict of tensors where the model would be.

Stands at the seam `Rollout`, in place of `HTTPRollout` and `LocalRollout`, which tests/vllm runs for real.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import torch

from twinkle_callbacks import auth
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.engines import get_engine
from twinkle_callbacks.engines.base import CheckpointEngine
from twinkle_callbacks.rollouts import Rollout
from twinkle_callbacks.worker.messages import (
    ABORT,
    CHECK,
    LEAVE,
    AdapterCall,
    Checked,
    Committed,
    Joined,
    JoinRequest,
    Staged,
)
from twinkle_callbacks.worker.stage import Stage

RUNS = Joined("model", "Fake", 4, 1, 8, "float32", None, None, False, "0")


class FakeRollout(Rollout):
    """Serves `weights`. `fail` maps a method's name, or `staged` and `committed`, to the error that it meets once."""

    def __init__(self, name: str = "fake", workers: int = 1, runs: Joined = RUNS) -> None:
        self.name, self.host = name, "127.0.0.1"
        self.calls: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.paused = self.in_update = False
        self.intact = True
        self._runs, self._workers, self._version = runs, workers, "default"
        self._engines: list[CheckpointEngine] = []
        self._staged: list[Future[Stage]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._push = 0

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fail:
            raise self.fail.pop(call)

    def world_size(self) -> int:
        self._enter("world_size")
        return self._workers

    def models(self) -> list[str]:
        return ["model"]

    def join(self, request: dict[str, Any]) -> None:
        self._enter("join")
        self.end()
        invited = JoinRequest.opened(request, auth.load_token())
        self._pool = ThreadPoolExecutor(self._workers)
        for worker in range(self._workers):
            engine = get_engine(invited.engine)(
                bucket_size=invited.bucket_size, timeout=invited.timeout_s, verify=False
            )
            self._engines.append(engine)
            self._pool.submit(self._join, engine, invited, invited.rank_offset + worker)

    def _join(self, engine: CheckpointEngine, invited: JoinRequest, rank: int) -> None:
        engine.prepare()
        engine.init_process_group(rank, invited.world_size, master_metadata=invited.metadata)
        joined = msgspec.structs.replace(self._runs, in_update=self.in_update, intact=self.intact)
        engine.post_receipt("joined", msgspec.msgpack.encode(joined))

    def start(self) -> None:
        self._enter("start")
        assert not self.in_update
        self.in_update = True

    def update(self, info: dict[str, Any]) -> None:
        self._enter(f"update:{info['action']}")
        if info["action"] == CHECK:
            failure = self.fail.pop("checked", None)
            checked = Checked(None if failure is None else Failure.of(failure))
            for engine in self._engines:
                engine.post_receipt(f"checked-{self._push}", msgspec.msgpack.encode(checked))
            return
        self._staged = []
        if info["action"] != ABORT:
            self._push = info["push"]
            assert self._pool is not None
            self._staged = [self._pool.submit(self._receive, engine) for engine in self._engines]

    def _receive(self, engine: CheckpointEngine) -> Stage:
        stage, push = Stage(verify=True), self._push

        async def fill() -> None:
            async for name, tensor in engine.receive_weights():
                stage.add(name, tensor)

        try:
            asyncio.run(fill())
            if "staged" in self.fail:
                raise self.fail.pop("staged")
            receipt = Staged(len(stage.tensors), stage.verify(engine.sent_digests))
        except Exception as error:
            receipt = Staged(failure=Failure.of(error))
        engine.post_receipt(f"staged-{push}", msgspec.msgpack.encode(receipt))
        return stage

    def finish(self) -> None:
        self._enter("finish")
        self.in_update = False
        failure = self.fail.pop("committed", None)
        if isinstance(failure, SystemError):  # stands for an error in the middle of the commit
            self.intact = False
        for engine, staged in zip(self._engines, self._staged, strict=False):
            if failure is None:
                self.weights, self.intact = staged.result(10).tensors, True
            receipt = Committed(0.1, None if failure is None else Failure.of(failure), self.intact)
            engine.post_receipt(f"committed-{self._push}", msgspec.msgpack.encode(receipt))

    def pause(self, mode: str, *, clear_cache: bool) -> None:
        self.paused = True  # as vLLM does, which fails only after it has paused
        self._enter(f"pause:{mode}:{clear_cache}")

    def is_paused(self) -> bool:
        return self.paused

    def resume(self) -> None:
        self._enter("resume")
        self.paused = False

    def reset_cache(self) -> None:
        self._enter("reset_cache")

    def set_version(self, version: int) -> None:
        self._enter(f"set_version:{version}")
        self._version = str(version)

    def version(self) -> str:
        return self._version

    def close(self) -> None:
        self.calls.append("close")

    def call(self, call: dict[str, Any]) -> None:
        asked = AdapterCall.opened(call, auth.load_token())
        self._enter(asked.action)
        if asked.action == LEAVE:
            self.end()

    def load_adapter(self, name: str, path: str) -> None:
        raise NotImplementedError("adapters need vLLM: tests/vllm")

    def unload_adapter(self, name: str) -> None:
        raise NotImplementedError("adapters need vLLM: tests/vllm")

    def adapters(self) -> dict[str, str]:
        return {}

    def end(self) -> None:
        """Leaves the engine's group."""
        for engine in self._engines:
            engine.finalize()
        self._engines = []
        if self._pool is not None:
            self._pool.shutdown(wait=False)
