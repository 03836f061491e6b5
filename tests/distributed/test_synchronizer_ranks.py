"""What goes wrong on one trainer rank is an error on all of them, with its cause, and nobody hangs."""

from __future__ import annotations

import pytest

from tests.distributed import synchronizer_ranks
from tests.distributed.launch import run_ranks

SCENARIOS = (
    synchronizer_ranks.source_fails_on_one_rank,
    synchronizer_ranks.engine_fails_before_it_draws_anything,
    synchronizer_ranks.unexpected_error_in_the_handshake_is_skipped_on_all_ranks_or_none,
    synchronizer_ranks.engine_in_the_process_of_another_rank_is_refused,
    synchronizer_ranks.report_is_the_same_on_every_rank,
    synchronizer_ranks.rank_that_leaves_a_gather_ends_with_its_cause_and_the_others_fail_soon,
)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_ranks_agree(scenario: str) -> None:
    env = {"SCENARIO": scenario, "TWINKLE_TOKEN": "a token of the rank tests"}
    run_ranks(synchronizer_ranks.__name__, 2, timeout_s=60, env=env)
