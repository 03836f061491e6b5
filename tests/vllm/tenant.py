"""One of several trainers, each a process of its own, that keep adapters fresh on one server: pushes $SYNCS versions.

Version n is the adapter of seed 1000 * RANK + n. Leaves the versions of its reports in $FOLDER, by its rank, and what
it was answered after each push.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from tests.vllm.adapters import PROMPTS, adapted, train
from tests.vllm.engines import server_answers
from twinkle_callbacks import WeightSynchronizer


def name_of(rank: int) -> str:
    return f"tenant{rank}"


def seed_of(rank: int, version: int) -> int:
    return 1000 * rank + version


def main() -> None:
    warnings.simplefilter("ignore")  # those of the frameworks
    rank, syncs, url = int(os.environ["RANK"]), int(os.environ["SYNCS"]), os.environ["URL"]
    policy = adapted()
    train(policy, seed_of(rank, 0))
    with WeightSynchronizer(
        policy, rollouts=url, merge_and_sync=False, adapter_name=name_of(rank), bucket_size_mb=8, timeout_s=60
    ) as sync:
        assert sync.report is not None
        versions, answered = [sync.report.version], [server_answers(url, PROMPTS, name_of(rank))]
        for version in range(1, syncs + 1):
            train(policy, seed_of(rank, version))
            versions.append(sync.push(version=version).replicas[0].version)
            answered.append(server_answers(url, PROMPTS, name_of(rank)))
    (Path(os.environ["FOLDER"]) / f"{rank}.json").write_text(json.dumps([versions, answered]))


if __name__ == "__main__":
    main()
