"""Asked of a vLLM worker by `llm.collective_rpc(name)`: what only its process knows."""

from __future__ import annotations

import torch

from twinkle_callbacks.worker.commit import Committer


class Probe:
    """A worker extension of vLLM; `self` is the worker."""

    def twinkle_commit_way(self) -> str:
        """How the last commit went."""
        return str(self._twinkle_committer().last_way)

    def twinkle_reserved_bytes(self) -> int:
        """What torch holds of the GPU in this process."""
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    def _twinkle_committer(self) -> Committer:
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        [committer] = [value for value in vars(engine).values() if isinstance(value, Committer)]
        return committer
