"""Every engine keeps one contract, shown by real processes: whole streams, honest failures, no strangers, no leaks."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.distributed.contract_runs import SCENARIOS, ContractRuns, engine_params
from tests.distributed.engine_contract import EngineCase

# One line makes an engine a party to the contract. Those that need a GPU are in tests/gpu.
ENGINES = [
    EngineCase("gloo"),
    EngineCase("shm"),
]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> ContractRuns:
    return ContractRuns(request.session.items)


@pytest.mark.parametrize(("file", "scenario"), SCENARIOS)
@pytest.mark.parametrize("case", engine_params(ENGINES))
def test_contract(case: EngineCase, file: ModuleType, scenario: str, runs: ContractRuns) -> None:
    runs.check(case, file, scenario)
