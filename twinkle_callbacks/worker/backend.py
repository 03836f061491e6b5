"""The weight-transfer backend `twinkle`, one in each vLLM worker.

    init_transfer_engine   check the invitation, join the engine's group in the background
    start_weight_update    open a session
    update_weights         receive: start receiving in the background; generation goes on
       (background)        receive all, stage, compare digests, post `Staged`
    update_weights         check: names and shapes against the loader, post `Checked`
    finish_weight_update   commit, post `Committed`

Once a session is open nothing here raises to vLLM. Its executor stops reading replies at the first rank that fails,
which shifts the replies of tensor-parallel ranks by one for good, so failures travel in receipts instead and the model
is left alone. The model is touched in `commit` only, so a server answers with the old weights or the new, never both.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from twinkle_callbacks import auth
from twinkle_callbacks.buckets.frames import Failure
from twinkle_callbacks.engines import get_engine
from twinkle_callbacks.engines.base import CheckpointEngine
from twinkle_callbacks.errors import EngineError, TwinkleError
from twinkle_callbacks.worker.check import LoadCheck
from twinkle_callbacks.worker.commit import commit
from twinkle_callbacks.worker.messages import ABORT, CHECK, RECEIVE, Checked, Committed, Joined, JoinRequest, Staged
from twinkle_callbacks.worker.stage import Stage

logger = logging.getLogger("vllm.twinkle_callbacks")  # a child of vLLM's logger, so that its configuration shows it


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of `init_weight_transfer_engine`: a signed `JoinRequest`."""

    request: dict[str, Any] = field(default_factory=dict)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of `update_weights`: start receiving push number `push`, check it, or abort the open session."""

    action: str = RECEIVE
    push: int = 0


class TwinkleWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's end of a synchronizer. vLLM calls all methods on the worker's main thread."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._engine: CheckpointEngine | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._timeout_s = 0.0
        self._verify = True
        self._in_update = False
        self._aborted = False
        self._intact = True
        self._push = 0
        self._staged: Future[Stage] | None = None
        self._check = LoadCheck(vllm_config)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Leaves an earlier group, if any, and joins the one the trainer invites to.

        Raises:
            AuthenticationError, ConfigError: on the last rank only, and then no rank has left its group.
        """
        failure: TwinkleError | None = None
        request = None
        try:
            request = JoinRequest.opened(init_info.request, auth.load_token())
            engine = get_engine(request.engine)(
                bucket_size=request.bucket_size, timeout=request.timeout_s, verify=False
            )
        except TwinkleError as error:  # anything else would leave the other ranks waiting in `_agree`
            failure = error
        _agree(failure)
        if request is None or failure is not None:
            return  # another rank has raised for all
        self.shutdown()
        parallel = self.parallel_config
        rank = request.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._timeout_s, self._verify = request.timeout_s, request.verify
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="twinkle-worker")
        self._thread.submit(self._join, engine, request, rank)

    def _join(self, engine: CheckpointEngine, request: JoinRequest, rank: int) -> None:
        try:
            engine.prepare()
            engine.init_process_group(rank, request.world_size, master_metadata=request.metadata)
            engine.post_receipt("joined", msgspec.msgpack.encode(self._describe()))
        except Exception:  # nobody waits for this thread, and the trainer only sees that this rank does not come
            logger.exception("could not join the trainer as rank %d", rank)

    def _describe(self) -> Joined:
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
            enable_lora=self.vllm_config.lora_config is not None,
            quantization=None if config.quantization is None else str(config.quantization),
            in_update=self._in_update,
            vllm=vllm.__version__,
            intact=self._intact,
        )

    def start_weight_update(self) -> None:
        self._in_update, self._aborted = True, False
        self._staged = None

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Starts receiving and returns at once, or checks; what goes wrong is told in the receipts."""
        self._aborted = update_info.action == ABORT
        if self._aborted:
            self._staged = None
        elif update_info.action == CHECK:
            self._report_check()
        elif self._engine is None or self._thread is None:
            logger.error("update_weights came before init_weight_transfer_engine; there is nobody to receive from")
        else:
            self._push = update_info.push
            self._staged = self._thread.submit(self._receive, self._engine, update_info.push)

    def _receive(self, engine: CheckpointEngine, push: int) -> Stage:
        stage = Stage(verify=self._verify)
        try:
            asyncio.run(_fill(stage, engine))
            digest = stage.verify(engine.sent_digests)
        except Exception as error:
            logger.error("push %d was not received, the old weights go on serving: %s", push, error)
            _post(engine, f"staged-{push}", Staged(failure=Failure.of(error)))
            raise
        _post(engine, f"staged-{push}", Staged(len(stage.tensors), digest))
        return stage

    def _report_check(self) -> None:
        if self._staged is None or self._engine is None:
            logger.error("there is nothing to check: no push is under way")
            return
        _, failure = self._checked(self._staged)
        if failure is not None:
            logger.error("push %d does not fit, the old weights go on serving: %s", self._push, failure)
        checked = Checked(None if failure is None else Failure.of(failure))
        _post(self._engine, f"checked-{self._push}", checked)

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
        if not _all_ranks_can(failure is None):
            cause = failure or EngineError("another tensor-parallel rank cannot commit")
            self._report(Committed(failure=Failure.of(cause), intact=self._intact))
            return
        self._intact = False
        try:
            commit(self.model, self.model_config, stage.tensors.items(), self.device)
        except Exception as error:  # told to the trainer, whatever it is: see the module docstring
            logger.exception(
                "push %d failed in the commit; this worker must not generate before the next push", self._push
            )
            self._report(Committed(failure=Failure.of(error), intact=False))
        else:
            self._intact = True
            self._report(Committed(time.perf_counter() - began))

    def _checked(self, staged: Future[Stage]) -> tuple[Stage, Exception | None]:
        try:
            stage = staged.result(self._timeout_s)
            self._check(stage.tensors)
        except Exception as error:  # told to the trainer, whatever it is: see the module docstring
            return Stage(verify=False), error
        return stage, None

    def _report(self, committed: Committed) -> None:
        if committed.failure is None:
            logger.info("push %d: committed in %.3f s", self._push, committed.seconds)
        else:
            logger.error("push %d was not committed: %s", self._push, committed.failure.message)
        if self._engine is not None:
            _post(self._engine, f"committed-{self._push}", committed)

    @staticmethod
    def trainer_send_weights(*_: Any, **__: Any) -> None:
        """Stands in for the sender that vLLM 0.26 asks every backend for; ours is `WeightSynchronizer`.

        Raises:
            EngineError: always.
        """
        raise EngineError("this backend receives only; send with twinkle_callbacks.WeightSynchronizer")

    def shutdown(self) -> None:
        """Leaves the engine's group without waiting for it; the model stays as it is."""
        engine, self._engine = self._engine, None
        thread, self._thread = self._thread, None
        self._staged = None
        if engine is not None:
            engine.finalize()
        if thread is not None:
            thread.shutdown(wait=False, cancel_futures=True)


async def _fill(stage: Stage, engine: CheckpointEngine) -> None:
    async for name, tensor in engine.receive_weights():
        stage.add(name, tensor)


def _post(engine: CheckpointEngine, topic: str, message: Any) -> None:
    try:
        engine.post_receipt(topic, msgspec.msgpack.encode(message))
    except EngineError as error:
        logger.warning("could not tell the trainer %s: %s", topic, error)


def _all_ranks_can(this_rank_can: bool) -> bool:
    """Whether every tensor- and pipeline-parallel rank can go on. A collective: every rank calls it once a step."""
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return this_rank_can
    failed = torch.tensor([0 if this_rank_can else 1])
    torch.distributed.all_reduce(failed, group=group.cpu_group)
    return int(failed) == 0


def _agree(failure: TwinkleError | None) -> None:
    """Raises on the last rank if any rank failed (see the module docstring for why only there)."""
    if not _all_ranks_can(failure is None) and _is_last_rank():
        raise failure or EngineError("another tensor-parallel rank refused the invitation")


def _raise_if_alone(error: EngineError) -> None:
    from vllm.distributed.parallel_state import get_world_group

    if get_world_group().world_size == 1:
        raise error
    logger.error("%s", error)


def _is_last_rank() -> bool:
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    return bool(group.rank_in_group == group.world_size - 1)
