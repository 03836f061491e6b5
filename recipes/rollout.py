"""Sampling from vLLM servers over HTTP: one request a server and step, token ids in and out, with logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from recipes.config import RecipeConfig
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.errors import DeadlineError, RolloutError, RolloutUnreachableError
from twinkle_callbacks.rollouts.http import api_key_header

# Explicit, so that no generation_config.json bends the distribution that the logprobs are taken from.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "logprobs": 0, "return_token_ids": True}
_GREEDY = _SAMPLING | {"temperature": 0.0}


@dataclass(frozen=True)
class Completion:
    """One sample.

    Attributes:
        prompt_ids: token ids of the prompt.
        token_ids: sampled token ids, the end token included if it was sampled.
        logprobs: natural logarithm of each token's probability at temperature 1.
        text: the completion without special tokens.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str


class Sampler:
    """Draws completions from one or several servers with the same weights; prompts are split between them.

    Args:
        urls: addresses of the servers.
        max_tokens: longest completion, in tokens.
        timeout_s: seconds that one request may take.
        model: the adapter to sample, None for what the servers started with.
        transport: in place of the network, for tests.

    Raises:
        DeadlineError: a server did not answer in time.
        RolloutUnreachableError: nobody answers there.
        RolloutError: a server answered with an error, or left out what was asked for.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_tokens: int,
        timeout_s: float,
        model: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._model, self._timeout_s = model, timeout_s
        self._common = {"max_tokens": max_tokens} | ({} if model is None else {"model": model})
        options: Any = {"headers": api_key_header(), "timeout": timeout_s, "transport": transport, "trust_env": False}
        self._clients = [httpx.Client(base_url=url, **options) for url in urls]
        self._threads = ThreadPoolExecutor(max_workers=len(urls), thread_name_prefix="sampler")

    @classmethod
    def of(cls, config: RecipeConfig) -> Sampler:
        """The sampler of a run."""
        rollouts = config.rollouts
        return cls(
            config.rollout_urls, max_tokens=rollouts.max_tokens, timeout_s=rollouts.timeout_s, model=rollouts.model
        )

    def sample(self, prompts: Sequence[list[int]], per_prompt: int) -> list[Completion]:
        """Returns `per_prompt` completions for each prompt, side by side, in the order of the prompts."""
        return self._draw(prompts, per_prompt, _SAMPLING)

    def greedy(self, prompts: Sequence[list[int]]) -> list[Completion]:
        """Returns the likeliest completion of each prompt, token by token."""
        return self._draw(prompts, 1, _GREEDY)

    def _draw(self, prompts: Sequence[list[int]], per_prompt: int, sampling: dict[str, Any]) -> list[Completion]:
        body = {"n": per_prompt, **self._common, **sampling}
        share = -(-len(prompts) // len(self._clients))
        shares = [list(prompts[i * share : (i + 1) * share]) for i in range(len(self._clients))]
        jobs = [
            self._threads.submit(self._complete, client, part, body)
            for client, part in zip(self._clients, shares, strict=True)
            if part
        ]
        return [completion for job in jobs for completion in job.result()]

    def weight_version(self) -> str:
        """The weight version that the servers themselves say they serve; an error if they differ."""
        versions = {str(client.base_url): self._version(client) for client in self._clients}
        if len(set(versions.values())) > 1:
            raise RolloutError(f"the servers hold different weight versions: {versions}")
        return next(iter(versions.values()))

    def _version(self, client: httpx.Client) -> str:
        if self._model is None:
            return str(self._call(client, "GET", "/weight_info")["weight_version"])
        served = {each["id"]: each["root"] for each in self._call(client, "GET", "/v1/models")["data"]}
        path = AdapterPath.parse(served.get(self._model, ""))
        if path is None or path.version is None:
            raise RolloutError(f"no trainer sent an adapter {self._model!r} to {client.base_url}; it has {served}")
        return str(path.version)

    def close(self) -> None:
        self._threads.shutdown()
        for client in self._clients:
            client.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _complete(self, client: httpx.Client, prompts: list[list[int]], body: dict[str, Any]) -> list[Completion]:
        per_prompt = body["n"]
        answer = self._call(client, "POST", "/v1/completions", {"prompt": prompts, **body})
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(prompts) * per_prompt:
            raise RolloutError(f"{client.base_url} sent {len(choices)} completions for {len(prompts)} x {per_prompt}")
        return [_completion(prompts[i // per_prompt], choice) for i, choice in enumerate(choices)]

    def _call(self, client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        where = f"{method} {client.base_url}{path}"
        try:
            response = client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise DeadlineError(f"{where} was not answered within {self._timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise RolloutUnreachableError(f"{where}: {error}; start a server with: twinkle-callbacks serve") from error
        if response.is_error:
            raise RolloutError(f"{where} answered {response.status_code}: {response.text[:500]}")
        return response.json()


def _completion(prompt_ids: list[int], choice: dict[str, Any]) -> Completion:
    token_ids, logprobs = choice["token_ids"], (choice["logprobs"] or {}).get("token_logprobs", [])
    if not token_ids or len(token_ids) != len(logprobs):
        raise RolloutError(f"a completion came with {len(logprobs)} logprobs for the tokens {token_ids}")
    return Completion(prompt_ids, list(token_ids), list(logprobs), choice["text"])
