"""Rollouts: the vLLM engines that sample from the policy, and how the trainer steers them."""

from __future__ import annotations

from typing import Any

from twinkle_callbacks.errors import ConfigError
from twinkle_callbacks.rollouts.base import Rollout
from twinkle_callbacks.rollouts.http import HTTPRollout
from twinkle_callbacks.rollouts.local import LocalRollout
from twinkle_callbacks.rollouts.registry import AdapterRegistry, ServedAdapter

__all__ = ["AdapterRegistry", "HTTPRollout", "LocalRollout", "Rollout", "ServedAdapter", "open_rollout"]


def open_rollout(rollout: Any, *, token: str, timeout_s: float) -> Rollout:
    """Turns an entry of the setting `rollouts` into a rollout: a URL, or an object that is one already.

    Raises:
        ConfigError: neither.
    """
    if isinstance(rollout, Rollout):
        rollout.timeout_s = timeout_s
        return rollout
    if isinstance(rollout, str):
        return HTTPRollout(rollout, token=token, timeout_s=timeout_s)
    raise ConfigError(f"rollouts: {rollout!r} is neither a URL nor a rollout; wrap a vllm.LLM as LocalRollout(llm)")
