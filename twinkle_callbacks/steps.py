"""Sees whether the policy's weights really changed, which no framework reports for every optimizer.

Lightning's `global_step` counts steps that AMP skipped and misses raw optimizers, Accelerate's `step_was_skipped`
misses fused optimizers that skip inside their kernel, and a batch without a loss steps without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class StepWatch:
    """Watches every torch optimizer of this process for steps that change the policy.

    The hook only sets a flag: under ZeRO it runs once for each sub-group, while the model still holds the old weights.
    Callers ask with `take()` at a place where the weights are final.

    Args:
        parameters: the policy's parameters, as the trainer's optimizers hold them.
        optimizers: the trainer's optimizers, without the framework's own wrapper. Only used to find those that step
            a partition of their own instead of the parameters (DeepSpeed); any step of these counts.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], optimizers: Iterable[Any] = ()) -> None:
        self._policy = {id(parameter) for parameter in parameters}
        self._partitioned = {id(innermost(each)) for each in optimizers if innermost(each) is not each}
        self._changed: bool | None = None
        # Global rather than one hook an optimizer: it also sees those that the trainer does not manage.
        self._handle = register_optimizer_step_post_hook(self._on_step)

    def take(self) -> bool | None:
        """Returns what steps did since the last call, and forgets it.

        Returns:
            True if a step changed the policy, False if steps ran and none did, None if no step was seen.
        """
        changed, self._changed = self._changed, None
        return changed

    def close(self) -> None:
        """Stops watching; may be called again."""
        self._handle.remove()

    def concerns(self, optimizer: Any) -> bool:
        """Whether a step of this optimizer may change the policy."""
        inner = innermost(optimizer)
        return id(inner) in self._partitioned or bool(self._held(inner))

    def _held(self, optimizer: Any) -> list[torch.nn.Parameter]:
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._policy]

    def _on_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if id(optimizer) not in self._partitioned:
            held = self._held(optimizer)
            if not held:
                return
            # An FSDP1 rank may hold empty shards, which never get a gradient; it has to agree with the other ranks.
            moved = any(p.grad is not None or p.numel() == 0 for p in held)
        else:
            moved = True
        # GradScaler leaves the verdict on a fused optimizer, whose kernel then skips the step by itself.
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf)
        self._changed = bool(self._changed) or (moved and not skipped)


def innermost(optimizer: Any) -> Any:
    """Returns the optimizer inside all wrappers, such as the one that ZeRO partitions."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
