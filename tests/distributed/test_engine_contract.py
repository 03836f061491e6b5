"""Every engine keeps one contract, shown by real processes: whole streams, honest failures, no strangers, no leaks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.distributed import engine_failures, engine_handshake, engine_reuse, engine_transfers
from tests.distributed.engine_contract import TOKEN, WORLD_SIZE, EngineCase
from tests.distributed.launch import run_ranks

# One line makes an engine a party to the contract.
ENGINES = [
    EngineCase("gloo"),
    EngineCase("shm"),
]
FILES = [engine_transfers, engine_failures, engine_handshake, engine_reuse]
LIMIT_S = 240.0

Logs = list[str]


@pytest.fixture(scope="module")
def logs_of(request: pytest.FixtureRequest) -> Callable[[EngineCase, ModuleType], Logs]:
    """Runs all the scenarios of a file that this session selected, at the first of them; returns each process's log."""
    finished: dict[tuple[str, str], Logs] = {}

    def logs(case: EngineCase, file: ModuleType) -> Logs:
        key = case.name, file.__name__
        if key not in finished:
            finished[key] = run(case, file, selected(request.session.items, case, file))
        return finished[key]

    return logs


def run(case: EngineCase, file: ModuleType, scenarios: list[str]) -> Logs:
    env = {"ENGINE": case.name, "DEVICE": case.device, "CASE": json.dumps(dict(case.env)), "TWINKLE_TOKEN": TOKEN}
    try:
        return run_ranks(file.__name__, WORLD_SIZE, LIMIT_S, {**env, "SCENARIOS": ",".join(scenarios)})
    except AssertionError as crash:  # the scenarios before the one that hung or crashed have their outcomes
        return re.split("^===== rank .* =====$", str(crash), flags=re.MULTILINE)[1:]


def selected(items: list[pytest.Item], case: EngineCase, file: ModuleType) -> list[str]:
    chosen = [item.callspec.params for item in items if getattr(item, "originalname", "") == CONTRACT]
    return [one["scenario"] for one in chosen if (one["case"], one["file"]) == (case, file)]


@pytest.mark.parametrize(
    ("file", "scenario"),
    [pytest.param(file, name, id=name) for file in FILES for name in file.scenario],
)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=case.marks) for case in ENGINES])
def test_contract(
    case: EngineCase, file: ModuleType, scenario: str, logs_of: Callable[[EngineCase, ModuleType], Logs]
) -> None:
    texts = [text_of(scenario, log) for log in logs_of(case, file)]
    if not all(re.search(f"^scenario {scenario} passed", text, re.MULTILINE) for text in texts):
        shown = "\n".join(f"===== rank {rank} =====\n{text}" for rank, text in enumerate(texts))
        pytest.fail(f"engine {case.name}: {scenario}\n{shown}", pytrace=False)


CONTRACT = test_contract.__name__


def text_of(scenario: str, log: str) -> str:
    """What a process wrote during one scenario."""
    _, _, text = log.partition(f"scenario {scenario} begins\n")
    return text.partition(" begins\n")[0]
