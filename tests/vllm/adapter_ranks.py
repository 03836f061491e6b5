"""An engine with two tensor-parallel workers that loads $FOLDER: adapters for both of them, and for one only."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import build
from tests.vllm.engines import answers, assert_same, make_llm
from tests.vllm.test_adapter_store import LINEAR, Adapter, peft_answers, policy, request
from twinkle_callbacks import WeightSynchronizer
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import RolloutError
from twinkle_callbacks.rollouts import LocalRollout


def main() -> None:
    folder = Path(os.environ["FOLDER"])
    llm = make_llm(folder, synced=True, tensor_parallel_size=2, enable_lora=True, max_loras=2, max_lora_rank=8)
    engine, loaded = llm.llm_engine, []
    for seed in (1, 2, 3):
        trained = policy(seed, target_modules=[*LINEAR, "embed_tokens", "lm_head"])
        adapter = Adapter(folder / f"adapter-{seed}", trained)
        sent = request("policy", AdapterPath.sent(seed))
        llm.apply_model(functools.partial(put, request=sent, adapter=adapter))
        assert engine.add_lora(sent)
        loaded.append((sent, peft_answers(trained)))
        before = engine.list_loras()
        for rank, why in ((0, "not in this worker's memory"), (1, "another rank")):
            lone = request("lone", AdapterPath.sent(9))
            llm.apply_model(functools.partial(put, request=lone, adapter=adapter, only_rank=rank))
            with pytest.raises(Exception, match=why):
                engine.add_lora(lone)
        assert engine.list_loras() == before
        for one, expected in loaded:
            assert_same(answers(llm, lora_request=one), expected)
    assert_same(answers(llm), peft_answers(build("qwen3", seed=0)))
    assert all(engine.remove_lora(sent.lora_int_id) for sent, _ in loaded)
    push(llm)


def push(llm: Any) -> None:
    """Over the wire: both workers receive, and a trainer that is refused does not shift their replies.

    A second trainer of the same engine has a rollout of its own, whose ids are others than those of the first.
    """
    from vllm.lora.request import LoRARequest

    rollout, trained = LocalRollout(llm), policy(4)
    settings: Any = {"rollouts": rollout, "merge_and_sync": False, "adapter_name": "pushed", "timeout_s": 60}
    with WeightSynchronizer(trained, **settings) as sync:
        with pytest.raises(RolloutError, match="kept fresh by another trainer"):
            WeightSynchronizer(trained, **settings).open()
        assert sync.push(version=1).version == 1
        assert_same(answers(llm, lora_request=rollout.lora_request("pushed")), peft_answers(trained))
        second, other = LocalRollout(llm), policy(5)
        with WeightSynchronizer(other, **settings | {"rollouts": second, "adapter_name": "second"}):
            assert_same(answers(llm, lora_request=second.lora_request("second")), peft_answers(other))
            taken = rollout.lora_request("pushed").lora_int_id
            with pytest.raises(Exception, match=f"id {taken} is taken by 'pushed'"):
                llm.llm_engine.add_lora(LoRARequest("third", taken, str(AdapterPath.sent(0))))
        assert_same(answers(llm, lora_request=rollout.lora_request("pushed")), peft_answers(trained))
    assert_same(answers(llm), peft_answers(build("qwen3", seed=0)))


def put(model: torch.nn.Module, request: Any, adapter: Adapter, only_rank: int | None = None) -> None:
    from vllm.distributed.parallel_state import get_tp_group

    from twinkle_callbacks.worker.adapters import AdapterStore

    store, path = AdapterStore.of(model), AdapterPath.parse(request.lora_path)
    assert store is not None
    assert path is not None
    store.check(request.lora_name, adapter.config, adapter.shapes)
    if only_rank in (None, get_tp_group().rank_in_group):
        store.put(request.lora_name, path, adapter.config, adapter.copies())


if __name__ == "__main__":
    main()
