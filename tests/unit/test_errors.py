from __future__ import annotations

import pickle
import re

import pytest

from twinkle_callbacks import errors
from twinkle_callbacks.errors import PeerError, SyncError, TwinkleError, from_wire

EVERY = sorted(
    (value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TwinkleError)),
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("cls", EVERY)
def test_an_error_survives_pickling_with_its_message(cls: type[TwinkleError]) -> None:
    error = pickle.loads(pickle.dumps(cls("bucket_size=7: must be a multiple of 512")))

    assert type(error) is cls
    assert str(error) == "bucket_size=7: must be a multiple of 512"


@pytest.mark.parametrize("cls", EVERY)
def test_an_error_can_be_rebuilt_from_its_name_and_text(cls: type[TwinkleError]) -> None:
    error = from_wire(cls.__name__, "text")

    assert type(error) is cls
    assert str(error) == "text"


@pytest.mark.parametrize("name", ["ZeroDivisionError", "SystemExit", "os.system", ""])
def test_no_other_type_is_ever_built_from_a_name(name: str) -> None:
    error = from_wire(name, "text")

    assert type(error) is PeerError
    assert str(error) == f"{name}: text"


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    lines = re.findall(r"^    ( *)(\w+Error)\b(?: +\((\w+)\))?", errors.__doc__ or "", re.MULTILINE)
    parents: dict[int, str] = {}
    for indent, name, also in lines:
        cls = getattr(errors, name)
        parents[len(indent)] = name
        if len(indent):
            assert cls.__mro__[1].__name__ == parents[len(indent) - 2], name
        if also:
            assert also in [base.__name__ for base in cls.__mro__], name
    assert sorted(name for _, name, _ in lines) == [cls.__name__ for cls in EVERY]


def test_a_sync_error_keeps_phase_and_rollouts_and_shows_only_its_message() -> None:
    error = pickle.loads(pickle.dumps(SyncError("no room", "commit", ("http://a:1",))))

    assert (str(error), error.phase, error.rollouts) == ("no room", "commit", ("http://a:1",))
