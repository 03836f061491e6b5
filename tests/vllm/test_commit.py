"""A commit that breaks off leaves a model that the next commit puts in order; what its loader ignores is noticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.tiny_models import build
from tests.vllm.engines import answers, fresh_answers, make_llm, release
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.errors import EngineError, SyncError
from twinkle_callbacks.rollouts import LocalRollout
from twinkle_callbacks.worker.commit import commit

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


class Model(torch.nn.Module):
    """Two layers that load as vLLM's do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            getattr(parameters[name], "weight_loader", default_weight_loader)(parameters[name], tensor)


@pytest.fixture
def layerwise() -> ModuleType:
    from vllm.model_executor.model_loader.reload import layerwise  # here, as importing vLLM warns in plenty

    return layerwise


@pytest.fixture
def model(layerwise: ModuleType) -> Model:
    model = Model().requires_grad_(False)
    layerwise.record_metadata_for_reloading(model)
    return model


def weights(value: float) -> Weights:
    return {name: torch.full((4, 4), value) for name in ("a.weight", "b.weight")}


def assert_holds(model: Model, expected: Weights) -> None:
    assert {name: tensor.tolist() for name, tensor in model.named_parameters()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }


def test_weights_are_written_in_place(model: Model) -> None:
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    commit(model, None, weights(3.0).items(), CPU)
    assert_holds(model, weights(3.0))
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before


def test_commit_after_one_that_broke_off_in_a_layer_puts_all_in_order(
    model: Model, layerwise: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    materialize = layerwise.materialize_layer

    def full(layer: torch.nn.Module, info: Any) -> None:
        if layer is model.b:
            raise torch.OutOfMemoryError("no room for layer b")
        materialize(layer, info)

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "materialize_layer", full)
        with pytest.raises(torch.OutOfMemoryError, match="layer b"):
            commit(model, None, weights(3.0).items(), CPU)
    assert not any(p.is_meta for p in model.parameters())
    commit(model, None, weights(4.0).items(), CPU)
    assert_holds(model, weights(4.0))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_commit_whose_stream_breaks_off_leaves_no_tensor_without_memory(model: Model) -> None:
    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a.weight", torch.ones(4, 4)
        raise ValueError("the stage is gone")

    with pytest.raises(ValueError, match="the stage is gone"):
        commit(model, None, breaking(), CPU)
    assert not any(p.is_meta for p in model.parameters())
    commit(model, None, weights(5.0).items(), CPU)
    assert_holds(model, weights(5.0))


def test_layer_that_a_commit_leaves_without_memory_is_an_error(
    model: Model, layerwise: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_layerwise_process", lambda layer, info: info.reset())
    with pytest.raises(EngineError, match=r"2 tensors have no memory: a\.weight, b\.weight"):
        commit(model, None, weights(3.0).items(), CPU)
    assert not any(p.is_meta for p in model.parameters())


@pytest.fixture
def no_engine_outlives_its_test() -> Iterator[None]:
    yield
    release()


@pytest.mark.usefixtures("no_engine_outlives_its_test")
def test_untied_head_for_a_server_with_a_tied_one_is_refused(tmp_path: Path) -> None:
    build("llama", seed=0).save_pretrained(tmp_path / "served")
    tied_llm = make_llm(tmp_path / "served", synced=True)
    before = answers(tied_llm)
    untied = build("llama", seed=1, tie_word_embeddings=False)
    with pytest.raises(SyncError, match="lm_head.weight was sent.*tie_word_embeddings") as caught:
        WeightSynchronizer(untied, rollouts=LocalRollout(tied_llm), timeout_s=60).open()
    assert caught.value.phase == "check"
    assert answers(tied_llm) == before
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.model.embed_tokens.weight)
    sync = WeightSynchronizer(untied, rollouts=LocalRollout(tied_llm), timeout_s=60)
    sync.open()  # sent twice, and the same
    tied = build("llama", seed=1)
    tied.load_state_dict(untied.state_dict())
    tied.save_pretrained(tmp_path / "wanted")
    expected = fresh_answers(tmp_path / "wanted")
    assert answers(tied_llm) == expected
    with torch.no_grad():
        untied.lm_head.weight.mul_(2.0)
    with pytest.raises(
        SyncError, match="lm_head.weight was sent"
    ):  # at a later push too, when training took them apart
        sync.push(version=1)
    sync.close()
    assert answers(tied_llm) == expected


@pytest.mark.usefixtures("no_engine_outlives_its_test")
def test_tied_head_for_a_server_with_an_untied_one_is_refused_with_the_setting(tmp_path: Path) -> None:
    build("llama", seed=0, tie_word_embeddings=False).save_pretrained(tmp_path / "served")
    untied_llm = make_llm(tmp_path / "served", synced=True)
    with pytest.raises(SyncError, match=r"1 parameters missing: lm_head\.weight.*tie_word_embeddings=True"):
        WeightSynchronizer(build("llama", seed=1), rollouts=LocalRollout(untied_llm), timeout_s=60).open()
