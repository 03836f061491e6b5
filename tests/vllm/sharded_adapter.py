"""One rank of a sharded trainer that pushes its adapter alone to $URL, two versions of it.

Rank 0 leaves in $FOLDER the adapter's files, taken by the framework's own means.
"""

from __future__ import annotations

import gc
import os
import warnings

import torch
import torch.distributed as dist

from tests.distributed.sources_sharding import shard
from tests.tiny_models import VOCAB
from tests.vllm.adapters import adapted
from twinkle_callbacks import WeightSynchronizer


def push() -> None:
    torch.manual_seed(0)
    plain = adapted()
    torch.manual_seed(0)
    trained = shard(os.environ["KIND"], adapted().train())
    tokens = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    settings = {"rollouts": os.environ["URL"], "merge_and_sync": False, "adapter_name": "sharded", "timeout_s": 60}
    with WeightSynchronizer(trained.model, **settings) as sync:  # type: ignore[arg-type]
        for version in (1, 2):
            trained.step(tokens)
            sync.push(version=version)
    full = trained.full()
    if dist.get_rank() == 0:
        plain.load_state_dict({name: full[name] for name in plain.state_dict()})
        plain.save_pretrained(os.environ["FOLDER"])


def main() -> None:
    warnings.simplefilter("ignore")  # those of the frameworks
    dist.init_process_group("gloo")
    push()
    gc.collect()  # a DDP that outlives its group may hang, see sharded_trainer.py
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
