"""A rollout without vLLM that serves adapters: the real links and the real store of a worker, over a `FakeRollout`.

In place of vLLM are the three functions that need it: see `without_vllm`.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from tests.unit.fake_rollout import RUNS, FakeRollout
from twinkle_callbacks import auth
from twinkle_callbacks.buckets.digest import digests_of
from twinkle_callbacks.worker import adapters
from twinkle_callbacks.worker.adapter_links import AdapterLinks
from twinkle_callbacks.worker.adapters import AdapterStore
from twinkle_callbacks.worker.base_digests import BaseDigests
from twinkle_callbacks.worker.link import Link
from twinkle_callbacks.worker.messages import AdapterCall, Joined, JoinRequest, LoRARuns


class Model:
    """In place of vLLM's `LoRAModel`."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def clone(self, lora_id: int) -> Model:
        return self


class Request:
    """In place of vLLM's `LoRARequest`."""

    load_inplace = False

    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


class Store(AdapterStore):
    """A store of a model that takes every adapter, or none for the reason in `refusal`."""

    def __init__(self, max_loras: int = 3) -> None:
        lora_config = SimpleNamespace(max_loras=max_loras, max_lora_rank=8, lora_dtype=torch.float32)
        super().__init__(SimpleNamespace(lora_config=lora_config, remove_adapter=lambda _: None))
        self.refusal: Exception | None = None

    def check(self, *_: Any) -> None:
        if self.refusal is not None:
            raise self.refusal

    def _place(self, *_: Any) -> None:
        """There are no layers."""


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of a `Store`: it builds models of plain tensors, on the only rank."""
    monkeypatch.setattr(adapters, "_build", lambda manager, config, tensors: Model(dict(tensors)))
    monkeypatch.setattr(adapters, "all_ranks_can", lambda can: can)
    monkeypatch.setattr(adapters, "raise_on_last_rank", _raise)


class AdapterRollout(FakeRollout):
    """One worker with a base, and the adapters on it."""

    def __init__(self, name: str, base: dict[str, torch.Tensor], **settings: Any) -> None:
        super().__init__(name, **settings)
        self.store = Store()
        self.restart(base)
        self._ids, self._paths = itertools.count(1), dict[str, str]()

    def restart(self, base: dict[str, torch.Tensor]) -> None:
        """Begins again on a base, without the links there were."""
        self.weights, self.base = base, BaseDigests(None, torch.nn.Module())  # type: ignore[arg-type]
        self.base.committed(digests_of(base.items()))
        self.links = AdapterLinks(self.store, self.base)

    def join(self, request: dict[str, Any]) -> None:
        token = auth.load_token()
        invited = JoinRequest.opened(request, token)
        if invited.adapter is None:
            self.links.check_base(invited.base_of)
            self._runs = msgspec.structs.replace(RUNS, lora=self.links.runs())
            super().join(request)
            return
        self._enter("join")
        self.links.check(invited)
        self.links.join(Link(invited, token), invited.rank_offset, self._describe)

    def _describe(self, lora: LoRARuns | None) -> Joined:
        return msgspec.structs.replace(RUNS, lora=lora)

    def call(self, call: dict[str, Any]) -> None:
        asked = AdapterCall.opened(call, auth.load_token())
        if not asked.adapter:
            super().call(call)
            return
        self._enter(asked.action)
        self.links.call(asked)

    def finish(self) -> None:
        self.base.begin_commit()
        super().finish()
        self.base.committed(digests_of(self.weights.items()))

    def load_adapter(self, name: str, path: str) -> None:
        self._enter("load_adapter")
        self.store.add(None, Request(name, next(self._ids), path))  # type: ignore[arg-type]
        self._paths[name] = path

    def adapters(self) -> dict[str, str]:
        return dict(self._paths)
