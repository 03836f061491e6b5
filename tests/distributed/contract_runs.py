"""Runs the scenarios of the engines' contract for tests: at the first of a file, all of its that were selected."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest

from tests.distributed import engine_failures, engine_handshake, engine_reuse, engine_transfers
from tests.distributed.engine_contract import TOKEN, WORLD_SIZE, EngineCase
from tests.distributed.launch import run_ranks

FILES = [engine_transfers, engine_failures, engine_handshake, engine_reuse]
SCENARIOS = [pytest.param(file, name, id=name) for file in FILES for name in file.scenario]
LIMIT_S = 240.0
LAST_CHARACTERS = 4000
GIVING_BACK = {"MALLOC_TRIM_THRESHOLD_": "131072"}
"""Lets glibc give back what is freed: else each thread's arena keeps up to 64 MiB, which would pass for a leak."""

Logs = list[str]


def engine_params(cases: Iterable[EngineCase]) -> list[Any]:
    """The cases as pytest's parameters."""
    return [pytest.param(case, id=case.name, marks=case.marks) for case in cases]


class ContractRuns:
    """What the processes of each engine and file wrote.

    Args:
        items: the tests of this session, of which those with the parameters `case`, `file` and `scenario` count.
    """

    def __init__(self, items: list[pytest.Item]) -> None:
        calls = [item.callspec.params for item in items if hasattr(item, "callspec")]
        self._selected = [call for call in calls if {"case", "file", "scenario"} <= call.keys()]
        self._finished: dict[tuple[str, str], Logs] = {}

    def check(self, case: EngineCase, file: ModuleType, scenario: str) -> None:
        """Fails the test with every process's log of this scenario unless all passed it."""
        texts = [_text_of(scenario, log) for log in self._logs(case, file)]
        if not all(re.search(f"^scenario {scenario} passed", text, re.MULTILINE) for text in texts):
            shown = "\n".join(f"===== rank {rank} =====\n{text}" for rank, text in enumerate(texts))
            pytest.fail(f"engine {case.name}: {scenario}\n{shown}", pytrace=False)

    def _logs(self, case: EngineCase, file: ModuleType) -> Logs:
        key = case.name, file.__name__
        if key not in self._finished:
            chosen = [call for call in self._selected if (call["case"], call["file"]) == (case, file)]
            self._finished[key] = run(case, file, [call["scenario"] for call in chosen])
        return self._finished[key]


def run(case: EngineCase, file: ModuleType, scenarios: list[str]) -> Logs:
    """What each process wrote."""
    env = {"ENGINE": case.name, "DEVICE": case.device, "CASE": json.dumps(dict(case.env)), "TWINKLE_TOKEN": TOKEN}
    env |= {"SCENARIOS": ",".join(scenarios), **GIVING_BACK}
    try:
        return run_ranks(file.__name__, WORLD_SIZE, LIMIT_S, env)
    except AssertionError as crash:  # the scenarios before the one that hung or crashed have their outcomes
        return re.split("^===== rank .* =====$", str(crash), flags=re.MULTILINE)[1:]


def _text_of(scenario: str, log: str) -> str:
    """What a process wrote during one scenario; of one that did not come to it, the end of all that it wrote."""
    _, begun, text = log.partition(f"scenario {scenario} begins\n")
    return text.partition(" begins\n")[0] if begun else f"did not begin; wrote before:\n{log[-LAST_CHARACTERS:]}"
