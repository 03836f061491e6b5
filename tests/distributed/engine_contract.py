"""The harness of the engines' contract: three real processes that run scenarios one after another.

A scenario is a function that every process calls with its `Rank`; what an engine must do is asserted inside. A scenario
that fails leaves the others to run. The scenarios are in `engine_transfers.py`, `engine_failures.py`,
`engine_handshake.py` and `engine_reuse.py`, whose `__main__` is one process; `test_engine_contract.py` starts them.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch.distributed import TCPStore

from tests.unit.engine_streams import lay_out, random_tensor
from twinkle_callbacks.engines import CheckpointEngine, get_engine

WORLD_SIZE = 3
HEARING_S = 25.0
SCENARIO_LIMIT_S = 60.0
TOKEN = "a token of the contract tests"
KIB, MIB = 1 << 10, 1 << 20
NamedTensors = list[tuple[str, torch.Tensor]]


class EngineCase(NamedTuple):
    """An engine under contract. `env` is set in each process, with `{rank}` replaced."""

    name: str
    device: str = "cpu"
    env: Mapping[str, str] = {}
    marks: tuple[Any, ...] = ()


class Rank:
    """This process: which one it is, and how it meets the others, beside the engine."""

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        os.environ.update({key: text.format(rank=self.rank) for key, text in json.loads(os.environ["CASE"]).items()})
        self.case = EngineCase(os.environ["ENGINE"], os.environ["DEVICE"])
        torch.zeros(1, device=self.case.device)  # a GPU takes seconds to set up, which no deadline should count
        self.is_master = self.rank == 0
        self.is_victim = "VICTIM" in os.environ
        self.scenario = os.environ.get("VICTIM", "")
        self._engines: list[CheckpointEngine] = []
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.is_master and not self.is_victim
        patience = timedelta(seconds=SCENARIO_LIMIT_S)
        self._store = TCPStore(address, port, None, serves, patience, wait_for_workers=False)

    def engine(self, bucket_size: int = 64 * KIB, timeout: float = 20.0, **options: Any) -> CheckpointEngine:
        """A new engine, finalized after the scenario; it is the master's on rank 0."""
        engine = get_engine(self.case.name)(bucket_size, timeout, **{"token": TOKEN, **options})
        engine.is_master = self.is_master
        self._engines.append(engine)
        return engine

    def join(
        self,
        world_size: int = WORLD_SIZE,
        *,
        engine: CheckpointEngine | None = None,
        rank: int | None = None,
        group: str = "group",
        **options: Any,
    ) -> CheckpointEngine:
        """Takes part in the group of this name, with a new engine if none is given."""
        engine = engine or self.engine(**options)
        metadata = engine.prepare()
        if engine.is_master:
            self.tell(f"{group}/metadata", metadata)
        else:
            metadata = self.hear(f"{group}/metadata")
        engine.init_process_group(self.rank if rank is None else rank, world_size, master_metadata=metadata)
        return engine

    def tell(self, key: str, value: Any = None) -> None:
        self._store.set(f"{self.scenario}/{key}", json.dumps(value))

    def hear(self, key: str, patience_s: float = HEARING_S) -> Any:
        """What another process told under this key; waits for it."""
        self._store.wait([f"{self.scenario}/{key}"], timedelta(seconds=patience_s))
        return json.loads(self._store.get(f"{self.scenario}/{key}"))

    def meet(self, label: str, patience_s: float = HEARING_S) -> None:
        """Waits until all processes are here."""
        self.tell(f"{label}/{self.rank}")
        for other in range(WORLD_SIZE):
            self.hear(f"{label}/{other}", patience_s)

    def run_victim(self) -> int:
        """Runs this scenario in a process of its own, as this rank, and returns its exit status."""
        environment = {**os.environ, "VICTIM": self.scenario}
        return subprocess.run([sys.executable, *sys.argv], env=environment, timeout=SCENARIO_LIMIT_S).returncode

    def stream(self, sizes: Iterable[int], seed: int = 0) -> NamedTensors:
        """Float tensors of these sizes in bytes, the same in every process."""
        return [
            (f"layers.{i}.weight", self.tensor(torch.float32, (size // 4,), 1000 * seed + i))
            for i, size in enumerate(sizes)
        ]

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], seed: int, layout: str = "plain") -> torch.Tensor:
        return lay_out(random_tensor(dtype, shape, seed).to(self.case.device), layout)

    def clean_up(self) -> None:
        for engine in self._engines:
            engine.finalize()
        self._engines.clear()


Scenario = Callable[[Rank], None]


class Scenarios(dict[str, Scenario]):
    """The scenarios of one file, by name; a decorator that adds one."""

    def __call__(self, scenario: Scenario) -> Scenario:
        self[scenario.__name__] = scenario
        return scenario

    def run(self) -> None:
        """What a process does: the scenarios that the environment names."""
        rank = Rank()
        if rank.is_victim:
            self[rank.scenario](rank)
            return
        for name in os.environ["SCENARIOS"].split(","):
            rank.scenario = name
            print(f"\nscenario {name} begins", flush=True)
            rank.meet("begin", 2 * SCENARIO_LIMIT_S)  # others may use up their limit first
            faulthandler.dump_traceback_later(SCENARIO_LIMIT_S, exit=True)
            began, outcome = time.monotonic(), "passed"
            try:
                self[name](rank)
            except BaseException:  # reported as the scenario's outcome
                traceback.print_exc(file=sys.stdout)
                outcome = "failed"
            rank.clean_up()
            print(f"scenario {name} {outcome} in {time.monotonic() - began:.1f} s", flush=True)
            faulthandler.cancel_dump_traceback_later()
        rank.tell(f"end/{rank.rank}")
        if rank.is_master:  # the store lives here, so this process ends last
            rank.meet("end", SCENARIO_LIMIT_S)


class Outcome(NamedTuple):
    """What a call did, and how long it took."""

    value: Any
    error: BaseException | None
    seconds: float


def outcome_of(call: Callable[[], Any]) -> Outcome:
    began = time.monotonic()
    try:
        return Outcome(call(), None, time.monotonic() - began)
    except Exception as error:  # handed to the caller
        return Outcome(None, error, time.monotonic() - began)


def send(engine: CheckpointEngine, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    asyncio.run(engine.send_weights(weights))


def receive(engine: CheckpointEngine, use: Callable[[str], None] = lambda name: None) -> NamedTensors:
    """A whole stream, copied after `use` has returned for each tensor."""

    async def collect() -> NamedTensors:
        collected = []
        async for name, tensor in engine.receive_weights():
            use(name)
            collected.append((name, tensor.clone()))
        return collected

    return asyncio.run(collect())


def pause(seconds: float) -> None:
    """A process that is busy for a while."""
    threading.Event().wait(seconds)


async def longest_gap_while(call: Awaitable[Any]) -> float:
    """Seconds for which the event loop stood still at most while this ran."""
    task, longest, before = asyncio.ensure_future(call), 0.0, time.monotonic()
    while not task.done():
        await asyncio.sleep(0.01)
        now = time.monotonic()
        longest, before = max(longest, now - before), now
    await task
    return longest


def expect(outcome: Outcome, kind: type[BaseException] | tuple[type[BaseException], ...], *texts: str) -> None:
    """Asserts that a call raised this, with these texts in its message."""
    assert isinstance(outcome.error, kind), f"expected {kind}, got {outcome!r}"
    for text in texts:
        assert text in str(outcome.error), f"{text!r} is not in {outcome.error!r}"
