"""The dispatcher: help, exit codes, and how errors are worded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from twinkle_callbacks import __version__
from twinkle_callbacks.cli import demo, main, status
from twinkle_callbacks.cli.main import COMMANDS, parse
from twinkle_callbacks.errors import ConfigError, TwinkleError

HEAVY = ("torch", "vllm", "transformers", "lightning", "pydantic", "httpx", "rich", "asyncio")


@pytest.mark.parametrize("command", ["", *COMMANDS, "adapters list", "adapters attach", "adapters detach"])
def test_help_answers_without_loading_anything_heavy(command: str) -> None:
    arguments = [*command.split(), "--help"]
    code = f"""
import sys
from twinkle_callbacks.cli.main import main
try:
    main({arguments!r})
except SystemExit as done:
    assert done.code == 0, done.code
heavy = set({HEAVY!r}) & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert f"usage: twinkle-callbacks {command}".strip() in done.stdout


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("twinkle-callbacks")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unheard-of"],
        ["serve"],
        ["serve", "--max-num-seqs", "8", "MODEL"],
        ["serve", "MODEL", "--tenant-folder"],
        ["adapters"],
        ["adapters", "attach", "http://a:1", "math"],
        ["token"],
        ["status"],
        ["status", "http://a:1", "--jsn"],
        ["push", "folder"],
        ["push", "folder", "--to", "http://a:1", "--version", "one"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_a_wrong_command_line_ends_with_2_and_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == 2
    assert "usage: twinkle-callbacks" in capsys.readouterr().err


def test_an_error_of_ours_is_one_line_on_stderr_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise ConfigError("engine='carrier pigeon': known are gloo")

    monkeypatch.setattr(status, "run", fail)
    assert main.main(["status", "http://a:1"]) == 1
    assert capsys.readouterr() == ("", "twinkle-callbacks status: engine='carrier pigeon': known are gloo\n")


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise KeyError("weight_version")

    monkeypatch.setattr(status, "run", fail)
    with pytest.raises(KeyError):
        main.main(["status", "http://a:1"])


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "run", fail)
    assert main.main(["status", "http://a:1"]) == 130


def test_serve_keeps_its_own_flags_wherever_they_stand_and_passes_on_the_rest_in_order() -> None:
    arguments = parse(
        ["serve", "M", "--max-num-seqs", "8", "--port", "9", "-tp", "2", "--log-level=x", "--host=::1", "-O3"]
    )

    assert (arguments.model, arguments.port, arguments.host) == ("M", 9, "::1")
    assert arguments.vllm_args == ["--max-num-seqs", "8", "-tp", "2", "--log-level=x", "-O3"]


def test_serve_listens_on_loopback_by_default() -> None:
    arguments = parse(["serve", "M"])
    assert (arguments.host, arguments.port, arguments.vllm_args) == ("127.0.0.1", 8000, [])


def test_serve_takes_several_folders_for_tenants() -> None:
    arguments = parse(["serve", "M", "--tenant-folder", "/a", "--enable-lora", "--tenant-folder=/b"])
    assert (arguments.tenant_folder, arguments.vllm_args) == ([Path("/a"), Path("/b")], ["--enable-lora"])


def test_push_takes_several_servers() -> None:
    arguments = parse(["push", "folder", "--to", "http://a:1", "--to", "http://b:2", "--version", "7"])
    assert (arguments.to, arguments.version) == (["http://a:1", "http://b:2"], 7)


@pytest.mark.parametrize("module", COMMANDS.values(), ids=COMMANDS)
def test_each_command_explains_itself(module: object) -> None:
    assert str(module.__doc__).count("\n") >= 2


def test_the_demo_runs_in_the_checkout_with_the_arguments_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], Path]] = []

    def call(command: list[str], cwd: Path) -> int:
        calls.append((command, cwd))
        return 5

    monkeypatch.setattr(demo, "find_checkout", lambda: Path("/checkout"))
    monkeypatch.setattr(subprocess, "call", call)
    assert main.main(["demo", "--steps", "3"]) == 5
    assert calls == [([sys.executable, "-m", "recipes.demo", "--steps", "3"], Path("/checkout"))]


def test_without_a_checkout_the_demo_says_where_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("twinkle_callbacks.__file__", str(tmp_path / "site-packages/twinkle_callbacks/__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TwinkleError, match="clone the repository and run `make demo`"):
        demo.find_checkout()
