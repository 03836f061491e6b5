"""Sampling over HTTP: what is asked for, what is made of the answers, and which errors come of bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from recipes import arithmetic
from recipes.config import DataConfig, RecipeConfig, RolloutConfig
from recipes.experience import Collector
from recipes.rollout import Completion, Sampler
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import ConfigError, DeadlineError, RolloutError, RolloutUnreachableError

PROMPTS = [arithmetic.encode(prompt) for prompt in ("07+15=", "01+02=", "11+08=")]


class FakeServer(httpx.BaseTransport):
    """Answers as vLLM's `/v1/completions` and `/weight_info` do; every second sample of a prompt is right."""

    def __init__(self, versions: dict[str, str] | None = None, change: Callable[[Any], Any] = lambda answer: answer):
        self.requests: list[tuple[str, Any]] = []
        self._versions, self._change = versions or {}, change

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if request.url.path == "/weight_info":
            return httpx.Response(200, json={"weight_version": self._versions.get(host, "0")})
        body = json.loads(request.read())
        self.requests.append((host, body))
        choices = [
            self._choice(i * body["n"] + j, prompt, right=j % 2 == 0)
            for i, prompt in enumerate(body["prompt"])
            for j in range(body["n"])
        ]
        return httpx.Response(200, json=self._change({"choices": choices[::-1]}))

    @staticmethod
    def _choice(index: int, prompt: list[int], *, right: bool) -> dict[str, Any]:
        digits = [token - arithmetic.VOCABULARY["0"] for token in prompt]
        text = f"{digits[0] * 10 + digits[1] + digits[3] * 10 + digits[4]:02d}" if right else "99"
        ids = [*arithmetic.encode(text), arithmetic.EOS_ID]
        return {"index": index, "token_ids": ids, "text": text, "logprobs": {"token_logprobs": [-0.5] * len(ids)}}


def sampler(transport: httpx.BaseTransport, urls: list[str] | None = None, model: str | None = None) -> Sampler:
    return Sampler(urls or ["http://a:1"], max_tokens=3, timeout_s=5.0, model=model, transport=transport)


def test_one_request_carries_all_prompts_and_results_keep_their_order() -> None:
    server = FakeServer()
    with sampler(server) as sampling:
        completions = sampling.sample(PROMPTS, per_prompt=2)
    ((_, body),) = server.requests
    assert body["prompt"] == PROMPTS
    assert (body["n"], body["max_tokens"], body["return_token_ids"], body["logprobs"]) == (2, 3, True, 0)
    assert [c.prompt_ids for c in completions] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
    assert [c.text for c in completions] == ["22", "99", "03", "99", "19", "99"]
    assert completions[0] == Completion(PROMPTS[0], [5, 5, arithmetic.EOS_ID], [-0.5] * 3, "22")


def test_sampling_is_from_the_untruncated_distribution_at_temperature_one() -> None:
    server = FakeServer()
    with sampler(server) as sampling:
        sampling.sample(PROMPTS, per_prompt=1)
    ((_, body),) = server.requests
    assert (body["temperature"], body["top_p"], body["top_k"]) == (1.0, 1.0, 0)


def test_prompts_are_split_between_servers_in_order() -> None:
    server = FakeServer()
    with sampler(server, ["http://a:1", "http://b:1"]) as sampling:
        completions = sampling.sample(PROMPTS, per_prompt=1)
    assert {host: body["prompt"] for host, body in server.requests} == {"a": PROMPTS[:2], "b": PROMPTS[2:]}
    assert [c.text for c in completions] == ["22", "03", "19"]


def test_the_weight_version_is_the_servers_own_and_must_be_one() -> None:
    with sampler(FakeServer({"a": "7", "b": "7"}), ["http://a:1", "http://b:1"]) as sampling:
        assert sampling.weight_version() == "7"
    apart = sampler(FakeServer({"a": "7", "b": "8"}), ["http://a:1", "http://b:1"])
    with apart, pytest.raises(RolloutError, match="different weight versions.*'7'.*'8'"):
        apart.weight_version()


def served_models(*models: dict[str, str]) -> httpx.MockTransport:
    return httpx.MockTransport(lambda request: httpx.Response(200, json={"data": list(models)}))


def test_the_version_of_an_adapter_is_in_the_list_of_models() -> None:
    base = {"id": "policy", "root": "policy"}
    sent = {"id": "add", "root": str(AdapterPath.sent(12))}
    attached = {"id": "other", "root": str(AdapterPath.attached("/adapters/other"))}
    with sampler(served_models(base, sent, attached), model="add") as sampling:
        assert sampling.weight_version() == "12"
    for name in ("other", "unknown", "policy"):
        with sampler(served_models(base, sent, attached), model=name) as sampling:
            with pytest.raises(RolloutError, match=f"no trainer sent an adapter '{name}'"):
                sampling.weight_version()


def test_vllms_own_key_is_sent_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k" * 8)
    sent: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("Authorization"))
        return httpx.Response(200, json={"weight_version": "0"})

    with sampler(httpx.MockTransport(answer)) as drawing:
        drawing.weight_version()
    assert sent == ["Bearer kkkkkkkk"]


def test_requests_name_the_adapter_and_greedy_ones_take_the_likeliest_tokens() -> None:
    server = FakeServer()
    with sampler(server) as base, sampler(server, model="add") as adapter:
        base.greedy(PROMPTS)
        adapter.sample(PROMPTS, per_prompt=2)
    (_, greedy), (_, sampled) = server.requests
    assert (greedy["temperature"], greedy["n"], greedy.get("model")) == (0.0, 1, None)
    assert (sampled["temperature"], sampled["n"], sampled["model"]) == (1.0, 2, "add")


def without_logprobs(answer: Any) -> Any:
    return {"choices": [choice | {"logprobs": None} for choice in answer["choices"]]}


def without_the_last(answer: Any) -> Any:
    return {"choices": answer["choices"][1:]}


@pytest.mark.parametrize(
    ("change", "message"), [(without_logprobs, "0 logprobs"), (without_the_last, "2 completions for 3 x 1")]
)
def test_incomplete_answers_are_errors(change: Callable[[Any], Any], message: str) -> None:
    with sampler(FakeServer(change=change)) as sampling, pytest.raises(RolloutError, match=message):
        sampling.sample(PROMPTS, per_prompt=1)


def failing(error: Exception | httpx.Response) -> httpx.MockTransport:
    def handle(request: httpx.Request) -> httpx.Response:
        if isinstance(error, Exception):
            raise error
        return error

    return httpx.MockTransport(handle)


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (httpx.ReadTimeout("slow"), DeadlineError, "not answered within 5 s"),
        (httpx.ConnectError("refused"), RolloutUnreachableError, "twinkle-callbacks serve"),
        (httpx.Response(503, text="engine dead"), RolloutError, "answered 503: engine dead"),
    ],
)
def test_failures_are_worded_with_the_address(
    failure: Exception | httpx.Response, expected: type[Exception], message: str
) -> None:
    address = "http://a:1/v1/completions"
    with sampler(failing(failure)) as sampling, pytest.raises(expected, match=f"{address}.*{message}"):
        sampling.sample(PROMPTS, per_prompt=1)


def config(prompts: int) -> RecipeConfig:
    return RecipeConfig(data=DataConfig(prompts_per_step=prompts), rollouts=RolloutConfig(samples_per_prompt=2))


def test_experience_is_scored_and_carries_the_version_before_it() -> None:
    with sampler(FakeServer({"a": "3"})) as sampling:
        experience = Collector(config(4), sampling).collect(step=0)
    assert experience.server_version == "3"
    assert experience.batch.rewards.tolist() == [1.0, 0.0] * 4
    assert experience.batch.mask.sum() == 4 * 2 * 3


def test_ranks_sample_disjoint_shares_that_make_up_the_whole() -> None:
    server = FakeServer()
    with sampler(server) as sampling:
        for rank in range(2):
            Collector(config(6), sampling, rank=rank, world_size=2).collect(step=5)
        Collector(config(6), sampling).collect(step=5)
    first, second, whole = (body["prompt"] for _, body in server.requests)
    assert [whole[0::2], whole[1::2]] == [first, second]


def test_prompts_that_do_not_divide_among_the_ranks_are_refused() -> None:
    with sampler(FakeServer()) as sampling, pytest.raises(ConfigError, match="prompts_per_step=5 does not divide"):
        Collector(config(5), sampling, world_size=2)
