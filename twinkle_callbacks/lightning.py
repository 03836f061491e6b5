"""Weight sync for `lightning.pytorch.Trainer`: a push after each optimizer step that changed the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from typing_extensions import override

from twinkle_callbacks.config import DEFAULT_ROLLOUT, SyncOptions, SyncSettings
from twinkle_callbacks.errors import MissingExtraError
from twinkle_callbacks.report import SyncReport
from twinkle_callbacks.rollouts import Rollout
from twinkle_callbacks.schedule import PushSchedule
from twinkle_callbacks.sources.names import select
from twinkle_callbacks.steps import StepWatch
from twinkle_callbacks.sync import WeightSynchronizer

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise MissingExtraError(
        f"twinkle_callbacks.lightning cannot import lightning.pytorch ({error}); "
        "install it with: pip install 'twinkle_callbacks[lightning]'"
    ) from error


class WeightSyncCallback(pl.Callback):
    """Keeps vLLM rollouts on the newest weights of the module that a `lightning.pytorch.Trainer` fits.

    The first push is at the start of training, also after a resume; then one after each batch in which an optimizer
    step changed the policy. Steps that AMP skipped, batches that only accumulate, and batches without a loss push
    nothing; all steps of one batch, as manual optimization can make them, count as one. The weight version is that
    count of real steps, and continues from the checkpoint, or from `global_step` where that was written without it.

    Runs on every trainer rank, and only in `fit`. After training, and on an exception, the rollouts keep the weights
    of the last push; with `every_n_steps` above 1 these can be older than the final ones.

    Metrics `weight_sync/*` of each push go to the trainer's loggers from rank 0.

    Args:
        rollouts: URL of a vLLM server, or several; `HTTPRollout` and `LocalRollout` objects too.
        engine: data plane, `nccl`, `hccl`, `gloo`, `ipc` or `shm`; `auto` looks at devices and hosts.
        merge_and_sync: True merges LoRA and syncs the whole model, False syncs the base once and then the adapter.
        adapter_name: name under which the rollouts serve the adapter.
        every_n_steps: real optimizer steps between two pushes.
        bucket_size_mb: size of a wire bucket in MiB; two of them are used on either side.
        dtype: cast the weights to this type before they are gathered; None sends what the server runs.
        pause_mode: what becomes of requests in flight, `keep`, `wait` or `abort`.
        stale_kv: what becomes of cached prefixes, `recompute` or `keep`.
        overlap: send while the next forward and backward run.
        verify: `off`, `digest` of every tensor at both ends, or `canary` for a logprob check too.
        on_error: `raise`, `drop_replica` or `skip` when a push fails.
        timeout_s: deadline of every single operation, in seconds.
        token: secret shared with the servers. Prefer the environment variable TWINKLE_TOKEN or the token file, as
            LightningCLI saves its arguments.
        module: path of the policy inside the LightningModule, such as `policy`; empty for the whole module.

    Attributes:
        settings: the settings, validated.
        report: receipt of the last push, None before the first.

    Raises:
        ConfigError: a setting is wrong; raised when the callback is made.
        SyncError: a push failed; raised from the training loop unless `on_error` is `skip`.
    """

    def __init__(
        self,
        rollouts: str | Rollout | Sequence[str | Rollout] = DEFAULT_ROLLOUT,
        *,
        engine: str = "auto",
        merge_and_sync: bool = True,
        adapter_name: str | None = None,
        every_n_steps: int = 1,
        bucket_size_mb: int = 512,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        pause_mode: Literal["keep", "wait", "abort"] = "keep",
        stale_kv: Literal["recompute", "keep"] = "recompute",
        overlap: bool = False,
        verify: Literal["off", "digest", "canary"] = "digest",
        on_error: Literal["raise", "drop_replica", "skip"] = "raise",
        timeout_s: float = 300.0,
        token: str | None = None,
        module: str = "",
    ) -> None:
        super().__init__()
        self._options: SyncOptions = {
            "rollouts": rollouts,
            "engine": engine,
            "merge_and_sync": merge_and_sync,
            "adapter_name": adapter_name,
            "every_n_steps": every_n_steps,
            "bucket_size_mb": bucket_size_mb,
            "dtype": dtype,
            "pause_mode": pause_mode,
            "stale_kv": stale_kv,
            "overlap": overlap,
            "verify": verify,
            "on_error": on_error,
            "timeout_s": timeout_s,
            "token": token,
            "module": module,
        }
        self.settings = SyncSettings.parse(self._options)
        self.report: SyncReport | None = None
        self._schedule = PushSchedule(every_n_steps)
        self._synchronizer: WeightSynchronizer | None = None
        self._watch: StepWatch | None = None

    @property
    @override
    def state_key(self) -> str:
        # Without the rollouts: a resumed run often finds its servers at other addresses.
        key: str = self._generate_state_key(module=self.settings.module, adapter_name=self.settings.adapter_name)
        return key

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._schedule.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._schedule.load_state_dict(state_dict)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in `setup`: sharded strategies restore the checkpoint after it.
        # With what the strategy wrapped around it: under FSDP1, parameters that have no unit of their own lie there.
        model = pl_module if trainer.model is None else trainer.model
        self._synchronizer = WeightSynchronizer(model, **self._options)
        if self._schedule.version == 0 and trainer.global_step:  # a checkpoint of a run without this callback
            self._schedule.load_state_dict({"steps": trainer.global_step})
        policy = select(model, self.settings.module)
        self._watch = StepWatch(policy.parameters(), trainer.optimizers)
        self._log(trainer, self._synchronizer.open(self._schedule.version))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._push_if_changed(trainer)  # steps that the module made between two batches, in hooks of its own

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._push_if_changed(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._push_if_changed(trainer)
        self._close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()  # Lightning skips `teardown` after an exception

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _push_if_changed(self, trainer: pl.Trainer) -> None:
        if self._synchronizer is None or self._watch is None or not self._watch.take():
            return
        if self._schedule.record_step():
            self._log(trainer, self._synchronizer.push(self._schedule.version))

    def _log(self, trainer: pl.Trainer, report: SyncReport) -> None:
        self.report = report
        # The x axis of Lightning's own callbacks: unlike `global_step` it also advances with raw optimizers.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(report.metrics(), step=step)  # on rank 0 only, by Lightning's own decorator

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._synchronizer is not None:
            self._synchronizer.close()
        self._watch = self._synchronizer = None
