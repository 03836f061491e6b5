"""Commits that reload some layers alone, by vLLM's own layerwise reload: on a toy model, and in real engines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.partly_fit import LOADED, PartlyFit, memory, shadow, values, weights
from tests.partly_fit import loaded as loaded_as
from tests.tiny_models import build
from tests.vllm.engines import answers, fresh_answers, make_llm, release
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.rollouts import LocalRollout
from twinkle_callbacks.worker.check import shadow_model
from twinkle_callbacks.worker.commit import Committer, commit
from twinkle_callbacks.worker.layers import UnfitLayer

CPU = torch.device("cpu")


class Config:
    """What the reload wants of vLLM's."""

    dtype = torch.float32


@pytest.fixture
def layerwise() -> ModuleType:
    from vllm.model_executor.model_loader.reload import layerwise  # here, as importing vLLM warns in plenty

    return layerwise


@pytest.fixture
def kind(layerwise: ModuleType) -> type[PartlyFit]:
    """The toy model, of classes that vLLM's reload processes."""
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class OfVLLM(PartlyFit):
        def __init__(self) -> None:
            super().__init__(QuantizeMethodBase, MLAAttention)
            layerwise.record_metadata_for_reloading(self)

    return OfVLLM


@pytest.fixture
def model(kind: type[PartlyFit]) -> PartlyFit:
    return loaded_as(kind, weights(9))


def expected(seed: int) -> dict[str, Any]:
    return values(loaded_as(PartlyFit, weights(seed)))


def committer(model: PartlyFit) -> Committer:
    return Committer(model, Config, CPU, shadow=partial(shadow, type(model)), obstacle=lambda model: "")


def test_a_partial_commit_is_a_full_reload(
    model: PartlyFit, layerwise: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[Any] = []
    monkeypatch.setattr(layerwise.logger, "warning", lambda *args: complaints.append(args))
    before = memory(model)
    committing = committer(model)
    for seed in range(4):
        model.given.clear()
        committing.commit(weights(seed))
        assert committing.last_way == ("partly recorded" if seed else "loader")
        assert values(model) == expected(seed)
        if seed:
            assert model.given == [LOADED]
    assert memory(model) == before
    assert complaints == []


def test_layers_that_are_not_reloaded_stay_where_and_as_they_are(model: PartlyFit) -> None:
    others = {name: parameter for name, parameter in model.named_parameters() if name not in LOADED}
    seen: list[bool] = []
    load = model.load

    def watching(parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        now = dict(model.named_parameters())
        seen.extend(now[other] is parameter and not parameter.is_meta for other, parameter in others.items())
        load(parameters, name, tensor)

    model.load = watching  # type: ignore[method-assign]
    tensors = [(name, weights(1)[name]) for name in LOADED]
    commit(model, Config, tensors, CPU, [model.packed, model.attention])
    assert seen
    assert all(seen)
    mixed = weights(9) | dict(tensors)
    assert values(model) == values(loaded_as(PartlyFit, mixed))


@pytest.mark.parametrize("breaks", ["packing", "loading", "deriving"])
def test_a_partial_commit_that_breaks_off_leaves_a_model_that_the_next_puts_in_order(
    breaks: str, model: PartlyFit, layerwise: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    committing = committer(model)
    committing.commit(weights(0))
    before = memory(model)

    def broken(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        if breaks == "packing":
            patch.setattr(type(model.packed.quant_method), "process_weights_after_loading", broken)
        elif breaks == "loading":
            patch.setattr(layerwise, "materialize_layer", broken)
        else:
            patch.setattr(type(model.attention), "process_weights_after_loading", broken)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            committing.commit(weights(1))
    assert memory(model) == before
    assert not any(layerwise.get_layerwise_info(layer).can_load() for layer in model.modules())
    for seed, way in ((2, "loader"), (3, "partly recorded")):
        committing.commit(weights(seed))
        assert committing.last_way == way
        assert values(model) == expected(seed)
    assert memory(model) == before


def all_but_norms_and_embeddings(model: Any) -> list[UnfitLayer]:
    """On CPU vLLM packs the weights of linear layers, of experts and of heads."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found: list[UnfitLayer] = []
    for name, module in model.named_modules():
        embedding = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        inside = any(name.startswith(f"{layer.name}.") for layer in found)
        if not inside and not embedding and getattr(module, "quant_method", None) is not None:
            found.append(UnfitLayer(name, module, type(module.quant_method).__name__))
    return found


def recording(llm: Any) -> Committer:
    """Lets the only worker of this engine record what is fit on CPU."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    engine = worker.weight_transfer_engine
    engine._committer = Committer(
        engine.model,
        engine.model_config,
        engine.device,
        shadow=partial(shadow_model, engine.vllm_config),
        obstacle=lambda model: "",
        unfit_layers=all_but_norms_and_embeddings,
    )
    return engine._committer


@pytest.fixture
def no_engine_outlives_its_test() -> Iterator[None]:
    yield
    release()


@pytest.mark.usefixtures("no_engine_outlives_its_test")
@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe", "mixtral"])
def test_answers_equal_a_fresh_load_after_each_partial_commit(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policies = [build(kind, seed=seed) for seed in range(4)]
    for number, policy in enumerate(policies):
        policy.save_pretrained(tmp_path / str(number))
    wanted = [fresh_answers(tmp_path / str(number)) for number in range(4)]
    llm = make_llm(tmp_path / "0", synced=True)
    committing = recording(llm)
    trained = build(kind, seed=1)
    logger = logging.getLogger("vllm.twinkle_callbacks")
    logger.addHandler(caplog.handler)
    try:
        with (
            caplog.at_level(logging.INFO, logger.name),
            WeightSynchronizer(trained, rollouts=LocalRollout(llm), timeout_s=60) as sync,
        ):
            assert answers(llm) == wanted[1]
            assert committing.last_way == "loader"
            for number in (2, 3, 1):
                trained.load_state_dict(policies[number].state_dict())
                sync.push(version=number)
                assert committing.last_way == "partly recorded", caplog.text
                assert answers(llm) == wanted[number]
    finally:
        logger.removeHandler(caplog.handler)
    assert "tensors go through vLLM's loader" in caplog.text
