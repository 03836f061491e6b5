"""A `vllm.LLM` inside the trainer's process."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, TypeVar

from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.adapter_versions import new_version, next_id
from twinkle_callbacks.config import BACKEND
from twinkle_callbacks.engines.thread import CLOSE_S, EngineThread
from twinkle_callbacks.errors import ConfigError, DeadlineError, RolloutError, RolloutUnreachableError, TwinkleError
from twinkle_callbacks.rollouts.base import Rollout

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)
T = TypeVar("T")

LIVENESS_S = 0.25


class LocalRollout(Rollout):
    """An offline engine: `LocalRollout(vllm.LLM(..., weight_transfer_config={"backend": "twinkle"}))`.

    `LLM` is used by one caller at a time, so nothing is in flight during a push and there is nothing to pause.

    Where the policy trains on the same GPU, `sleep` gives the engine's memory back for that time. The next push wakes
    the weights first, commits, and wakes the cache last.

    Args:
        llm: the engine; generate with it between pushes.

    Raises:
        ConfigError: it was made without the backend `twinkle`.
    """

    _thread: EngineThread | None = None  # that waits for an engine with a process of its own

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
        self._adapters: dict[str, LoRARequest] = {}
        self._unused: deque[int] = deque()  # ids of versions that ended, on whatever thread that was
        self._asleep: set[str] = set()  # of vLLM's tags for memory
        self._dropped = self._torn = False  # its weights: by sleep; by a commit that may have broken off

    @property
    def held(self) -> bool:
        return bool(self._asleep)

    def sleep(self, level: int = 1) -> None:
        """Gives back the engine's GPU memory, until `wake_up` or the next push.

        A push that fails wakes it too, with the weights that it had; one that has none sleeps until a push succeeds.

        Args:
            level: 1 keeps the weights in host memory; 2 drops them, so that only a push can bring new ones.

        Raises:
            ConfigError: another level, 2 where adapters need the base, or an engine without `enable_sleep_mode=True`.
            RolloutError: it sleeps, or vLLM refused.
        """
        config = self.llm.llm_engine.vllm_config
        if level not in (1, 2):
            raise ConfigError(f"sleep: level={level!r}; 1 keeps the weights in host memory, 2 drops them")
        if not config.model_config.enable_sleep_mode:
            raise ConfigError("sleep: make this LLM with vllm.LLM(..., enable_sleep_mode=True)")
        if level == 2 and config.lora_config is not None:
            raise ConfigError("sleep: level=2 would drop the base, which adapters need; use level=1")
        if "weights" in self._asleep:
            raise RolloutError("sleep: the local vLLM sleeps already; wake it up first, or push")
        self._wake("kv_cache")  # or vLLM would not hear of it
        before = self._asleep, self._dropped
        self._asleep, self._dropped = {"weights", "kv_cache"}, self._dropped or level == 2
        try:
            self._call("sleep", level)
        except (DeadlineError, RolloutUnreachableError):
            raise  # nobody knows how far it came
        except RolloutError:
            self._asleep, self._dropped = before
            raise

    def wake_up(self) -> None:
        """Lets the engine generate again with the weights that it had. Does nothing if it is awake.

        Raises:
            RolloutError: it has none, as it dropped them (level 2) or a commit broke off, and no push has brought
                others; or vLLM refused.
        """
        if self._asleep and (self._dropped or self._torn):
            why = "dropped its weights (sleep level 2)" if self._dropped else "has weights of which a commit broke off"
            raise RolloutError(f"wake_up: the local vLLM {why}; push, which wakes it")
        for memory in ("weights", "kv_cache"):
            self._wake(memory)

    def _wake(self, memory: str) -> None:
        if memory in self._asleep:
            self._call("wake_up", [memory])
            self._asleep.remove(memory)

    def world_size(self) -> int:
        return int(self.llm.llm_engine.vllm_config.parallel_config.world_size_across_dp)

    def models(self) -> list[str]:
        names = self.llm.llm_engine.vllm_config.model_config.served_model_name
        return [str(names)] if isinstance(names, str) else [str(name) for name in names or ()]

    def join(self, request: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", {"init_info": {"request": request}})

    def start(self) -> None:
        self._wake("weights")
        self._call("start_weight_update")

    def update(self, info: dict[str, Any]) -> None:
        self._call("update_weights", {"update_info": {**info, "cache_may_sleep": True}})

    def finish(self) -> None:
        self._call("finish_weight_update")

    def pause(self, mode: str, *, clear_cache: bool) -> None:
        """Between two calls of `LLM` no request is in flight. From now on the weights may be half of one version."""
        self._torn = True

    def is_paused(self) -> bool:
        return self._torn

    def resume(self) -> None:
        """Wakes an engine that slept; one that dropped its weights sleeps on until a push succeeds."""
        self._torn = False
        if not self._dropped:
            self.wake_up()

    def reset_cache(self) -> None:
        # As vLLM's own pause over HTTP does, which an offline engine does not have.
        if not self._call("reset_prefix_cache", False, True):
            raise RolloutError("the local vLLM did not drop its cached prefixes; set stale_kv='keep' if they may stay")
        if self.llm.llm_engine.vllm_config.model_config.is_multimodal_model:
            self._call("reset_mm_cache")
            self._call("reset_encoder_cache", owner=self.llm.llm_engine)

    def set_version(self, version: int) -> None:
        self._version, self._dropped, self._torn = str(version), False, False
        if hasattr(self.llm, "update_weight_version"):  # vLLM 0.26 has no versions in its offline engine
            self._call("update_weight_version", self._version)

    def version(self) -> str:
        return str(self._call("get_weight_version")) if hasattr(self.llm, "get_weight_version") else self._version

    def call(self, call: dict[str, Any]) -> None:
        self._forget_unused()
        self._call("init_weight_transfer_engine", {"init_info": {"call": call}})

    def load_adapter(self, name: str, path: str) -> None:
        self.wake_up()
        self._check_place(name)
        parsed = AdapterPath.parse(path) or AdapterPath.attached(path)
        version = new_version(name, next_id(), str(parsed), self._unused.append)
        try:
            self.llm.llm_engine.add_lora(version)
        except Exception as error:  # an in-process worker raises whatever it likes; a remote one RuntimeError
            raise RolloutError(f"the local vLLM cannot serve adapter {name!r}: {error}") from error
        self._adapters[name] = version
        self._forget_unused()

    def _check_place(self, name: str) -> None:
        """Whether an adapter may have this name and a slot, as a server checks it."""
        config = self.llm.llm_engine.vllm_config.lora_config
        if config is None:
            raise RolloutError("this LLM runs without LoRA; make it with enable_lora=True")
        if name in self.models():
            raise RolloutError(f"{name!r} is the name of the base model; choose another adapter name")
        if name not in self._adapters and len(self._adapters) >= config.max_loras:
            raise RolloutError(
                f"all {config.max_loras} adapter slots are taken (by {', '.join(sorted(self._adapters))}); make the "
                f"LLM with max_loras={len(self._adapters) + 1}, or detach one"
            )

    def _forget_unused(self) -> None:
        while self._unused:
            lora_id = self._unused.popleft()
            try:
                self.llm.llm_engine.remove_lora(lora_id)
            except Exception as error:  # such as an engine that is being shut down
                logger.info("version %d of an adapter was not forgotten: %s", lora_id, error)

    def unload_adapter(self, name: str) -> None:
        self.lora_request(name)  # raises if there is none
        del self._adapters[name]
        self._forget_unused()

    def adapters(self) -> dict[str, str]:
        return {name: version.lora_path for name, version in self._adapters.items()}

    def lora_request(self, name: str) -> LoRARequest:
        """The version of an adapter that is served now, for `llm.generate(prompts, lora_request=...)`.

        Ask for it anew after each push: an object that is kept goes on standing for the version that it stood for.

        Raises:
            RolloutError: nothing was pushed under this name.
        """
        if name not in self._adapters:
            raise RolloutError(
                f"there is no adapter {name!r}; those that exist are {', '.join(self._adapters) or 'none'}"
            )
        return self._adapters[name]

    def close(self, patience_s: float = CLOSE_S) -> None:
        """Leaves the engine as it is: it belongs to the caller."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.abandon(RolloutError("the local rollout was closed"), patience_s=patience_s)

    def __del__(self) -> None:  # dropped without close()
        self.close(0.0)

    def _call(self, method: str, *args: Any, owner: Any = None) -> Any:
        """Calls a method of the `LLM`, or of another `owner`."""
        try:
            return self._while_alive(method, lambda: getattr(owner or self.llm, method)(*args))
        except TwinkleError:
            raise
        except Exception as error:  # an in-process worker raises whatever it likes; a remote one RuntimeError
            raise RolloutError(f"the local vLLM refused {method}: {type(error).__name__}: {error}") from error

    def _while_alive(self, method: str, call: Callable[[], T]) -> T:
        """Waits for a call no longer than the engine's process lives, as vLLM (0.26 to 0.32) would.

        Calls come one after another, also after one that was interrupted: vLLM's client is not made for two at a time.
        """
        resources = getattr(self.llm.llm_engine.engine_core, "resources", None)
        if resources is None:  # the engine is in this process
            return call()
        self._thread = self._thread or EngineThread("twinkle-llm")
        outcome = self._thread.submit(call)
        deadline = time.monotonic() + self.timeout_s
        while not wait([outcome], LIVENESS_S).done:
            if resources.engine_dead and not wait([outcome], LIVENESS_S).done:
                self.close()
                raise RolloutUnreachableError(f"the engine process of the local vLLM ended during {method}")
            if time.monotonic() > deadline:
                self.close()
                raise DeadlineError(f"the local vLLM did not answer {method} within {self.timeout_s:g} s")
        return outcome.result()
