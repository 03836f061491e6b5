"""One rank of a shm group whose `VICTIM_RANK` is killed in the middle of the second stream; the other outlives it.

The buckets are in the folder `BUCKETS` instead of `/dev/shm`, so that others' are not mistaken for them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.distributed.engine_contract import MIB, Rank, outcome_of, receive, send
from tests.unit.engine_streams import picture
from twinkle_callbacks import errors
from twinkle_callbacks.engines import shm

shm.FOLDER = Path(os.environ["BUCKETS"])


def main() -> None:
    rank = Rank()
    engine = rank.join(2, bucket_size=MIB)
    stream = rank.stream([MIB] * 6)

    def dies(name: str) -> None:
        if name == stream[3][0] and rank.rank == int(os.environ["VICTIM_RANK"]):
            os.kill(os.getpid(), signal.SIGKILL)

    def dying() -> Iterator[tuple[str, torch.Tensor]]:
        for item in stream:
            dies(item[0])
            yield item

    if rank.is_master:
        send(engine, stream)
        lost = outcome_of(lambda: send(engine, dying()))
    else:
        assert picture(receive(engine)) == picture(stream)
        lost = outcome_of(lambda: receive(engine, use=dies))
    assert isinstance(lost.error, errors.EngineError), lost
    rank.clean_up()
    print(f"survived with {list(shm.FOLDER.iterdir())}")


if __name__ == "__main__":
    main()
