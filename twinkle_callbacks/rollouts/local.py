"""A `vllm.LLM` inside the trainer's process."""

from __future__ import annotations

import logging
from typing import Any

from twinkle_callbacks.config import BACKEND
from twinkle_callbacks.errors import ConfigError, RolloutError, TwinkleError
from twinkle_callbacks.rollouts.base import Rollout

logger = logging.getLogger(__name__)


class LocalRollout(Rollout):
    """An offline engine: `LocalRollout(vllm.LLM(..., weight_transfer_config={"backend": "twinkle"}))`.

    `LLM` is used by one caller at a time, so nothing is in flight during a push and there is nothing to pause.

    Args:
        llm: the engine; generate with it between pushes.

    Raises:
        ConfigError: it was made without the backend `twinkle`.
    """

    def __init__(self, llm: Any) -> None:
        config = llm.llm_engine.vllm_config.weight_transfer_config
        if config is None or config.backend != BACKEND:
            raise ConfigError(
                f"LocalRollout: this LLM has weight_transfer_config={config!r}; "
                f"make it with vllm.LLM(..., weight_transfer_config={{'backend': 'twinkle'}})"
            )
        self.name = "local"
        self.host = "127.0.0.1"
        self.llm = llm
        self._version = "default"

    def world_size(self) -> int:
        return int(self.llm.llm_engine.vllm_config.parallel_config.world_size_across_dp)

    def join(self, request: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", {"init_info": {"request": request}})

    def start(self) -> None:
        self._call("start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        self._call("update_weights", {"update_info": info})

    def finish(self) -> None:
        self._call("finish_weight_update")

    def pause(self, mode: str, *, clear_cache: bool) -> None:
        """Does nothing: between two calls of `LLM` no request is in flight."""

    def resume(self) -> None:
        """Does nothing, as `pause`."""

    def reset_cache(self) -> None:
        # As vLLM's own pause over HTTP does, which an offline engine does not have.
        if not self._call("reset_prefix_cache", False, True):
            raise RolloutError("the local vLLM did not drop its cached prefixes; set stale_kv='keep' if they may stay")
        self._call("reset_mm_cache")

    def set_version(self, version: int) -> None:
        self._version = str(version)
        if hasattr(self.llm, "update_weight_version"):  # vLLM 0.26 has no versions in its offline engine
            self._call("update_weight_version", self._version)

    def version(self) -> str:
        return str(self._call("get_weight_version")) if hasattr(self.llm, "get_weight_version") else self._version

    def leave(self) -> None:
        try:
            self._call("shutdown_weight_transfer_engine")
        except RolloutError as error:
            logger.info("the local vLLM keeps its end of the engine until the next trainer comes: %s", error)

    def close(self) -> None:
        """Does nothing: the engine belongs to the caller."""

    def _call(self, method: str, *args: Any) -> Any:
        try:
            return getattr(self.llm, method)(*args)
        except TwinkleError:
            raise
        except Exception as error:  # an in-process worker raises whatever it likes; a remote one RuntimeError
            raise RolloutError(f"the local vLLM refused {method}: {type(error).__name__}: {error}") from error
