"""Does the server hold the base that a trainer's adapter was made for? Told by a digest of every tensor.

The digests are those of the last commit of whole weights, or, as long as there was none, of the checkpoint that vLLM
loaded, read once more from its files.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from twinkle_callbacks.buckets.digest import Digests, digests_of
from twinkle_callbacks.buckets.packing import dtype_of
from twinkle_callbacks.errors import RolloutError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.twinkle_callbacks")

_FROM_FILES = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt")


class BaseDigests:
    """What one worker's base weights are. Safe to use from several links at a time.

    Attributes:
        id: random, of the base as it is now; also a worker that starts again on another checkpoint has another one.
    """

    def __init__(self, vllm_config: VllmConfig, model: torch.nn.Module) -> None:
        self.id = _new_id()
        self._vllm_config = vllm_config
        self._model = model
        self._committed: Digests | None = None
        self._broken = False
        self._read: Digests = {}
        self._lock = threading.Lock()

    def begin_commit(self) -> None:
        """The base is about to change; unknown until `committed`."""
        self._broken = True
        self.id = _new_id()

    def committed(self, digests: Digests) -> None:
        """The base is now of these digests."""
        self._committed, self._broken = digests, False

    def differing(self, base: Mapping[str, tuple[str, str]]) -> tuple[list[str], str]:
        """Names of the tensors that this worker has with another dtype or value, or does not have, and the base's id.

        Args:
            base: dtype and digest of each tensor as the trainer has it. What a file has in another dtype is cast first,
                as vLLM's loader does.

        Raises:
            RolloutError: it cannot be told.
        """
        with self._lock:
            compared = self.id
            if self._broken:
                raise RolloutError("a commit of the base broke off")
            held = self._committed if self._committed is not None else self._of_files(base)
            names = [name for name, wanted in base.items() if held.get(name) != tuple(wanted)]
            if self.id != compared:
                raise RolloutError("the base was replaced while it was compared; sync again")
            return names, compared

    def _of_files(self, base: Mapping[str, tuple[str, str]]) -> Digests:
        unread = {name for name, (dtype, _) in base.items() if self._read.get(name, ("",))[0] != dtype}
        if unread:
            for name, tensor in self._file_tensors():
                if name in unread:
                    self._read |= digests_of([(name, tensor.to("cpu", dtype_of(base[name][0])))])
        return self._read

    def _file_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        config: Any = self._vllm_config.load_config
        if config.load_format not in _FROM_FILES:
            raise RolloutError(f"the server was started with --load-format {config.load_format}, not from a checkpoint")
        logger.info("reading %s once more, to compare it with a trainer's base", self._vllm_config.model_config.model)
        loader: Any = DefaultModelLoader(config)
        yield from loader.get_all_weights(self._vllm_config.model_config, self._model)


def _new_id() -> str:
    return secrets.token_hex(8)
