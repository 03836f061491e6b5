"""One stock vLLM server for the whole session; in-process engines are made by the tests that need them."""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vllm is imported: in-process engines are what is tested
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes import arithmetic
from tests.tiny_models import build
from tests.vllm.adapters import Reference
from tests.vllm.engines import release
from twinkle_callbacks.cli.serve import serving

SERVER_FLAGS = (
    *("--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "64", "--max-model-len", "64"),
    *("--dtype", "float32", "--generation-config", "vllm", "--block-size", "32"),
)
LORA_FLAGS = ("--max-model-len", "128", "--enable-lora", "--max-loras", "3", "--max-lora-rank", "8")


@dataclass(frozen=True)
class Server:
    """A running server, and the folder of the tiny Qwen3 (char-level tokenizer) that it was started with."""

    url: str
    policy_dir: Path


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("policy")
    build("qwen3", seed=0).save_pretrained(folder)
    arithmetic.tokenizer().save_pretrained(folder)
    with serving(str(folder), vllm_args=SERVER_FLAGS, ready_timeout_s=300, log_path=folder / "server.log") as server:
        yield Server(server.url, folder)


@pytest.fixture(scope="session")
def lora_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that serves adapters on the policy of seed 0."""
    folder = tmp_path_factory.mktemp("base")
    build("qwen3", seed=0).save_pretrained(folder)
    arithmetic.tokenizer().save_pretrained(folder)
    flags = (*SERVER_FLAGS, *LORA_FLAGS)
    with serving(
        str(folder),
        vllm_args=flags,
        tenant_folders=[tmp_path_factory.getbasetemp()],
        ready_timeout_s=300,
        log_path=folder / "server.log",
    ) as server:
        yield Server(server.url, folder)


@pytest.fixture(scope="module")
def reference(lora_server: Server) -> Iterator[Reference]:
    """A vLLM beside `lora_server` that loads each adapter from its files."""
    yield Reference(lora_server.policy_dir)
    release()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it imports warn in plenty; our own warnings stay errors."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(r"ignore:::(?!twinkle_callbacks|tests|recipes)"))
