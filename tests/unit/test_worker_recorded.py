"""Recorded copies on toy models: a replay is the load, whatever is more than copies is refused, and the model is whole
after every failure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle_callbacks.worker import commit as commit_module
from twinkle_callbacks.worker.commit import Committer
from twinkle_callbacks.worker.recorded import Copy, NotRecordedError, RecordedCopies, layouts_of

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


class Toy(torch.nn.Module):
    """Loads as vLLM's models do: fused, narrowed to one of two ranks, cast, padded, tied, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(4, 8, bias=False)
        self.down = torch.nn.Linear(3, 4, bias=False)
        self.embed = torch.nn.Embedding(10, 4)
        self.pad = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.LayerNorm(4, dtype=torch.float64)
        self.register_buffer("scale", torch.ones(2, 3))
        self.register_buffer("rope", torch.arange(5.0))  # nothing loads it
        with torch.no_grad():
            self.pad.weight.fill_(7.0)
        self.requires_grad_(False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.load(name, tensor)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        if name in ("q", "k", "v"):
            start, rows = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}[name]
            self.qkv.weight.data.narrow(0, start, rows).copy_(tensor)
        elif name == "down":
            self.down.weight.data.copy_(tensor.narrow(1, 3, 3))  # of rank 1 of 2
        elif name == "embed":
            self.embed.weight[:9].data.copy_(tensor)
            self.embed.weight[9:].data.fill_(0)
        elif name == "pad":
            self.pad.weight.data[: tensor.shape[0]] = tensor  # its other rows stay
        elif name == "norm":
            self.norm.weight.data.copy_(tensor)
            self.norm.bias.data.zero_()
        elif name == "scale":
            self.scale.copy_(tensor.t())


def weights(seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (4, 4), "k": (2, 4), "v": (2, 4), "down": (4, 6), "embed": (9, 4), "pad": (5, 4)}
    shapes |= {"norm": (4,), "scale": (3, 2), "left.out": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def values(model: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def loaded(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    model.load_weights(tensors.items())  # type: ignore[operator]
    return values(model)


def record(model: torch.nn.Module, tensors: Weights) -> RecordedCopies:
    loaded(model, tensors)
    return RecordedCopies.record(model, tensors)


@pytest.fixture(autouse=True)
def plain_loader(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the layerwise reload, which needs vLLM; counts."""
    calls: list[int] = []

    def commit(model: Any, model_config: Any, tensors: Any, device: torch.device) -> None:
        calls.append(1)
        model.load_weights(tensors)

    monkeypatch.setattr(commit_module, "commit", commit)
    return calls


def no_shadow() -> AbstractContextManager[torch.nn.Module]:
    raise AssertionError("there is nothing to ask a second model: all layers are fit")


def committer(model: torch.nn.Module, why_not: str = "") -> Committer:
    return Committer(model, None, CPU, shadow=no_shadow, obstacle=lambda model: why_not)


def test_a_replay_of_other_values_is_their_load() -> None:
    model, expected = Toy(), loaded(Toy(), weights(1))
    copies = record(model, weights(0))
    before = values(model)
    assert copies.fits(layouts_of(weights(1))) == ""
    copies.replay(weights(1))
    assert values(model) == expected != before
    assert model.head.weight is model.embed.weight
    assert model.pad.weight[5].tolist() == [7.0] * 4


def test_recording_leaves_the_values_of_the_commit() -> None:
    model, expected = Toy(), loaded(Toy(), weights(0))
    record(model, weights(0))
    assert values(model) == expected


@pytest.mark.parametrize("recorded_in", [True, False])
def test_inference_mode_makes_no_difference(recorded_in: bool) -> None:
    """Some operators arrive there in larger pieces, and tensors made there cannot be written to elsewhere."""
    model, tensors = Toy(), weights(1)
    with torch.inference_mode(recorded_in):
        copies = record(model, weights(0))
    with torch.inference_mode(not recorded_in):
        copies.replay(tensors)
    assert values(model) == loaded(Toy(), tensors)


def test_padding_that_was_lost_is_filled_again() -> None:
    """As after vLLM's sleep of level 2, which drops the memory of all weights."""
    model = Toy()
    copies = record(model, weights(0))
    model.embed.weight.data.fill_(torch.nan)
    copies.replay(weights(0))
    assert values(model)["embed.weight"] == loaded(Toy(), weights(0))["embed.weight"]


def test_slices_of_one_bucket_are_told_apart() -> None:
    model = Toy()
    tensors = weights(0)
    bucket = torch.cat([tensor.flatten() for tensor in tensors.values()])
    sizes = [tensor.numel() for tensor in tensors.values()]
    slices = {n: part.view(tensors[n].shape) for n, part in zip(tensors, bucket.split(sizes), strict=True)}
    copies = record(model, slices)
    assert copies.fits(layouts_of(weights(1))) == ""
    copies.replay(weights(1))
    assert values(model) == loaded(Toy(), weights(1))


def test_later_writes_over_earlier_ones_end_as_they_did() -> None:
    class Twice(Toy):
        def load(self, name: str, tensor: torch.Tensor) -> None:
            super().load(name, tensor)
            if name == "k":
                self.qkv.weight.data[2:4].copy_(tensor)

    model = Twice()
    record(model, weights(0)).replay(weights(1))
    assert values(model) == loaded(Twice(), weights(1))
    assert model.qkv.weight[2:4].tolist() == weights(1)["k"].tolist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_slicing_loaders(data: st.DataObject) -> None:
    size = st.integers(1, 7)
    rows, columns = data.draw(size, "rows"), data.draw(size, "columns")
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
    kinds = [(data.draw(dtypes), data.draw(st.booleans())) for _ in range(data.draw(st.integers(1, 3), "tensors"))]

    def given_tensors(seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for index, (dtype, transposed) in enumerate(kinds):
            shape = (columns, rows) if transposed else (rows, columns)
            tensor = torch.randint(-100, 100, shape, generator=generator).to(dtype)
            made[str(index)] = tensor.t() if transposed else tensor
        return made

    moves = []
    for _ in range(data.draw(st.integers(1, 5), "copies")):
        cut = [(data.draw(st.integers(0, end - 1)), end) for end in (rows, columns)]
        spans = [(first, data.draw(st.integers(first + 1, end))) for first, end in cut]
        moves.append((data.draw(st.integers(0, 1)), data.draw(st.integers(0, len(kinds) - 1)), spans))

    class Random(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.zeros(rows, columns), requires_grad=False)
            self.register_buffer("b", torch.zeros(columns, rows, dtype=torch.bfloat16).t())

        def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
            sources = dict(tensors)
            for where, which, ((top, bottom), (left, right)) in moves:
                target = (self.a, self.b)[where].data
                target[top:bottom, left:right].copy_(sources[str(which)][top:bottom, left:right])

    model = Random()
    copies = record(model, given_tensors(1))
    assert copies.fits(layouts_of(given_tensors(2))) == ""
    copies.replay(given_tensors(2))
    assert values(model) == loaded(Random(), given_tensors(2))


class Adds(Toy):
    def load(self, name: str, tensor: torch.Tensor) -> None:
        super().load(name, tensor)
        if name == "scale":
            self.scale.data.add_(1)


class Computes(Toy):
    def load(self, name: str, tensor: torch.Tensor) -> None:
        super().load(name, tensor * 2 if name == "q" else tensor)


class Derives(Toy):
    def load(self, name: str, tensor: torch.Tensor) -> None:
        super().load(name, tensor)
        self.derived = self.qkv.weight.t().contiguous()


class Looks(Toy):
    def load(self, name: str, tensor: torch.Tensor) -> None:
        if name != "norm" or tensor.view(-1)[0].item() < 100:
            super().load(name, tensor)


class Reassigns(Toy):
    def load(self, name: str, tensor: torch.Tensor) -> None:
        if name == "down":
            self.down.weight.data = tensor[:, 3:]
        else:
            super().load(name, tensor)


class Replaces(Toy):
    def load(self, name: str, tensor: torch.Tensor) -> None:
        super().load(name, tensor)
        if name == "down":
            self.down.weight = torch.nn.Parameter(tensor[:, 3:], requires_grad=False)


class KeepsElsewhere(Toy):
    def load(self, name: str, tensor: torch.Tensor) -> None:
        super().load(name, tensor)
        if name == "q":
            self.__dict__["kept"] = torch.empty(4, 4).copy_(tensor)


class ChangesSource(Toy):
    def load(self, name: str, tensor: torch.Tensor) -> None:
        super().load(name, tensor.neg_() if name == "q" else tensor)


REFUSED = {
    Adds: "add_",
    Computes: "mul",
    Derives: "clone",
    Looks: "_local_scalar_dense",
    Reassigns: "replaced or added tensors: down.weight",
    Replaces: "replaced or added tensors: down.weight",
    KeepsElsewhere: "copies q to where no parameter or buffer is",
    ChangesSource: "neg_",
}


@pytest.mark.parametrize(("kind", "why"), REFUSED.items(), ids=lambda case: getattr(case, "__name__", ""))
def test_a_loader_that_does_more_than_copy_is_refused(kind: type[Toy], why: str) -> None:
    model = kind()
    loaded(model, weights(0))
    where = {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(NotRecordedError, match=why):
        RecordedCopies.record(model, weights(0))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert (id(tensor), tensor.data_ptr()) == where[name], name


def test_a_reload_that_does_more_than_load_is_refused() -> None:
    model = Toy()
    loaded(model, weights(0))
    with pytest.raises(NotRecordedError, match=r"without a reload leaves other values in 1 of 8 tensors: down.weight"):
        model.down.weight.data.neg_()
        RecordedCopies.record(model, weights(0))


def test_a_replay_that_leaves_something_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the model holds the right values when it is tried."""
    replay = Copy.replay

    def all_but_one(self: Copy, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.source != "v":
            replay(self, tensors)

    model = Toy()
    loaded(model, weights(0))
    monkeypatch.setattr(Copy, "replay", all_but_one)
    with pytest.raises(NotRecordedError, match=r"repeating the copies leaves other values in 1 of 8.*qkv.weight"):
        RecordedCopies.record(model, weights(0))


def test_given_tensors_that_share_memory_are_refused() -> None:
    tensors = weights(0)
    tensors["v"] = tensors["k"]
    with pytest.raises(NotRecordedError, match="k and v share memory"):
        record(Toy(), tensors)
    with pytest.raises(NotRecordedError, match="in the memory of the model"):
        record(model := Toy(), weights(0) | {"q": model.qkv.weight.data[:4]})


@pytest.mark.parametrize("change", ["shape", "dtype", "stride", "missing", "more", "name"])
def test_other_tensors_do_not_fit(change: str) -> None:
    copies = record(Toy(), weights(0))
    tensors = weights(1)
    tensors |= {
        "shape": {"down": torch.zeros(4, 7)},
        "dtype": {"down": torch.zeros(4, 6, dtype=torch.float64)},
        "stride": {"down": torch.zeros(6, 4).t()},
        "more": {"down_": torch.zeros(1)},
        "name": {"down_": tensors["down"]},
    }.get(change, {})
    if change in ("missing", "name"):
        del tensors["down"]
    assert "down" in copies.fits(layouts_of(tensors))
    assert copies.fits(dict(reversed(layouts_of(weights(1)).items()))) == ""


@pytest.mark.parametrize("move", ["data", "parameter", "buffer", "deleted"])
def test_a_moved_destination_does_not_fit(move: str) -> None:
    model = Toy()
    copies = record(model, weights(0))
    if move == "data":
        model.down.weight.data = model.down.weight.data.clone()
    elif move == "parameter":
        model.down.weight = torch.nn.Parameter(model.down.weight.data)  # in the same memory
    elif move == "buffer":
        model.scale = model.scale.clone()
    else:
        del model.down.weight
    assert copies.fits(layouts_of(weights(0))).startswith("moved or replaced in the model: ")


def test_commits_are_loaded_recorded_then_replayed(plain_loader: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model = Toy()
    committing = committer(model)
    assert committing.last_way == ""
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        for seed, way in enumerate(("loader", "recorded", "recorded")):
            committing.commit(weights(seed))
            assert committing.last_way == way
            assert values(model) == loaded(Toy(), weights(seed))
    assert len(plain_loader) == 1
    messages = [record.message for record in caplog.records]
    assert messages == ["the next commits are recorded copies: 10 writes, 0.000 GB, 0 of them in one kernel"]


def test_commits_that_no_longer_fit_are_loaded_and_recorded_anew(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy()
    committing = committer(model)
    committing.commit(weights(0))
    model.down.weight.data = model.down.weight.data.clone()
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        ways = []
        for seed in range(1, 5):
            tensors = weights(seed)
            if seed > 2:
                tensors["down"] = tensors["down"].double()
            committing.commit(tensors)
            ways.append(committing.last_way)
            assert values(model) == loaded(Toy(), tensors)
    assert ways == ["loader", "recorded", "loader", "recorded"]
    messages = [record.message for record in caplog.records]
    assert messages[0] == "the recorded copies no longer fit: moved or replaced in the model: down.weight"
    assert messages[2].startswith("the recorded copies no longer fit: other names, shapes")


@pytest.mark.parametrize("kind", [Adds, Computes, Derives, Looks, Reassigns, KeepsElsewhere])
def test_a_refused_record_costs_one_more_load_once(
    kind: type[Toy], plain_loader: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = kind()
    committing = committer(model)
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        for seed in range(3):
            committing.commit(weights(seed))
            assert committing.last_way == "loader"
            assert values(model) == loaded(kind(), weights(seed))
    assert len(plain_loader) == 4
    assert len(caplog.records) == 1
    assert "commits go through vLLM's loader: " in caplog.text


class FailsLater(Toy):
    """Fails at the call of `fails`, in the middle."""

    fails = (2,)
    calls = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.calls += 1
        for name, tensor in weights:
            if self.calls in self.fails and name == "embed":
                self.qkv.weight.data = torch.zeros(8, 4, dtype=torch.float64)
                raise RuntimeError("broke off")
            self.load(name, tensor)


def test_a_load_that_breaks_off_while_recording_leaves_the_model_whole() -> None:
    model = FailsLater()
    home = model.qkv.weight.data_ptr()
    committing = committer(model)
    committing.commit(weights(0))
    assert committing.last_way == "loader"
    assert values(model) == loaded(Toy(), weights(0))
    assert model.qkv.weight.data_ptr() == home


def test_a_model_that_cannot_be_made_whole_again_is_a_failed_commit() -> None:
    model = FailsLater()
    model.fails = (2, 3)
    committing = committer(model)
    with pytest.raises(RuntimeError, match="broke off"):
        committing.commit(weights(0))
    assert committing.last_way == ""
    committing.commit(weights(1))
    assert values(model) == loaded(Toy(), weights(1))


def test_a_replay_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    committing = committer(model)
    committing.commit(weights(0))

    def broken(self: RecordedCopies, tensors: Any) -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(RecordedCopies, "replay", broken)
        with pytest.raises(RuntimeError, match="device lost"):
            committing.commit(weights(1))
    committing.commit(weights(1))
    assert committing.last_way == "loader"
    assert values(model) == loaded(Toy(), weights(1))


def test_nothing_is_recorded_where_the_layers_or_the_host_are_in_the_way(
    plain_loader: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vllm.twinkle_callbacks"):
        layers = committer(Toy(), "Layer may derive something")
        layers.commit(weights(0))
        layers.commit(weights(1))
        host = Committer(Toy(), None, torch.device("meta"), shadow=no_shadow, obstacle=lambda model: "")
        host.commit(weights(0))
    assert layers.last_way == host.last_way == "loader"
    assert len(plain_loader) == 3
    assert len(caplog.records) == 2
    assert "commits go through vLLM's loader: Layer may derive" in caplog.text
    assert "is staged on cpu, and the way from there to meta takes longer" in caplog.text
