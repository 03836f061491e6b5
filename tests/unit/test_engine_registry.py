"""Engines are found by name, this package's and others'; what is missing or broken is said with the choices."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import twinkle_callbacks.engines as engines
from twinkle_callbacks.engines import CheckpointEngine, GlooCheckpointEngine, get_engine
from twinkle_callbacks.errors import ConfigError


def installed(monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
    points = [EntryPoint(name, target, engines.ENTRY_POINT_GROUP) for name, target in targets.items()]
    monkeypatch.setattr(engines, "entry_points", lambda group: points if group == engines.ENTRY_POINT_GROUP else [])


def test_engine_of_this_package_is_found_by_its_name() -> None:
    for name in engines.BUILTIN:
        engine = get_engine(name)
        assert issubclass(engine, CheckpointEngine)
        assert engine.name == name
    assert get_engine("gloo") is GlooCheckpointEngine


@pytest.mark.parametrize("name", ["glooo", "", "Gloo", "twinkle_callbacks.engines.gloo:GlooCheckpointEngine"])
def test_unknown_engine_is_refused_with_the_choices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, carrier_pigeon="pigeons:Engine")
    with pytest.raises(ConfigError) as caught:
        get_engine(name)
    for text in (f"engine={name!r}", "gloo", "carrier_pigeon"):
        assert text in str(caught.value)


def test_engine_of_another_package_is_found_through_its_entry_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pigeons_found.py").write_text(
        "from twinkle_callbacks.engines import GlooCheckpointEngine as Gloo\nclass Pigeon(Gloo): name = 'pigeon'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    installed(monkeypatch, pigeon="pigeons_found:Pigeon")
    assert get_engine("pigeon").name == "pigeon"


def test_another_package_cannot_take_the_name_of_a_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, gloo="builtins:print")
    assert get_engine("gloo") is GlooCheckpointEngine


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
        ("raise OSError('libhccl.so: cannot open shared object file')", "libhccl.so"),
        ("raise RuntimeError('driver too old')", "driver too old"),
        ("Other = 1", "Pigeon"),
    ],
    ids=["missing module", "missing library", "error on import", "no such class"],
)
def test_engine_that_cannot_be_imported_is_a_config_error_with_the_cause(
    source: str, cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pigeons_broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pigeons_broken", raising=False)
    installed(monkeypatch, pigeon="pigeons_broken:Pigeon")
    with pytest.raises(ConfigError, match=rf"engine='pigeon'.*pigeons_broken:Pigeon.*{cause}") as caught:
        get_engine("pigeon")
    assert caught.value.__cause__ is not None


def test_public_names_are_importable_and_others_are_attribute_errors() -> None:
    assert all(hasattr(engines, name) for name in engines.__all__)
    with pytest.raises(AttributeError, match="Glu"):
        engines.GluCheckpointEngine  # noqa: B018


def test_importing_the_registry_does_not_import_torch() -> None:
    import subprocess

    code = "import sys, twinkle_callbacks.engines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0
