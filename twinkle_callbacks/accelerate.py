"""Weight sync for loops written with Accelerate, which has no callbacks: a context manager around the loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Unpack

import torch

from twinkle_callbacks.config import SyncOptions, SyncSettings
from twinkle_callbacks.errors import ConfigError, MissingExtraError
from twinkle_callbacks.report import SyncReport
from twinkle_callbacks.schedule import PushSchedule
from twinkle_callbacks.sources.names import select
from twinkle_callbacks.steps import StepWatch
from twinkle_callbacks.sync import WeightSynchronizer

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise MissingExtraError(
        f"twinkle_callbacks.accelerate cannot import accelerate ({error}); "
        "install it with: pip install 'twinkle_callbacks[accelerate]'"
    ) from error


class WeightSync:
    """Keeps vLLM rollouts on the newest weights inside a `with` block around the training loop.

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        with WeightSync(accelerator, model, optimizer, rollouts="http://127.0.0.1:8000"):
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(loss(model, batch))
                    optimizer.step()    # pushes before it returns, when it changed the weights
                    optimizer.zero_grad()

    Entering connects to the rollouts and makes the first push, leaving disconnects; both run on every trainer rank.
    Calls of `step` that only accumulate, that AMP skipped, or that found no gradient push nothing. The weight version
    is the number of real steps. It is saved and loaded with `accelerator.save_state()` and `load_state()`; a load
    inside the block pushes the loaded weights at once. Load a checkpoint of a run without WeightSync before you make
    one, as `load_state()` refuses when objects were registered that it does not hold.

    Metrics `weight_sync/*` of each push go to the accelerator's trackers, with the weight version as the step.

    Args:
        accelerator: the accelerator that prepared the rest.
        model: the prepared policy.
        optimizer: the prepared optimizer, or several that step at the same accumulation boundary: these push once, when
            the last of them has stepped.
        settings: as in `twinkle_callbacks.config.SyncSettings`.

    Attributes:
        settings: the settings, validated.
        report: receipt of the last push, None before the first.

    Raises:
        ConfigError: a setting is wrong, or an optimizer was not prepared.
        SyncError: a push failed; raised from `optimizer.step()` unless `on_error` is `skip`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: AcceleratedOptimizer | Sequence[AcceleratedOptimizer],
        **settings: Unpack[SyncOptions],
    ) -> None:
        self.settings = SyncSettings.parse(settings)
        self.report: SyncReport | None = None
        self._accelerator = accelerator
        self._model = model
        self._optimizers = _prepared(optimizer)
        self._options = settings
        self._schedule = PushSchedule(self.settings.every_n_steps)
        self._synchronizer: WeightSynchronizer | None = None
        self._watch: StepWatch | None = None
        self._stepped: set[int] = set()  # indices of the optimizers that were called at this accumulation boundary
        self._restore: list[Callable[[], None]] = []
        accelerator.register_for_checkpointing(self)

    def __enter__(self) -> WeightSync:
        if self._synchronizer is not None:
            raise ConfigError("this WeightSync is already entered; leave its `with` block first")
        self._synchronizer = WeightSynchronizer(self._model, **self._options)
        try:
            policy = select(self._model, self.settings.module)
            self._watch = StepWatch(policy.parameters(), [each.optimizer for each in self._optimizers])
            self._restore = [self._wrap(index, each) for index, each in enumerate(self._optimizers)]
            self._log(self._synchronizer.open(self._schedule.version))
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def push(self) -> SyncReport:
        """Pushes the weights as they are, under the current version, whether or not a push is due. Every rank calls it.

        Raises:
            ConfigError: called outside the `with` block.
        """
        if self._synchronizer is None:
            raise ConfigError("push() works inside the `with` block of WeightSync only")
        return self._log(self._synchronizer.push(self._schedule.version))

    def state_dict(self) -> dict[str, Any]:
        """What `accelerator.save_state()` keeps: the number of real steps."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the count of a checkpoint. `accelerator.load_state()` calls it last, on every rank."""
        self._schedule.load_state_dict(state)
        if self._synchronizer is not None:
            self.push()

    def _wrap(self, index: int, optimizer: AcceleratedOptimizer) -> Callable[[], None]:
        """Makes `optimizer.step` report to us, and returns the function that undoes it."""
        step, before = optimizer.step, vars(optimizer).get("step")

        @functools.wraps(step)
        def step_and_push(*args: Any, **kwargs: Any) -> Any:
            self._check_in_turn(index)
            result = step(*args, **kwargs)
            self._after_step(index)
            return result

        def restore() -> None:
            if vars(optimizer).get("step") is not step_and_push:
                return  # wrapped again by somebody else; ours does nothing once closed
            if before is None:
                del optimizer.step
            else:
                optimizer.step = before

        optimizer.step = step_and_push
        return restore

    def _check_in_turn(self, index: int) -> None:
        if self._accelerator.sync_gradients and index in self._stepped:
            waiting = sorted(set(range(len(self._optimizers))) - self._stepped)
            raise ConfigError(
                f"optimizer {index} steps a second time while optimizers {waiting} have not stepped: the optimizers "
                "given to WeightSync have to step at the same accumulation boundary; give it only those that do"
            )

    def _after_step(self, index: int) -> None:
        if self._watch is None or not self._accelerator.sync_gradients:
            return
        self._stepped.add(index)
        if len(self._stepped) < len(self._optimizers):
            return
        self._stepped.clear()
        # Both verdicts count: the wrapper's is wrong for fused optimizers under AMP, and the watch sees torch's only.
        concerned = [each for each in self._optimizers if self._watch.concerns(each.optimizer)] or self._optimizers
        changed, skipped = self._watch.take(), all(each.step_was_skipped for each in concerned)
        if changed is not False and not skipped and self._schedule.record_step():
            self.push()

    def _log(self, report: SyncReport) -> SyncReport:
        self.report = report
        self._accelerator.log(report.metrics(), step=self._schedule.version)
        return report

    def _close(self) -> None:
        for restore in reversed(self._restore):
            restore()
        if self._watch is not None:
            self._watch.close()
        if self._synchronizer is not None:
            self._synchronizer.close()
        self._restore, self._watch, self._synchronizer = [], None, None
        self._stepped.clear()


def _prepared(optimizer: AcceleratedOptimizer | Sequence[AcceleratedOptimizer]) -> list[AcceleratedOptimizer]:
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not optimizers:
        raise ConfigError("no optimizer given; pass the one that steps the policy")
    for each in optimizers:
        if not isinstance(each, AcceleratedOptimizer):
            raise ConfigError(
                f"the optimizer is a plain {type(each).__name__}; call accelerator.prepare(model, optimizer) first and "
                "pass what it returns"
            )
    return optimizers
