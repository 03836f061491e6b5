"""`twinkle-callbacks serve` and `serving()`, with a fake vLLM first on the path of every process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from twinkle_callbacks.cli.serve import serving
from twinkle_callbacks.errors import AuthenticationError, ConfigError, DeadlineError, RolloutError

FAKE = Path(__file__).parent / "fake_vllm"
TOKEN = "a token of enough length"
WAIT_S = 30.0


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serving` asks importlib for vLLM in this process and starts it in another: both find the fake."""
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(FAKE))
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), str(root)]))
    monkeypatch.setenv("TWINKLE_TOKEN", TOKEN)


def get(url: str, path: str) -> Any:
    return httpx.get(url + path, trust_env=False).json()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.02)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not collected by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_block_sees_a_server_that_is_ready_and_leaves_nothing_behind(tmp_path: Path) -> None:
    log = tmp_path / "new folder" / "server.log"
    with serving("some/model", log_path=log, vllm_args=["--fake-child"]) as server:
        assert server.log_path == log
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
        started = get(server.url, "/started")
        assert started["pid"] == server.pid
        assert alive(started["child"])

    assert not alive(started["pid"])
    assert eventually(lambda: not alive(started["child"]))
    assert "fake vLLM starts" in log.read_text()


def test_vllm_is_started_with_everything_that_trainers_need() -> None:
    with serving("some/model", vllm_args=["--enforce-eager", "--max-num-seqs", "8"]) as server:
        started = get(server.url, "/started")

    port = server.url.rpartition(":")[2]
    assert started["argv"] == [
        *("--model", "some/model", "--enforce-eager", "--max-num-seqs", "8", "--host", "127.0.0.1", "--port", port),
        *("--weight-transfer-config", '{"backend": "twinkle"}'),
        *("--middleware", "twinkle_callbacks.worker.adapter_routes.AdapterRoutes"),
        *("--middleware", "twinkle_callbacks.worker.guard.RouteGuard"),
    ]
    assert started["env"]["VLLM_SERVER_DEV_MODE"] == "1"


def test_the_token_travels_in_the_environment_only(capfd: pytest.CaptureFixture[str]) -> None:
    with serving("m", echo=sys.__stdout__.buffer) as server:
        started = get(server.url, "/started")
        log = server.log_path.read_text()

    assert started["env"]["TWINKLE_TOKEN"] == TOKEN
    assert TOKEN not in " ".join(started["argv"]) + log + "".join(capfd.readouterr())


def test_folders_for_tenants_reach_the_server(tmp_path: Path) -> None:
    with serving("m", tenant_folders=[tmp_path]) as server:
        assert get(server.url, "/started")["env"]["TWINKLE_TENANT_FOLDERS"] == str(tmp_path)


def test_without_a_token_the_users_file_is_made_for_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TWINKLE_TOKEN")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with serving("m") as server:
        assert get(server.url, "/started")["env"]["XDG_CONFIG_HOME"] == str(tmp_path)
    assert (tmp_path / "twinkle_callbacks" / "token").stat().st_mode & 0o777 == 0o600


def test_the_temporary_log_is_gone_after_the_block() -> None:
    with serving("m") as server:
        assert server.log_path.exists()
    assert not server.log_path.parent.exists()


def test_an_error_in_the_block_passes_through_and_the_server_ends() -> None:
    with pytest.raises(ZeroDivisionError), serving("m") as server:
        raise ZeroDivisionError
    assert not alive(server.pid)


def test_a_server_that_ends_early_is_noticed_at_once_and_its_last_words_are_shown() -> None:
    began = time.monotonic()
    early = serving("m", vllm_args=["--fake-exit-code", "3"], ready_timeout_s=600)
    with pytest.raises(RolloutError, match=r"ended with exit code 3; (?s:.*)ValueError: no such model"), early:
        pytest.fail("it was never ready")
    assert time.monotonic() - began < WAIT_S


def test_a_server_that_does_not_get_ready_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    late = serving("m", vllm_args=["--fake-unready"], ready_timeout_s=2, log_path=tmp_path / "log")
    with pytest.raises(DeadlineError, match=r"not ready after 2 s(?s:.*)fake vLLM starts"), late:
        pytest.fail("it was never ready")


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*another port"),
            serving("m", port=port),
        ):
            pytest.fail("another server would have looked ready")


def test_an_unsafe_token_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_TOKEN", "short")
    with pytest.raises(AuthenticationError, match="at least 16"), serving("m"):
        pytest.fail("it started")


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the server's log"), serving("m", log_path=tmp_path):
        pytest.fail("it started")


@pytest.fixture
def command() -> Iterator[subprocess.Popen[str]]:
    arguments = ["-m", "twinkle_callbacks.cli.main", "serve", "some/model", "--port", "0", "--fake-child"]
    # A job in the background inherits that SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    signal.signal(signal.SIGINT, before)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=WAIT_S)


def ready(command: subprocess.Popen[str]) -> dict[str, Any]:
    """Waits for the line that says where the server is; returns how vLLM was started."""
    assert command.stdout is not None
    lines = []
    for line in command.stdout:
        lines.append(line)
        if match := re.search(r"ready at (http://\S+), serving some/model", line):
            return dict(get(match[1], "/started"))
    raise AssertionError("never ready:\n" + "".join(lines))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_command_with_all_its_processes(
    command: subprocess.Popen[str], number: signal.Signals, code: int
) -> None:
    started = ready(command)
    assert started["argv"][:3] == ["--model", "some/model", "--fake-child"]

    command.send_signal(number)
    assert command.wait(WAIT_S) == code
    assert not alive(started["pid"])
    assert eventually(lambda: not alive(started["child"]))


def test_a_server_ends_with_a_parent_that_was_killed(command: subprocess.Popen[str]) -> None:
    started = ready(command)

    command.kill()
    command.wait(WAIT_S)
    assert eventually(lambda: not alive(started["pid"]))
    os.kill(started["child"], signal.SIGKILL)  # the fake does not look after it, as vLLM does after its engine


def test_a_server_that_dies_later_ends_the_command_with_its_last_words(command: subprocess.Popen[str]) -> None:
    started = ready(command)

    os.kill(started["pid"], signal.SIGKILL)
    output, _ = command.communicate(timeout=WAIT_S)
    assert command.returncode == 1
    assert "twinkle-callbacks serve: the server at" in output
    assert "ended with signal SIGKILL" in output
    assert eventually(lambda: not alive(started["child"]))


def test_the_status_command_shows_a_running_server() -> None:
    with serving("m") as server:
        arguments = [sys.executable, "-m", "twinkle_callbacks.cli.main", "status", server.url, "--json"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=WAIT_S, check=True)

    assert json.loads(done.stdout) == {
        "url": server.url,
        "version": "3",
        "model": "tiny",
        "paused": False,
        "world_size": 2,
        "lora": False,
        "adapters": {},
        "backend": "twinkle",
    }
