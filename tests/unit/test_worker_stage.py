"""What a stage takes: anything, or only what was announced."""

from __future__ import annotations

import pytest
import torch

from twinkle_callbacks.errors import WeightMismatchError
from twinkle_callbacks.worker.stage import Stage


def test_what_was_announced_is_taken_once_and_the_rest_is_missing() -> None:
    stage = Stage(verify=True, announced={"a": (2, 3), "b": (1,)})
    stage.add("a", torch.zeros(2, 3))
    assert stage.missing() == ["b"]
    with pytest.raises(WeightMismatchError, match="a was sent twice"):
        stage.add("a", torch.zeros(2, 3))
    assert list(stage.tensors) == ["a"]


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("a", (3, 2), r"a \[3, 2\] was sent, but its trainer announced the adapter with the shape \[2, 3\]"),
        ("c", (2, 3), r"c \[2, 3\] was sent, but its trainer announced the adapter without it"),
    ],
)
def test_what_was_not_announced_is_refused_before_it_is_kept(name: str, shape: tuple[int, ...], says: str) -> None:
    stage = Stage(verify=False, announced={"a": (2, 3)})
    with pytest.raises(WeightMismatchError, match=says):
        stage.add(name, torch.zeros(shape))
    assert stage.tensors == {}


def test_whole_weights_are_taken_as_they_come() -> None:
    stage = Stage(verify=False)
    stage.add("a", torch.zeros(2, 3))
    assert stage.missing() == []
