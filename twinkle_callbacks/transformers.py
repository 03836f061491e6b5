"""Weight sync for `transformers.Trainer` and the trainers of TRL."""

from __future__ import annotations

import inspect
import weakref
from types import TracebackType
from typing import Any, Unpack

from typing_extensions import override

from twinkle_callbacks.config import SyncOptions, SyncSettings
from twinkle_callbacks.errors import MissingExtraError
from twinkle_callbacks.report import SyncReport
from twinkle_callbacks.schedule import PushSchedule
from twinkle_callbacks.sources.names import select
from twinkle_callbacks.steps import StepWatch
from twinkle_callbacks.sync import WeightSynchronizer

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise MissingExtraError(
        f"twinkle_callbacks.transformers cannot import transformers ({error}); "
        "install it with: pip install 'twinkle_callbacks[transformers]'"
    ) from error


class WeightSyncCallback(TrainerCallback):
    """Keeps vLLM rollouts on the newest weights of the model that a `transformers.Trainer` or TRL trainer trains.

        trainer = GRPOTrainer(..., rollout_func=sample, callbacks=[WeightSyncCallback(rollouts="http://127.0.0.1:8000")])

    The first push is at the start of training, also after a resume; then one after each optimizer step that changed
    the weights, before the next batch is sampled. Steps that AMP skipped push nothing. The weight version is the number
    of real steps; it is saved in the checkpoint's `trainer_state.json` and continues from there, or from `global_step`
    for a checkpoint that was written without this callback. With `load_best_model_at_end` the best model is pushed when
    it has been loaded, under a version of its own. With TRL leave `use_vllm` at False and sample in
    `rollout_func`: otherwise TRL pushes weights of its own. Runs on every trainer rank.

    The Trainer tells callbacks nothing about exceptions. The connection is closed at the end of training, and after an
    exception as soon as one of these comes: the next `train()`, the end of a `with` block over this callback,
    `close()`, its garbage collection, or the end of the process.

    Metrics `weight_sync/*` of the last push are added to what the Trainer logs next, for all its reporters.

    Args:
        settings: as in `twinkle_callbacks.config.SyncSettings`.

    Attributes:
        settings: the settings, validated.
        report: receipt of the last push, None before the first.

    Raises:
        ConfigError: a setting is wrong; raised when the callback is made.
        SyncError: a push failed; raised from the training loop unless `on_error` is `skip`.
    """

    def __init__(self, **settings: Unpack[SyncOptions]) -> None:
        self.settings = SyncSettings.parse(settings)
        self.report: SyncReport | None = None
        self._options = settings
        self._schedule = PushSchedule(self.settings.every_n_steps)
        self._synchronizer: WeightSynchronizer | None = None
        self._watch: StepWatch | None = None
        self._finalizer: weakref.finalize[..., WeightSyncCallback] | None = None
        self._unlogged: dict[str, float] = {}

    def __enter__(self) -> WeightSyncCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnects from the rollouts, which keep the weights they have; may be called again."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = self._synchronizer = self._watch = None

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        self._move_before_reporters()
        self._restore_steps(state)
        model = kwargs["model"]
        self._synchronizer = WeightSynchronizer(model, **self._options)
        policy = select(model, self.settings.module)
        self._watch = StepWatch(policy.parameters(), [kwargs["optimizer"].optimizer])
        self._finalizer = weakref.finalize(self, _release, self._synchronizer, self._watch)
        self._received(self._synchronizer.open(self._schedule.version))

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._synchronizer is None or self._watch is None:
            return
        # Both verdicts count: the wrapper's is wrong for fused optimizers under AMP, and the watch sees torch's only.
        if self._watch.take() is False or kwargs["optimizer"].step_was_skipped:
            return
        due = self._schedule.record_step()
        # Not an `ExportableState`: that one is restored by making a new callback from JSON, without rollout objects.
        state.stateful_callbacks[self._state_key] = {"args": {}, "attributes": self._schedule.state_dict()}
        if due:
            self._received(self._synchronizer.push(self._schedule.version))

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._unlogged:
            kwargs["logs"].update(self._unlogged)
            state.log_history[-1].update(self._unlogged)  # the Trainer's copy of `logs`, made just before
            self._unlogged = {}

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._synchronizer is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer has just loaded it. It is no step, but a version stands for the same weights always.
            self._schedule.record_step()
            self._received(self._synchronizer.push(self._schedule.version))
        self.close()

    @property
    def _state_key(self) -> str:
        return f"twinkle_callbacks.WeightSyncCallback({self.settings.module})"

    def _restore_steps(self, state: TrainerState) -> None:
        saved = state.stateful_callbacks.get(self._state_key)
        if saved is not None:
            self._schedule.load_state_dict(saved["attributes"])
        elif state.global_step:
            self._schedule.load_state_dict({"steps": state.global_step})

    def _received(self, report: SyncReport) -> None:
        self.report = report
        self._unlogged = report.metrics()

    def _move_before_reporters(self) -> None:
        """Moves this callback to the front, as the reporters of `report_to` come before all that the user gives.

        A callback gets no reference to the handler that calls it, hence the walk up the stack. Where it finds none, the
        metrics still reach the progress bar, `log_history`, and the reporters that stand after this callback.
        """
        frame = inspect.currentframe()
        while frame is not None:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler) and self in handler.callbacks:
                handler.callbacks.remove(self)
                handler.callbacks.insert(0, self)
                return
            frame = frame.f_back


def _release(synchronizer: WeightSynchronizer, watch: StepWatch) -> None:
    watch.close()
    synchronizer.close()
