"""In-process vLLM engines, and what they answer: greedy tokens with their logprobs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import httpx
import pytest

PROMPTS = [[3, 4, 5], [9, 8, 7, 6], [20, 30, 40, 50, 60]]
TOKENS = 10
Answers = list[tuple[list[int], list[float]]]

# In-process engines share vLLM's process groups: the first one makes them, the first one to go ends them for all.
_ALIVE: list[Any] = []


def make_llm(folder: Path, *, synced: bool, **settings: Any) -> Any:
    """A small in-process engine; `synced` ones run the backend `twinkle`."""
    from vllm import LLM

    backend = {"weight_transfer_config": {"backend": "twinkle"}} if synced else {}
    llm = LLM(
        str(folder),
        **{
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 32 << 20,
            "max_num_seqs": 8,
            "max_model_len": 64,
            "dtype": "float32",
            **backend,
            **settings,
        },
    )
    _ALIVE.append(llm)
    return llm


def answers(llm: Any, prompts: list[list[int]] = PROMPTS, lora_request: Any = None) -> Answers:
    """Greedy answers, in one batch; `lora_request` is vLLM's, for all prompts or one for each."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, lora_request=lora_request
    )
    return [
        (list(o.token_ids), [logprobs[t].logprob for t, logprobs in zip(o.token_ids, o.logprobs, strict=True)])
        for o in (output.outputs[0] for output in outputs)
    ]


def server_answers(url: str, prompts: list[list[int]] = PROMPTS, model: str | None = None) -> Answers:
    """Greedy answers of a server's base model, or of the adapter that `model` names."""
    body = {
        **({} if model is None else {"model": model}),
        "prompt": prompts,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    response.raise_for_status()
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


def server_version(url: str) -> str:
    return str(httpx.get(f"{url}/weight_info", timeout=30).raise_for_status().json()["weight_version"])


def fresh_answers(folder: Path, prompts: list[list[int]] = PROMPTS) -> Answers:
    """What an engine answers that loads the folder's weights itself: the reference that knows nothing of a sync."""
    return answers(make_llm(folder, synced=False), prompts)


def assert_same(got: Answers, wanted: Answers) -> None:
    """Same tokens; logprobs to float32 rounding, since a server may batch requests differently."""
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in wanted]
    for (_, ours), (_, theirs) in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)


def end(llm: Any) -> None:
    """Ends one engine, in a process of its own or the only one in this."""
    llm.llm_engine.engine_core.shutdown()
    _ALIVE.remove(llm)
    gc.collect()


def release() -> None:
    """Ends all engines made so far, together with the process groups they share.

    By vLLM's own call, since garbage collection may be late: an engine that starts freezes what there is by then, and
    one that is found dead only after it would take the process groups with it.
    """
    for llm in _ALIVE:
        llm.llm_engine.engine_core.shutdown()
    _ALIVE.clear()
    gc.collect()
