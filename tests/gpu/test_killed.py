"""An engine that is killed, at any moment, is a clear error in time for its trainer, which goes on with the next."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.served import ENGINES, SEED, TIMEOUT_S, Served, make_policy, serve, synchronizer
from tests.vllm.engines import Answers, answers, assert_same, release
from twinkle_callbacks.errors import TwinkleError
from twinkle_callbacks.rollouts import LocalRollout
from twinkle_callbacks.worker.messages import RECEIVE

MOMENTS = ["before a push", "while it receives", "inside the commit"]
LATE_S = 10.0  # how much later than its deadline an error may come


class DyingRollout(LocalRollout):
    """An engine whose process is killed at a certain moment."""

    def __init__(self, served: Served, moment: str) -> None:
        super().__init__(served.llm)
        self._pid, self._moment = served.pid, moment
        self.may_die = False

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def start(self) -> None:
        if self.may_die and self._moment == "before a push":
            self.kill()
        super().start()

    def update(self, info: dict[str, Any]) -> None:
        super().update(info)
        if self.may_die and self._moment == "while it receives" and info["action"] == RECEIVE:
            self.kill()

    def finish(self) -> None:
        if self.may_die and self._moment == "inside the commit":
            os.kill(self._pid, signal.SIGSTOP)
            threading.Timer(1.0, self.kill).start()
        super().finish()


@pytest.fixture
def no_engine_outlives_its_test() -> Iterator[None]:
    yield
    release()


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_engine_outlives_its_test")
@pytest.mark.parametrize("engine", ENGINES)
def test_trainer_outlives_engines_that_are_killed(engine: str, served_dir: Path) -> None:
    policy = make_policy(SEED)
    expected: Answers = []
    for moment in [*MOMENTS, "never"]:
        served = serve(served_dir, synced=True)
        before = answers(served.llm)
        rollout = DyingRollout(served, moment)
        sync = synchronizer(policy, rollout, engine)
        sync.open()
        expected = expected or answers(served.llm)
        assert [tokens for tokens, _ in before] != [tokens for tokens, _ in expected]
        assert_same(answers(served.llm), expected)
        if moment != "never":
            rollout.may_die = True
            failed, seconds = outcome_of(lambda: sync.push(version=1))  # noqa: B023  # is called here
            assert isinstance(failed, TwinkleError), (moment, failed)
            assert "local" in str(failed), moment
            assert seconds < TIMEOUT_S + LATE_S, moment
        failed, seconds = outcome_of(sync.close)
        assert failed is None, moment
        assert seconds < TIMEOUT_S + LATE_S, moment
        torch.cuda.synchronize()
        assert all(bool(parameter.isfinite().all()) for parameter in policy.parameters())
        release()


def outcome_of(call: Callable[[], Any]) -> tuple[BaseException | None, float]:
    """What a call raised, and how long it took."""
    began = time.monotonic()
    try:
        call()
    except Exception as error:  # handed to the caller
        return error, time.monotonic() - began
    return None, time.monotonic() - began
