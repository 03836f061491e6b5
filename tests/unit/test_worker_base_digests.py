"""What a worker says of its base: of the one that it names by its id, whatever is committed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from twinkle_callbacks.buckets.digest import digests_of
from twinkle_callbacks.errors import RolloutError
from twinkle_callbacks.worker.base_digests import BaseDigests

ONES = {"a": torch.ones(2), "b": torch.ones(3)}
OTHERS = {"a": torch.ones(2), "b": torch.zeros(3)}


class Base(BaseDigests):
    """One whose checkpoint is `ONES`; a commit comes while it is read, if it shall."""

    commits_when_read = False

    def __init__(self) -> None:
        super().__init__(None, torch.nn.Module())  # type: ignore[arg-type]

    def _file_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ONES.items()
        if self.commits_when_read:
            self.begin_commit()
            self.committed(digests_of(OTHERS.items()))


def test_the_checkpoint_counts_until_a_commit() -> None:
    base = Base()
    first = base.id
    assert base.differing(digests_of(ONES.items())) == ([], first)
    assert base.differing(digests_of(OTHERS.items())) == (["b"], first)
    base.begin_commit()
    base.committed(digests_of(OTHERS.items()))
    assert base.differing(digests_of(OTHERS.items())) == ([], base.id)
    assert base.id != first


def test_a_worker_that_starts_again_has_another_base() -> None:
    assert Base().id != Base().id


def test_a_base_that_is_replaced_while_it_is_compared_cannot_be_told() -> None:
    base = Base()
    base.commits_when_read = True
    with pytest.raises(RolloutError, match="replaced while it was compared"):
        base.differing(digests_of(ONES.items()))


def test_a_commit_that_broke_off_leaves_no_base() -> None:
    base = Base()
    base.begin_commit()
    with pytest.raises(RolloutError, match="broke off"):
        base.differing(digests_of(ONES.items()))
