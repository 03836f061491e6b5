"""A process that is killed leaves no shared memory behind, and neither does the one that outlives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.engine_contract import TOKEN
from tests.distributed.launch import run_ranks

RANKS = Path(__file__).with_name("shared_memory_ranks.py")


@pytest.mark.parametrize("victim", [0, 1], ids=["sender", "receiver"])
def test_nothing_is_left_in_shared_memory_after_a_kill(victim: int, tmp_path: Path) -> None:
    env = {"ENGINE": "shm", "DEVICE": "cpu", "CASE": "{}", "TWINKLE_TOKEN": TOKEN}
    with pytest.raises(AssertionError, match=f"rank {victim} failed with exit status -9") as died:
        run_ranks(RANKS, 2, 60.0, {**env, "BUCKETS": str(tmp_path), "VICTIM_RANK": str(victim)})
    assert "survived with []" in str(died.value)
    assert not list(tmp_path.iterdir())
