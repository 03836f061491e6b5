"""Every kind of sharding, with every kind of policy: what is streamed is what a single process would save, bit for bit.

Shards, `requires_grad`, optimizer state and the memory they are in stay as they were. One launch of real processes for
each kind; the cases are in `sources_cases.py`.
"""

from __future__ import annotations

import pytest

from tests.distributed import sources_cases
from tests.distributed.launch import run_ranks

TIMEOUT_S = 120.0


@pytest.mark.parametrize("kind", sources_cases.KINDS_OF_TWO)
def test_two_processes_stream_what_a_single_process_would_save(kind: str) -> None:
    assert_all_pass([kind], list(sources_cases.CASES), 2)


def test_other_settings_of_a_framework_change_nothing() -> None:
    assert_all_pass(sources_cases.OTHER_SETTINGS, sources_cases.FEW_CASES, 2)


def test_four_processes_stream_what_a_single_process_would_save() -> None:
    assert_all_pass(sources_cases.KINDS_OF_FOUR, sources_cases.FEW_CASES, 4)


def assert_all_pass(kinds: list[str], cases: list[str], world_size: int) -> None:
    env = {"KINDS": ",".join(kinds), "CASES": ",".join(cases)}
    logs = run_ranks(sources_cases.__name__, world_size, TIMEOUT_S, env)
    wanted = [
        f"result {kind} | {case} | ok" for kind in kinds for case in cases if (kind, case) not in sources_cases.UNFIT
    ]
    for log in logs:
        assert [line for line in log.splitlines() if line.startswith("result ")] == wanted
