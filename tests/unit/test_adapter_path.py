from __future__ import annotations

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_callbacks import adapter_versions
from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.adapter_versions import new_version


@given(st.integers(0, 2**63), st.text(min_size=1))
def test_paths_are_read_as_they_were_written_and_no_two_are_alike(version: int, folder: str) -> None:
    for path, again in (
        (AdapterPath.sent(version), AdapterPath.sent(version)),
        (AdapterPath.attached(folder), AdapterPath.attached(folder)),
    ):
        assert AdapterPath.parse(str(path)) == path
        assert str(again) != str(path)


@pytest.mark.parametrize("path", ["", "/folder", "twinkle:", "twinkle:0011223344556677", "twinkle:0011223344556677@-1"])
def test_other_paths_are_none_of_ours(path: str) -> None:
    assert AdapterPath.parse(path) is None


def test_the_end_of_a_version_is_told_once_when_nothing_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Request:
        def __init__(self, **fields: object) -> None:
            self.fields = fields

    monkeypatch.setattr(adapter_versions, "_version_class", lambda: Request)
    ended: list[int] = []
    version = new_version("math", 7, "twinkle:x", ended.append)
    holders = [version, version]
    del version
    gc.collect()
    assert ended == []
    holders.clear()
    gc.collect()
    assert ended == [7]
