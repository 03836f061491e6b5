"""The weight-transfer backend `twinkle`, one in each vLLM worker.

    init_transfer_engine   check the invitation, join the engine's group in the background; or an adapter's call
    start_weight_update    open a session
    update_weights         receive: start receiving in the background; generation goes on
       (background)        receive all, stage, compare digests, post `Staged`
    update_weights         check: names and shapes against the loader, post `Checked`
    finish_weight_update   commit, post `Committed`

Once a session is open nothing here raises to vLLM. Its executor stops reading replies at the first rank that fails,
which shifts the replies of tensor-parallel ranks by one for good, so failures travel in receipts instead and the model
is left alone. The model is touched in `commit` only, so a server answers with the old weights or the new, never both.

Adapters that travel alone need no session: see `adapter_links.py`.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from twinkle_callbacks import auth
from twinkle_callbacks.buckets.device_digest import tensor_digest
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.engines.whereabouts import Whereabouts
from twinkle_callbacks.errors import ConfigError, EngineError, RolloutError, TwinkleError, text_of
from twinkle_callbacks.worker.adapter_links import AdapterLinks
from twinkle_callbacks.worker.adapters import AdapterStore
from twinkle_callbacks.worker.base_digests import BaseDigests
from twinkle_callbacks.worker.check import LoadCheck, shadow_model
from twinkle_callbacks.worker.commit import Committer
from twinkle_callbacks.worker.copies import Tensors
from twinkle_callbacks.worker.link import Link
from twinkle_callbacks.worker.messages import (
    ABORT,
    CHECK,
    LEAVE,
    RECEIVE,
    AdapterCall,
    Checked,
    Committed,
    Joined,
    JoinRequest,
    LoRARuns,
)
from twinkle_callbacks.worker.quantization import obstructive
from twinkle_callbacks.worker.ranks import agree, all_ranks_can
from twinkle_callbacks.worker.recorded import Layouts, layouts_of
from twinkle_callbacks.worker.sleep import CACHE, WEIGHTS, require_awake
from twinkle_callbacks.worker.stage import Stage

logger = logging.getLogger("vllm.twinkle_callbacks")  # a child of vLLM's logger, so that its configuration shows it


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of `init_weight_transfer_engine`: a signed `JoinRequest`, or a signed `AdapterCall`.

    `unreadable` says why it is neither, empty if it may be one.
    """

    request: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    unreadable: str = ""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of `update_weights`: start receiving push number `push`, check it, or abort the open session.

    `cache_may_sleep` says that the caller wakes the cache after the commit. `unreadable` says why it is none of these,
    empty if it may be one.
    """

    action: str = RECEIVE
    push: int = 0
    cache_may_sleep: bool = False
    unreadable: str = ""


class TwinkleWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's end of a synchronizer. vLLM calls all methods on the worker's main thread."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._link: Link | None = None
        self._in_update = False
        self._aborted = False
        self._intact = True
        self._push = 0
        self._awake: tuple[str, ...] = (WEIGHTS, CACHE)  # what a commit needs
        self._staged: Future[Stage] | None = None
        self._check = LoadCheck(vllm_config)
        self._taken: Layouts = {}  # of the last commit: what comes alike fits
        self._shown: Tensors = {}  # what they are of, if it was the trainer's own: kept copies would take memory
        shadow = partial(shadow_model, vllm_config)
        self._committer = Committer(model, self.model_config, device, shadow=shadow, digest=tensor_digest)
        self._base = BaseDigests(vllm_config, model)
        parallel = vllm_config.parallel_config
        # vLLM tells replicas of a model without experts that they are alone, but not that they are the first.
        replicated = parallel.data_parallel_size > 1 or parallel.data_parallel_index > 0
        self._adapters = AdapterLinks(AdapterStore.of(model), self._base, replicated=replicated)

    def parse_init_info(self, init_dict: Any) -> InitInfo:
        """Reads any body, for what vLLM's own parsing raises would be raised on every rank: see `ranks.py`."""
        try:
            info: InitInfo = super().parse_init_info(init_dict)
        except (TypeError, ValueError) as error:
            info = InitInfo(unreadable=str(error.__cause__ or error))
        return info

    def parse_update_info(self, update_dict: Any) -> UpdateInfo:
        """Reads any body, as `parse_init_info`."""
        try:
            info: UpdateInfo = super().parse_update_info(update_dict)
        except (TypeError, ValueError) as error:
            info = UpdateInfo(unreadable=str(error.__cause__ or error))
        return info

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Leaves an earlier group, if any, and joins the one the trainer invites to; or does what a call asks.

        Raises:
            TwinkleError: on the last rank only, and then no rank has left its group.
        """
        failure: TwinkleError | None = None
        link: Link | None = None
        try:
            token = auth.load_token()
            if init_info.unreadable:
                raise ConfigError(
                    f"the body is neither an invitation nor a call of this version of twinkle_callbacks "
                    f"({init_info.unreadable}); install the same version beside the trainer and beside vLLM"
                )
            if init_info.call:
                self._do(AdapterCall.opened(init_info.call, token))
            else:
                link = self._admitted(JoinRequest.opened(init_info.request, token), token)
        except TwinkleError as error:
            failure = error
        except Exception as error:  # which would leave the other ranks waiting in `agree`
            logger.exception("unexpected error")
            failure = RolloutError(f"{type(error).__name__}: {text_of(error)}")
        agree(failure)
        if link is None or failure is not None:
            return  # another rank has raised for all, or it was a call
        request = link.request
        parallel = self.parallel_config
        rank = request.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        if request.adapter is not None:
            self._adapters.join(link, rank, self._describe)
            return
        self._leave()
        self._link = link
        link.join(rank, lambda: self._describe(self._adapters.runs()))

    def _admitted(self, request: JoinRequest, token: str) -> Link:
        if request.adapter is not None:
            self._adapters.check(request)
        else:
            self._adapters.check_base(request.base_of)
        return Link(request, token)

    def _do(self, call: AdapterCall) -> None:
        if call.adapter:
            self._adapters.call(call)
        elif call.action == LEAVE and self._link is not None:
            if self._link.request.client == call.client:
                self._leave()
            else:
                logger.info("a trainer left late; another one has come since")

    def _describe(self, lora: LoRARuns | None) -> Joined:
        import vllm

        config = self.vllm_config.model_config
        text = config.hf_text_config
        return Joined(
            model=str(config.model),
            architecture=type(self.model).__name__,
            hidden_size=int(config.get_hidden_size()),
            layers=int(getattr(text, "num_hidden_layers", 0)),
            vocab_size=int(config.get_vocab_size()),
            dtype=str(config.dtype).removeprefix("torch."),
            lora=lora,
            quantization=obstructive(self.vllm_config),
            in_update=self._in_update,
            vllm=vllm.__version__,
            intact=self._intact,
            whereabouts=Whereabouts.of_this_process(self.device.index),
        )

    def start_weight_update(self) -> None:
        self._in_update, self._aborted = True, False
        self._staged = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's own, but does not wait for all of the GPU, where a broadcast may be pending that the sender begins
        only after this has returned. Commits wait for what they started.
        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Starts receiving and returns at once, or checks; what goes wrong is told in the receipts."""
        if update_info.unreadable:
            logger.error("update_weights came with a body that cannot be read: %s", update_info.unreadable)
            return
        self._aborted = update_info.action == ABORT
        if self._aborted:
            self._staged = None
        elif update_info.action == CHECK:
            self._report_check()
        elif self._link is None:
            logger.error("update_weights came before init_weight_transfer_engine; there is nobody to receive from")
        else:
            self._push = update_info.push
            self._awake = (WEIGHTS,) if update_info.cache_may_sleep else (WEIGHTS, CACHE)
            self._staged = self._link.receive(update_info.push, self._keep)

    def _keep(self, stage: Stage) -> str:
        require_awake(*self._awake)
        with_lora = self.vllm_config.lora_config is not None
        if with_lora:
            stage.digest_each()  # here, since nothing waits for this thread
        layouts = self._taken if stage.shows(self._shown) else layouts_of(stage.tensors)
        alike = layouts == self._taken
        stage.layouts = self._taken if alike else layouts  # the same object, which spares a comparison in the commit
        # Adapters may have come since.
        stage.fits = alike and not with_lora and not self._check.depends_on_values
        return self._base.id

    def _report_check(self) -> None:
        if self._staged is None or self._link is None:
            logger.error("there is nothing to check: no push is under way")
            return
        _, failure = self._checked(self._staged)
        if failure is not None:
            logger.error("push %d does not fit, the old weights go on serving: %s", self._push, failure)
        checked = Checked(None if failure is None else Failure.of(failure))
        self._link.post(f"checked-{self._push}", checked)

    def finish_weight_update(self) -> None:
        """Commits what is staged, unless it was aborted or failed; told in the `Committed` receipt.

        Raises:
            EngineError: nothing was sent since the start, so whoever calls this would set a version without weights.
        """
        staged, self._staged = self._staged, None
        if staged is None and not self._aborted:
            _raise_if_alone(EngineError("nothing was received since start_weight_update; there is nothing to finish"))
        self._in_update = False
        if staged is None:
            return
        began = time.perf_counter()
        stage, failure = self._checked(staged)
        if not all_ranks_can(failure is None):
            cause = failure or EngineError("another tensor-parallel rank cannot commit")
            self._report(Committed(failure=Failure.of(cause), intact=self._intact))
            return
        self._intact = False
        self._base.begin_commit()
        try:
            self._committer.commit(stage.tensors, stage.layouts)
        except Exception as error:  # told to the trainer, whatever it is: see the module docstring
            logger.exception(
                "push %d failed in the commit; this worker must not generate before the next push", self._push
            )
            self._report(Committed(failure=Failure.of(error), intact=False))
        else:
            self._intact = True
            self._taken, self._shown = stage.layouts, stage.tensors if stage.is_shown else {}
            self._base.committed(stage.digests)
            self._report(Committed(time.perf_counter() - began))

    def _checked(self, staged: Future[Stage]) -> tuple[Stage, Exception | None]:
        try:
            if self._link is None:
                raise EngineError("the trainer has left")
            stage = staged.result(self._link.request.timeout_s)
            require_awake(*self._awake)
            if not stage.fits:
                self._check(stage.tensors)
                stage.fits = True
            self._adapters.check_base(self._link.request.base_of)  # others may have come since it was admitted
        except Exception as error:  # told to the trainer, whatever it is: see the module docstring
            return Stage(verify=False), error
        return stage, None

    def _report(self, committed: Committed) -> None:
        if committed.failure is None:
            logger.info("push %d: committed in %.3f s", self._push, committed.seconds)
        else:
            logger.error("push %d was not committed: %s", self._push, committed.failure.message)
        if self._link is not None:
            self._link.post(f"committed-{self._push}", committed)

    @staticmethod
    def trainer_send_weights(*_: Any, **__: Any) -> None:
        """Stands in for the sender that vLLM 0.26 asks every backend for; ours is `WeightSynchronizer`.

        Raises:
            EngineError: always.
        """
        raise EngineError("this backend receives only; send with twinkle_callbacks.WeightSynchronizer")

    def shutdown(self) -> None:
        """Leaves every group without waiting for it; the model and its adapters stay as they are."""
        self._leave()
        self._adapters.close()

    def _leave(self) -> None:
        link, self._link = self._link, None
        self._staged = None
        self._shown = {}  # which it saw over that link
        if link is not None:
            link.close()


def _raise_if_alone(error: EngineError) -> None:
    from vllm.distributed.parallel_state import get_world_group

    if get_world_group().world_size == 1:
        raise error
    logger.error("%s", error)
