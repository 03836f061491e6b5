"""One rank of a sharded trainer: trains a policy, without and with LoRA, pushes it, and writes what should be served.

Rank 0 leaves in $FOLDER, for each case, the server's answers after the push and the policy as a checkpoint, taken by
the framework's own means and merged by PEFT in a plain module.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist

from tests import peft_cases
from tests.distributed.sources_sharding import shard
from tests.tiny_models import VOCAB, build
from tests.vllm.engines import server_answers
from twinkle_callbacks import WeightSynchronizer

CASES: dict[str, Callable[[], Any]] = {
    "full": lambda: build("qwen3", seed=1),
    "lora": lambda: peft_cases.wrap(build("qwen3", seed=1), peft.LoraConfig(**peft_cases.LORA)),
}


def run(case: str, kind: str, url: str, folder: Path) -> None:
    torch.manual_seed(0)
    plain = CASES[case]()
    torch.manual_seed(0)
    trained = shard(kind, CASES[case]().train())
    tokens = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    with WeightSynchronizer(trained.model, rollouts=url, timeout_s=60) as sync:
        for version in (1, 2):
            trained.step(tokens)
            sync.push(version=version)
    full = trained.full()
    if dist.get_rank() == 0:
        (folder / "answers.json").write_text(json.dumps(server_answers(url)))
        plain.load_state_dict(full)
        (plain.merge_and_unload(safe_merge=True) if case == "lora" else plain).save_pretrained(folder)


def main() -> None:
    warnings.simplefilter("ignore")  # those of the frameworks
    dist.init_process_group("gloo")
    for case in CASES:
        folder = Path(os.environ["FOLDER"]) / case
        folder.mkdir(exist_ok=True)
        run(case, os.environ["KIND"], os.environ["URL"], folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
