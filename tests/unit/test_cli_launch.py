"""The plan of vLLM's command line, without any process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from twinkle_callbacks import auth
from twinkle_callbacks.cli.launch import Launch, plan_launch
from twinkle_callbacks.errors import ConfigError, MissingExtraError


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, *, version: str | None, module: str | None) -> None:
    """Makes importlib see a vLLM of this kind: a version, if its distribution is named `vllm`, and a module."""

    def find_spec(name: str) -> ModuleSpec:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec

    def distribution_version(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    if module is not None:
        path = folder.joinpath(*module.split("."))
        path.parent.mkdir(parents=True)
        path.with_suffix(".py").touch()
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", distribution_version)


def plan(*vllm_args: str, environ: dict[str, str] | None = None) -> Launch:
    return plan_launch("MODEL", "127.0.0.1", 8000, vllm_args, environ or {})


@pytest.mark.parametrize(
    ("version", "module", "entry"),
    [
        ("0.26.0", "entrypoints.openai.api_server", ["vllm.entrypoints.cli.main", "serve", "MODEL"]),
        (
            None,
            "entrypoints.launchers.api_server.entry",
            ["vllm.entrypoints.launchers.api_server.entry", "--model", "MODEL"],
        ),
        (None, "entrypoints.openai.api_server", ["vllm.entrypoints.openai.api_server", "--model", "MODEL"]),
    ],
    ids=["stock", "cpu build", "older cpu build"],
)
def test_the_entry_point_fits_the_vllm_that_is_installed_and_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    version: Any,
    module: str,
    entry: Any,
) -> None:
    install(monkeypatch, tmp_path, version=version, module=module)
    with caplog.at_level(logging.INFO, logger="twinkle_callbacks"):
        assert plan().command[: 2 + len(entry)] == [sys.executable, "-m", *entry]
    assert "starting" in caplog.text


def test_a_vllm_without_any_known_entry_point_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, version=None, module=None)
    with pytest.raises(MissingExtraError, match=r"none of the modules .* install vLLM 0\.26 or later"):
        plan()


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"install twinkle-callbacks\[vllm\]"):
        plan()


def test_planning_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; from twinkle_callbacks.cli.launch import plan_launch; plan_launch('M', '127.0.0.1', 1, [], {}); "
        "sys.exit(', '.join({'vllm', 'torch'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ours_follow_the_users_flags_so_that_ours_count() -> None:
    command = plan("--middleware", "my.Middleware", "--max-num-seqs", "8").command

    assert command.index("my.Middleware") < command.index("--host")
    assert command[-6:] == [
        *("--weight-transfer-config", '{"backend": "twinkle"}'),
        *("--middleware", "twinkle_callbacks.worker.adapter_routes.AdapterRoutes"),
        *("--middleware", "twinkle_callbacks.worker.guard.RouteGuard"),
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["--weight-transfer-config", '{"backend": "nccl"}'],
        ['--weight-transfer-config={"backend": "nccl"}'],
        ["--weight_transfer_config", '{"backend": "nccl"}'],
        ["--weight-transfer-config.backend", "nccl"],
        ["--weight-transfer-config.backend=nccl"],
        ["--max-num-seqs", "8", "--weight-transfer-config", '{"backend": "nccl"}', "--enforce-eager"],
    ],
    ids=" ".join,
)
def test_another_backend_is_refused(flags: list[str]) -> None:
    with pytest.raises(
        ConfigError, match="backend 'nccl', trainers with this package need 'twinkle'; leave the flag out"
    ):
        plan(*flags)


@pytest.mark.parametrize(
    "flags", [["--weight-transfer-config", "nccl"], ["--weight-transfer-config"], ["--weight-transfer-config=null"]]
)
def test_a_backend_that_cannot_be_read_is_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="leave the flag out"):
        plan(*flags)


@pytest.mark.parametrize(
    "flags", [["--weight-transfer-config", '{"backend": "twinkle"}'], ["--weight-transfer-config.backend", "twinkle"]]
)
def test_our_backend_may_be_named_again(flags: list[str]) -> None:
    assert flags[0] in plan(*flags).command


@pytest.mark.parametrize(
    "flag", ["--model", "--host", "--port", "--uds", "--headless", "--ssl-keyfile", "--ssl_certfile", "--model=M"]
)
def test_a_flag_that_the_launcher_sets_or_cannot_serve_is_refused_with_the_reason(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"leave out {flag}: "):
        plan(flag, "value")


@pytest.mark.parametrize(
    "flags",
    [
        ["--api-server-count", "2"],
        ["--api_server_count=2"],
        ["-asc", "2"],
        ["--data-parallel-size", "4"],
        ["-dp=4"],
        ["-dp", "1", "--data-parallel-size", "4"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("lora", ["--enable-lora", "--enable_lora"])
def test_adapters_are_served_by_one_process_and_one_replica(lora: str, flags: list[str]) -> None:
    for arguments in ([lora, *flags], [*flags, "--no-enable-lora", lora]):
        with pytest.raises(ConfigError, match=r"(--api-server-count 2|--data-parallel-size 4) with --enable-lora: "):
            plan(*arguments)
    for arguments in (flags, [lora, *flags, "--no-enable-lora"]):
        assert flags[0] in plan(*arguments).command


@pytest.mark.parametrize("flags", [[], ["-dp", "1"], ["--api-server-count=1"], ["-dp", "2", "-dp", "1"], ["-dp"]])
def test_one_of_each_may_serve_adapters(flags: list[str]) -> None:
    assert "--enable-lora" in plan("--enable-lora", *flags).command


def test_folders_for_tenants_travel_in_the_environment(tmp_path: Path) -> None:
    one, two, environ = tmp_path / "one", tmp_path / "two", {auth.TENANT_FOLDERS_ENV: "/of/the/user"}
    one.mkdir()
    two.symlink_to(one)
    assert plan(environ=environ).env[auth.TENANT_FOLDERS_ENV] == "/of/the/user"
    planned = plan_launch("MODEL", "127.0.0.1", 8000, [], environ, [one, two, tmp_path])
    assert planned.env[auth.TENANT_FOLDERS_ENV] == f"{one}:{one}:{tmp_path}"


@pytest.mark.parametrize("name", ["missing", "a:b"])
def test_a_folder_for_tenants_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a:b").mkdir()
    with pytest.raises(ConfigError, match=f"--tenant-folder .*{name}: give an existing folder"):
        plan_launch("MODEL", "127.0.0.1", 8000, [], {}, [tmp_path / name])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("lora_filesystem_resolver", "lora_filesystem_resolver,twinkle"),
        ("", "twinkle"),
        ("twinkle,x", "twinkle,x"),
    ],
)
def test_a_filter_of_plugins_lets_ours_through(given: str | None, expected: str | None) -> None:
    environ = {} if given is None else {"VLLM_PLUGINS": given}
    assert plan(environ=environ).env.get("VLLM_PLUGINS") == expected


def test_the_rl_routes_are_on_whatever_the_environment_says() -> None:
    assert plan(environ={"VLLM_SERVER_DEV_MODE": "0", "HOME": "/h"}).env == {"VLLM_SERVER_DEV_MODE": "1", "HOME": "/h"}


def test_the_installed_plugin_is_the_one_that_the_backend_needs() -> None:
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert plugins["twinkle"].value == "twinkle_callbacks.worker.plugin:register"
