"""What a stage takes: anything, or only what was announced; and its digests."""

from __future__ import annotations

import pytest
import torch

from twinkle_callbacks.buckets.digest import StreamDigest
from twinkle_callbacks.buckets.packing import as_bytes, memory
from twinkle_callbacks.errors import DigestMismatchError, WeightMismatchError
from twinkle_callbacks.worker.stage import DIGESTED_TOGETHER, Stage


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


def stage_of(tensors: dict[str, torch.Tensor], *, stays: bool = True) -> Stage:
    stage = Stage(verify=False)
    for name, tensor in tensors.items():
        stage.add(name, tensor, stays=stays)
    return stage


def test_a_stage_shows_the_very_tensors_that_the_trainer_showed() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2)}
    stage = stage_of(tensors)
    assert stage.shows(tensors)
    assert not stage.shows({"a": tensors["a"]})
    assert not stage.shows({"b": tensors["b"], "a": tensors["a"]})
    assert not stage.shows({"a": tensors["a"], "c": tensors["b"]})
    assert not stage.shows({"a": tensors["a"], "b": tensors["b"].view(2)})
    assert not Stage(verify=False).shows({})
    copied = stage_of(tensors, stays=False)
    assert not copied.shows(copied.tensors)


@pytest.mark.parametrize("count", [1, DIGESTED_TOGETHER - 1, DIGESTED_TOGETHER, 2 * DIGESTED_TOGETHER + 3])
def test_digests_are_of_all_tensors_in_their_order_whether_they_stay_or_are_copied(count: int) -> None:
    tensors = {f"t{i}": torch.full((3,), i) for i in range(count)}
    sent = StreamDigest()
    sent.add_tensors(tensors, [memory(as_bytes(tensor)) for tensor in tensors.values()])
    stage = Stage(verify=True)
    for i, (name, tensor) in enumerate(tensors.items()):
        stage.add(name, tensor, stays=i % 5 != 4)
    assert stage.verify(sent.pack()) == sent.hexdigest()

    stage = Stage(verify=True)
    for name, tensor in tensors.items():
        stage.add(name, tensor + (name == f"t{count - 1}"), stays=True)
    with pytest.raises(DigestMismatchError, match=f"t{count - 1}"):
        stage.verify(sent.pack())
