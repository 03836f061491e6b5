"""An engine with two tensor-parallel workers that loads $FOLDER and, with $MODE=synced, gets the policy of seed 1.

Writes what it then answers to $OUTPUT.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.tiny_models import build
from tests.vllm.engines import answers, make_llm
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.errors import AuthenticationError, RolloutError, SyncError
from twinkle_callbacks.rollouts import LocalRollout


def main() -> None:
    mode, folder, output = os.environ["MODE"], Path(os.environ["FOLDER"]), Path(os.environ["OUTPUT"])
    llm = make_llm(folder, synced=mode == "synced", tensor_parallel_size=2)
    if mode == "synced":
        sync_through_errors(llm)
    output.write_text(json.dumps(answers(llm)))


def sync_through_errors(llm) -> None:  # type: ignore[no-untyped-def]
    """A body that is no message, a refused token, a push of the wrong model: none may shift the workers' replies."""
    policy = build("qwen3", seed=1)
    before = answers(llm)
    with pytest.raises(Exception, match="neither an invitation nor a call"):
        llm.init_weight_transfer_engine({"init_info": {"x": 1}})
    with pytest.raises((AuthenticationError, RolloutError), match="another token"):
        WeightSynchronizer(policy, rollouts=LocalRollout(llm), token="w" * 32, timeout_s=60).open()
    with pytest.raises(SyncError, match="unexpected"):
        WeightSynchronizer(torch.nn.Linear(2, 2), rollouts=LocalRollout(llm), timeout_s=60).open()
    assert answers(llm) == before
    with WeightSynchronizer(policy, rollouts=LocalRollout(llm), timeout_s=60) as sync:
        assert sync.push(version=3).version == 3
    assert llm.get_weight_version() == "3"


if __name__ == "__main__":
    main()
