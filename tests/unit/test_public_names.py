"""The names that users write. A change here is a change of the product."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

PUBLIC = {
    "twinkle_callbacks": {"SyncReport", "WeightSynchronizer", "__version__"},
    "twinkle_callbacks.engines": {
        *("CheckpointEngine", "get_engine"),
        *("GlooCheckpointEngine", "SharedMemoryCheckpointEngine", "NCCLCheckpointEngine", "IPCCheckpointEngine"),
    },
    "twinkle_callbacks.rollouts": {"AdapterRegistry", "HTTPRollout", "LocalRollout"},
    "twinkle_callbacks.lightning": {"WeightSyncCallback"},
    "twinkle_callbacks.transformers": {"WeightSyncCallback"},
    "twinkle_callbacks.accelerate": {"WeightSync"},
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in sorted(names) if name != "__version__"]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_is_there_and_documented(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)

    assert inspect.getdoc(value), f"{module}.{name} has no docstring"


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_method_is_documented_here_or_where_it_was_declared(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    if not inspect.isclass(value):
        return
    own = [item for item, member in vars(value).items() if inspect.isfunction(member) and not item.startswith("_")]
    foreign = set().union(
        *(dir(base) for base in value.__mro__[1:] if not base.__module__.startswith("twinkle_callbacks"))
    )

    assert [item for item in own if item not in foreign and not inspect.getdoc(getattr(value, item))] == []


@pytest.mark.parametrize("module", ["twinkle_callbacks", "twinkle_callbacks.engines"])
def test_nothing_else_is_public(module: str) -> None:
    assert set(importlib.import_module(module).__all__) == PUBLIC[module]


def test_importing_the_package_imports_neither_torch_nor_a_framework() -> None:
    heavy = "{'torch', 'vllm', 'lightning', 'transformers', 'accelerate', 'peft', 'pydantic'}"
    code = f"import sys, twinkle_callbacks; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    package = importlib.import_module("twinkle_callbacks")
    with pytest.raises(AttributeError, match="no attribute 'WeightSynchronizr'"):
        package.WeightSynchronizr  # noqa: B018


def test_the_lazy_names_show_in_dir() -> None:
    assert set(dir(importlib.import_module("twinkle_callbacks"))) == PUBLIC["twinkle_callbacks"]
