"""The engines of a GPU keep the contract of all engines, shown by three real processes on one GPU."""

from __future__ import annotations

from types import ModuleType

import pytest

from benchmarks.gpu_nccl import HOST_ENV
from tests.distributed.contract_runs import SCENARIOS, ContractRuns, engine_params
from tests.distributed.engine_contract import EngineCase

ENGINES = [
    EngineCase("nccl", "cuda", HOST_ENV),
    EngineCase("ipc", "cuda"),
]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> ContractRuns:
    return ContractRuns(request.session.items)


@pytest.mark.parametrize(("file", "scenario"), SCENARIOS)
@pytest.mark.parametrize("case", engine_params(ENGINES))
def test_contract(case: EngineCase, file: ModuleType, scenario: str, runs: ContractRuns) -> None:
    runs.check(case, file, scenario)
