"""Whatever comes in the body of a call, the ranks of a worker agree on what is refused: none raises by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from twinkle_callbacks import auth
from twinkle_callbacks.errors import AuthenticationError, ConfigError, RolloutError
from twinkle_callbacks.worker import backend
from twinkle_callbacks.worker.backend import TwinkleWeightTransferEngine
from twinkle_callbacks.worker.messages import LEAVE, AdapterCall


class Rank(TwinkleWeightTransferEngine):
    """One that came no further than its messages; keeps what it told the other ranks."""

    def __init__(self) -> None:
        self.told: list[Exception | None] = []
        self.fails: Exception | None = None

    def _do(self, call: AdapterCall) -> None:
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    rank = Rank()
    monkeypatch.setattr(backend, "agree", rank.told.append)
    return rank


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"x": 1}, "neither an invitation nor a call.*'x'"),
        (["request"], "neither an invitation nor a call"),
        (None, "neither an invitation nor a call"),
        ({}, "not a JoinRequest of this version"),
        ({"request": 5}, "not a JoinRequest of this version"),
        ({"call": "leave"}, "not a AdapterCall of this version"),
    ],
)
def test_a_body_that_is_no_message_is_told_to_the_other_ranks(rank: Rank, body: Any, says: str) -> None:
    rank.init_transfer_engine(rank.parse_init_info(body))
    [failure] = rank.told
    with pytest.raises(ConfigError, match=says):
        raise failure  # type: ignore[misc]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("surprise"), RolloutError("KeyError: 'surprise'")),
        (AuthenticationError("no"), AuthenticationError("no")),
    ],
)
def test_any_error_is_told_to_the_other_ranks(rank: Rank, error: Exception, told: Exception) -> None:
    rank.fails = error
    call = AdapterCall(action=LEAVE, adapter="math").signed(auth.load_token())
    rank.init_transfer_engine(rank.parse_init_info({"call": call}))
    [failure] = rank.told
    assert (type(failure), str(failure)) == (type(told), str(told))


def test_who_sent_whole_weights_earlier_leaves_the_link_of_the_next_alone(rank: Rank) -> None:
    link: Any = SimpleNamespace(request=SimpleNamespace(client="next"), closed=0)
    link.close = lambda: setattr(link, "closed", link.closed + 1)
    rank._link = link
    for client, closed in (("earlier", 0), ("next", 1), ("next", 1)):
        TwinkleWeightTransferEngine._do(rank, AdapterCall(action=LEAVE, adapter="", client=client))
        assert link.closed == closed
    assert rank._link is None


@pytest.mark.parametrize("body", [{"x": 1}, None, ["receive"]])
def test_an_update_that_cannot_be_read_changes_nothing(rank: Rank, body: Any) -> None:
    rank.receive_weights(rank.parse_update_info(body))
    assert rank.told == []
