"""A policy that cannot be streamed, on one rank or on all: a clear error on all ranks before anything is sent."""

from __future__ import annotations

from tests.distributed import sources_bad_input
from tests.distributed.launch import run_ranks


def test_all_ranks_learn_why_before_anything_is_sent() -> None:
    env = {"TWINKLE_TOKEN": "a token of the rank tests"}
    wanted = [f"result {scenario.__name__} | ok" for scenario in sources_bad_input.SCENARIOS]
    for log in run_ranks(sources_bad_input.__name__, 2, 120, env):
        assert [line for line in log.splitlines() if line.startswith("result ")] == wanted
