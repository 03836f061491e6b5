"""A push is all or nothing: what goes wrong leaves the old weights serving, and the next push succeeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import build, specs_of
from tests.vllm.engines import answers, fresh_answers, make_llm, release
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.errors import ConfigError, RolloutError, SourceError, SyncError
from twinkle_callbacks.rollouts import LocalRollout
from twinkle_callbacks.sources import WeightSource


class _Wrong(WeightSource):
    """The right tensors, altered by name: None drops one, a tensor replaces it; new names are added."""

    def __init__(self, model: torch.nn.Module, changes: dict[str, torch.Tensor | None]) -> None:
        self._tensors = {n: t.detach() for n, t in model.state_dict().items()} | changes

    def specs(self) -> list[TensorSpec]:
        return specs_of((name, tensor) for name, tensor in self._tensors.items() if tensor is not None)

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, tensor) for name, tensor in self._tensors.items() if tensor is not None)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("served")
    build("qwen3", seed=0).save_pretrained(folder)
    yield make_llm(folder, synced=True, block_size=32)
    release()


def test_an_engine_drops_all_caches_that_a_multimodal_model_has(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.llm_engine.vllm_config.model_config.__class__, "is_multimodal_model", True)
    LocalRollout(llm).reset_cache()


K_PROJ, NORM = "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({K_PROJ: None}, ["missing", "qkv_proj", "75%"]),
        ({"model.bogus": torch.ones(2)}, ["model.bogus", "unexpected"]),
        ({NORM: torch.ones(7)}, [NORM, "(7,)", "another shape"]),
        ({K_PROJ: None, NORM: torch.ones(7), "bogus": torch.ones(2)}, ["qkv_proj", NORM, "bogus"]),
    ],
)
def test_wrong_tensors_are_all_listed_and_leave_the_old_weights_serving(
    llm: Any, changes: dict[str, torch.Tensor | None], named: list[str]
) -> None:
    policy = build("qwen3", seed=3)
    with WeightSynchronizer(policy, rollouts=LocalRollout(llm), timeout_s=60) as sync:
        sync.push(version=1)
        before = answers(llm)
    wrong = WeightSynchronizer(_Wrong(build("qwen3", seed=4), changes), rollouts=LocalRollout(llm), timeout_s=60)
    with pytest.raises(SyncError) as caught:
        wrong.open(version=2)
    assert all(word in str(caught.value) for word in named), str(caught.value)
    assert caught.value.phase == "check"
    assert answers(llm) == before
    assert llm.get_weight_version() == "1"


def test_an_error_in_the_middle_of_a_sync_keeps_the_old_weights_and_the_next_push_succeeds(
    llm: Any, tmp_path: Path
) -> None:
    policy = build("qwen3", seed=5)

    class Breaking(WeightSource):
        broken = False

        def specs(self) -> list[TensorSpec]:
            return specs_of(policy.state_dict().items())

        def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
            for number, item in enumerate(policy.state_dict().items()):
                if self.broken and number == 9:
                    raise ValueError("the optimizer lost a shard")
                yield item

    source = Breaking()
    with WeightSynchronizer(source, rollouts=LocalRollout(llm), timeout_s=60) as sync:
        before = answers(llm)
        source.broken = True
        policy.load_state_dict(build("qwen3", seed=6).state_dict())
        with pytest.raises(SyncError, match="the optimizer lost a shard") as caught:
            sync.push(version=1)
        assert caught.value.phase == "transfer"
        assert answers(llm) == before
        assert llm.get_weight_version() == "0"
        source.broken = False
        sync.push(version=2)
    policy.save_pretrained(tmp_path)
    assert answers(llm) == fresh_answers(tmp_path)


@pytest.mark.parametrize(("stale_kv", "cached"), [("recompute", 0), ("keep", 32)])
def test_cached_prefixes_are_dropped_or_kept_as_the_setting_says(llm: Any, stale_kv: Any, cached: int) -> None:
    from vllm import SamplingParams

    prompt = [{"prompt_token_ids": list(range(3, 43))}]
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    with WeightSynchronizer(
        build("qwen3", seed=7), rollouts=LocalRollout(llm), stale_kv=stale_kv, timeout_s=60
    ) as sync:
        llm.generate(prompt, sampling, use_tqdm=False)
        sync.push(version=1)
        output = llm.generate(prompt, sampling, use_tqdm=False)[0]
    assert output.num_cached_tokens == cached


def test_outputs_carry_the_version_they_were_made_with(llm: Any) -> None:
    from vllm import SamplingParams

    with WeightSynchronizer(build("qwen3", seed=7), rollouts=LocalRollout(llm), timeout_s=60) as sync:
        sync.push(version=41)
        sampling = SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False)
        [output] = llm.generate([{"prompt_token_ids": [3, 4]}], sampling, use_tqdm=False)
    assert [span.version for span in output.outputs[0].weight_versions] == ["41"]


def test_finish_without_an_update_is_refused(llm: Any) -> None:
    with WeightSynchronizer(build("qwen3", seed=7), rollouts=LocalRollout(llm), timeout_s=60):
        llm.start_weight_update()
        with pytest.raises(Exception, match="nothing was received"):
            llm.finish_weight_update("99")
    assert llm.get_weight_version() == "0"
    with WeightSynchronizer(build("qwen3", seed=7), rollouts=LocalRollout(llm), timeout_s=60) as sync:
        assert sync.push(version=3).version == 3  # the handshake ended the session that was left open


def test_bad_input_is_one_clear_error_before_anything_is_sent(llm: Any, tmp_path: Path) -> None:
    policy = build("qwen3")
    rollout = LocalRollout(llm)
    with pytest.raises(ConfigError, match="every_n_step.*known are.*every_n_steps"):
        WeightSynchronizer(policy, rollouts=rollout, every_n_step=2)  # type: ignore[call-arg]
    with pytest.raises(SourceError, match="no parameters"):
        WeightSynchronizer(torch.nn.ReLU(), rollouts=rollout)
    with pytest.raises(ConfigError, match="warp.*gloo"):
        WeightSynchronizer(policy, rollouts=rollout, engine="warp").open()
    with pytest.raises(ConfigError, match="neither a URL nor a rollout"):
        WeightSynchronizer(policy, rollouts=llm).open()
    with pytest.raises(SourceError, match=r"holds no adapter.*merge_and_sync=True"):
        WeightSynchronizer(policy, rollouts=rollout, merge_and_sync=False)
    build("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="backend"):
        LocalRollout(make_llm(tmp_path, synced=False))
    other = make_llm(tmp_path, synced=True, enable_lora=True, max_lora_rank=8)
    with pytest.raises(RolloutError, match="--enable-lora"):
        WeightSynchronizer(policy, rollouts=LocalRollout(other), timeout_s=60).open()
