"""What the engines of GPUs refuse before they ask CUDA or NCCL, told from where each rank is; and how NCCL is left."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from tests.unit.engine_loopback import LoopbackBackend, joined
from twinkle_callbacks.engines.ipc import _refuse_other_gpus
from twinkle_callbacks.engines.nccl import NCCLBackend, _check_peers
from twinkle_callbacks.engines.whereabouts import Whereabouts, exchange
from twinkle_callbacks.errors import ConfigError, DeadlineError, EngineError


def rank_on(gpu: str, host: str = "here", nccl: int = 22809) -> Whereabouts:
    return Whereabouts(gpu=gpu, host=host, nccl=nccl)


def test_nccl_takes_ranks_on_gpus_of_their_own() -> None:
    _check_peers([rank_on("A"), rank_on("B"), rank_on("A", host="there"), rank_on("C", nccl=22801)], 0)


def test_nccl_refuses_two_ranks_on_one_gpu_and_advises_ipc() -> None:
    with pytest.raises(ConfigError, match=re.escape("ranks 1 and 2 are on the same GPU (B)") + ".*engine='ipc'"):
        _check_peers([rank_on("A"), rank_on("B"), rank_on("B")], 0)


def test_nccl_refuses_other_versions_and_names_both() -> None:
    with pytest.raises(ConfigError, match=re.escape("rank 1 runs NCCL 2.27.5, rank 0 2.28.9") + ".*same torch"):
        _check_peers([rank_on("A"), rank_on("B", nccl=22705)], 0)


def test_ipc_refuses_another_gpu_and_advises_nccl() -> None:
    _refuse_other_gpus([rank_on("A"), rank_on("A")])
    with pytest.raises(ConfigError, match=r"rank 2 is on GPU B, the master on A.*engine='nccl'"):
        _refuse_other_gpus([rank_on("A"), rank_on("A"), rank_on("B")])


def test_a_rank_that_does_not_tell_where_it_is_is_named() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(DeadlineError, match="rank 1 did not tell where it is"):
        exchange(store, 0, 2)


def test_all_ranks_hear_where_the_others_are() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: exchange(store, rank, 2), (1, 0)))
    assert found == [[Whereabouts.of_this_process()] * 2] * 2


def test_a_call_of_nccl_that_waits_for_a_peer_ends_when_its_side_leaves() -> None:
    backend = NCCLBackend.__new__(NCCLBackend)  # its own start needs a GPU
    backend._is_left, backend._timeout_s, backend._communicator = False, 60.0, ctypes.c_void_p()
    with ThreadPoolExecutor(1) as engine:
        waiting = engine.submit(backend.wait_until, lambda: False, "end a broadcast")
        backend.interrupt()
        with pytest.raises(EngineError, match="this side left while NCCL was to end a broadcast"):
            waiting.result(10)


def test_finalize_interrupts_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted: list[int] = []
    monkeypatch.setattr(LoopbackBackend, "interrupt", lambda self: interrupted.append(self.rank))
    with joined():
        assert interrupted == []
    assert interrupted == [0, 1]
