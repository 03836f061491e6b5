"""Agreement of the tensor- and pipeline-parallel ranks that run one model: all go on, or none does.

vLLM's executor stops reading replies at the first rank that fails, which shifts the replies of the other ranks by one
for good. So an error is raised on the last rank only, whichever rank it happened on.
"""

from __future__ import annotations

from typing import Any

import torch

from twinkle_callbacks.errors import EngineError


def all_ranks_can(this_rank_can: bool) -> bool:
    """Whether every rank of this replica can go on. A collective: every rank calls it once a step, on its main thread.

    The replicas of data parallelism are not asked. Their calls come at different times, between forward passes in
    which they wait for each other.
    """
    can = this_rank_can
    for group in _groups():
        if group.world_size > 1:
            failed = torch.tensor([0 if can else 1])
            torch.distributed.all_reduce(failed, group=group.cpu_group)
            can = int(failed) == 0
    return can


def raise_on_last_rank(error: Exception) -> None:
    """Raises the error on the last rank and returns on the others; for use once `all_ranks_can` said no."""
    if all(group.rank_in_group == group.world_size - 1 for group in _groups()):
        raise error


def agree(failure: Exception | None) -> None:
    """Raises on the last rank if any rank failed. A collective, like `all_ranks_can`.

    Raises:
        Exception: the last rank's own failure, or an `EngineError` that speaks for another rank.
    """
    if not all_ranks_can(failure is None):
        raise_on_last_rank(failure or EngineError("another tensor-parallel rank failed; its log says why"))


def _groups() -> list[Any]:
    """The groups along whose axes this replica's ranks are laid out."""
    from vllm.distributed import parallel_state

    groups = [parallel_state.get_tp_group(), parallel_state.get_pp_group()]
    if getattr(parallel_state, "_PCP", None) is not None:  # prefill context parallelism, in newer versions
        groups.append(parallel_state.get_pcp_group())
    return groups
