"""What goes wrong on one trainer rank is an error on all of them, with its cause, and nobody hangs."""

from __future__ import annotations

import pytest

from tests.distributed import synchronizer_ranks
from tests.distributed.launch import run_ranks

SCENARIOS = (
    synchronizer_ranks.part_that_a_rank_cannot_read_fails_on_all_with_its_cause,
    synchronizer_ranks.change_that_one_rank_sees_is_told_on_all_before_anything_is_sent,
    synchronizer_ranks.ranks_that_would_stream_other_tensors_are_refused,
    synchronizer_ranks.engine_fails_before_it_draws_anything,
    synchronizer_ranks.unexpected_error_in_the_handshake_is_skipped_on_all_ranks_or_none,
    synchronizer_ranks.engine_in_the_process_of_another_rank_is_refused,
    synchronizer_ranks.report_is_the_same_on_every_rank,
)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_ranks_agree(scenario: str) -> None:
    env = {"SCENARIO": scenario, "TWINKLE_TOKEN": "a token of the rank tests"}
    run_ranks(synchronizer_ranks.__name__, 2, timeout_s=60, env=env)
