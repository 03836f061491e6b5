"""What `bench_gpu.py` measures over NCCL: a sender and a receiver on one GPU, which NCCL takes for two hosts."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import secrets
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.bench_engine import drain, shapes, timed

WARM_ROUNDS = 2
TIMEOUT_S = 60.0
MODELS = 2  # of 1 GiB each
VERIFY = {"nccl": True, "nccl, verify off": False}
# NCCL refuses two ranks on one GPU of one host. As hosts of their own they are linked by sockets, fastest like this.
HOST_ENV = {"NCCL_HOSTID": "host{rank}", "NCCL_SOCKET_NTHREADS": "8", "NCCL_NSOCKS_PERTHREAD": "4"}


def sizes() -> list[int]:
    return shapes("1GiB") * MODELS


class End:
    """One process's ends of both engines and of the raw group."""

    def __init__(self, rank: int, link: Connection, bucket_bytes: int, token: str) -> None:
        import torch

        os.environ |= {name: value.format(rank=rank) for name, value in HOST_ENV.items()}  # before NCCL starts
        torch.cuda.set_device(0)
        self._rank, self._link, self._bucket_bytes, self._token = rank, link, bucket_bytes, token
        self._engines: dict[str, Any] = {}
        self.tensors = {
            f"t{i}": torch.full((nbytes,), i % 251, dtype=torch.uint8, device="cuda")
            for i, nbytes in enumerate(sizes() if rank == 0 else [])
        }
        pieces = range(0, sum(sizes()), bucket_bytes)
        self._buffers = [
            torch.zeros(min(bucket_bytes, sum(sizes()) - start), dtype=torch.uint8, device="cuda") for start in pieces
        ]
        self._raw = self._raw_group()
        self.carry("raw")  # takes the memory that NCCL takes
        torch.cuda.synchronize()
        self.peaks_bytes = [self._first_use(name) for name in VERIFY]

    def _first_use(self, name: str) -> int:
        """Makes an engine and uses it once; returns what it takes of torch's memory in this process."""
        import torch

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._engines[name] = self._joined(VERIFY[name])
        self.carry(name)
        return torch.cuda.max_memory_allocated() - before

    def carry(self, what: str) -> None:
        """Sends or receives everything, until it is there."""
        import torch

        if what == "raw":
            options = torch.distributed.BroadcastOptions()
            options.rootRank = options.rootTensor = 0
            for work in [self._raw.broadcast([buffer], options) for buffer in self._buffers]:
                work.wait()
        elif self._rank == 0:
            asyncio.run(self._engines[what].send_weights(self.tensors.items()))
        else:
            count = asyncio.run(drain(self._engines[what]))
            assert count == len(sizes()), f"{count} tensors came"
        torch.cuda.synchronize()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.finalize()

    def _raw_group(self) -> Any:
        from torch.distributed import PrefixStore, ProcessGroupNCCL, TCPStore

        limit = timedelta(seconds=TIMEOUT_S)
        port = 0 if self._rank == 0 else self._link.recv()
        self._store = TCPStore("127.0.0.1", port, None, self._rank == 0, limit, wait_for_workers=False)
        if self._rank == 0:
            self._link.send(self._store.port)
        return ProcessGroupNCCL(PrefixStore("raw", self._store), self._rank, 2)

    def _joined(self, verify: bool) -> Any:
        from twinkle_callbacks.engines import get_engine

        engine = get_engine("nccl")(self._bucket_bytes, TIMEOUT_S, token=self._token, verify=verify)
        engine.is_master = self._rank == 0
        metadata = engine.prepare()
        if self._rank == 0:
            self._link.send(metadata)
        else:
            metadata = self._link.recv()
        engine.init_process_group(self._rank, 2, master_metadata=metadata)
        return engine


def receiver(link: Connection, bucket_bytes: int, token: str) -> None:
    end = End(1, link, bucket_bytes, token)
    while (order := link.recv()[0]) != "stop":
        link.send("ready")
        link.recv()
        end.carry(order)
        link.send("done")
    link.send(max(end.peaks_bytes))
    end.close()


def run_nccl(bucket_bytes: int, rounds: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    token = secrets.token_urlsafe(32)
    process = context.Process(target=receiver, args=(theirs, bucket_bytes, token), daemon=True)
    process.start()
    theirs.close()  # so that its end is noticed
    end = End(0, ours, bucket_bytes, token)
    series: dict[str, list[float]] = {name: [] for name in ("raw", *VERIFY)}
    for round_ in range(WARM_ROUNDS + rounds):
        for name in series:
            seconds = timed([ours], name, partial(end.carry, name))
            if round_ >= WARM_ROUNDS:
                series[name].append(seconds)
    ours.send(("stop",))
    peaks = max(end.peaks_bytes), ours.recv()
    end.close()
    process.join(TIMEOUT_S)
    return entries(series, peaks, bucket_bytes)


def entries(series: dict[str, list[float]], peaks: tuple[int, int], bucket_bytes: int) -> list[dict[str, Any]]:
    from benchmarks.common import case

    return [
        case(
            name,
            series[name],
            f"raw NCCL broadcasts of {bucket_bytes >> 20} MiB",
            series["raw"],
            sum(sizes()),
            verify=VERIFY[name],
            peak_extra_mb=max(peaks) / 1e6,
            sender_peak_extra_mb=peaks[0] / 1e6,
            receiver_peak_extra_mb=peaks[1] / 1e6,
            allowed_extra_mb=2 * bucket_bytes / 1e6,
            bucket_size_mb=bucket_bytes >> 20,
            tensors=len(sizes()),
        )
        for name in VERIFY
    ]
