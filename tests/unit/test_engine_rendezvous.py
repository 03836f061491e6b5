"""Who may join: both sides prove the token, all agree on the group, and nobody else gets anything from the store.

Real stores on loopback, each side on a thread of its own.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from torch.distributed import TCPStore

from twinkle_callbacks import auth, errors
from twinkle_callbacks.engines import rendezvous
from twinkle_callbacks.engines.rendezvous import Rendezvous, Welcome, parse_metadata

TOKEN = "a token of the tests"
OTHER = "another token of the tests"
BUCKET = 4096
TIMEOUT_S = 20.0
SHORT_S = 1.0


@pytest.fixture
def host() -> Rendezvous:
    return Rendezvous.host_session("127.0.0.1", "loopback", TOKEN, TIMEOUT_S)


@pytest.fixture
def short_host() -> Rendezvous:
    """Waits for receivers a short time only; its own store, on a busy machine, gets longer to come up."""
    host = Rendezvous.host_session("127.0.0.1", "loopback", TOKEN, TIMEOUT_S)
    host._store.set_timeout(timedelta(seconds=SHORT_S))
    host._timeout_s = SHORT_S
    return host


def guest(host: Rendezvous, token: str = TOKEN, timeout_s: float = TIMEOUT_S) -> Rendezvous:
    return Rendezvous.join_session(host.metadata, token, timeout_s)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returned, or the error that it raised; all at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.exception() or future.result() for future in [pool.submit(call) for call in calls]]


def admitting(host: Rendezvous, world_size: int, bucket_size: int = BUCKET) -> Callable[[], Any]:
    return lambda: host.admit(world_size, bucket_size)


def entering(side: Rendezvous, rank: int, world_size: int, bucket_size: int = BUCKET) -> Callable[[], Any]:
    return lambda: side.enter(rank, world_size, bucket_size)


def stray(host: Rendezvous) -> TCPStore:
    """A client that knows where the store is, and nothing else."""
    metadata = host.metadata
    patience = timedelta(seconds=TIMEOUT_S)  # to connect on a busy machine
    store = TCPStore(metadata.host, metadata.port, None, False, patience, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=SHORT_S))
    return store


def test_ranks_with_the_token_share_a_store_and_messages(host: Rendezvous) -> None:
    guests = [guest(host), guest(host)]
    assert together(admitting(host, 3), entering(guests[0], 1, 3), entering(guests[1], 2, 3)) == [None] * 3
    host.group_store().set("x", "y")
    assert [side.group_store().get("x") for side in guests] == [b"y", b"y"]
    for rank, side in enumerate(guests, start=1):
        side.post("topic", f"from {rank}".encode())
    assert host.posted("topic", [1]) == {1: b"from 1"}
    assert host.collect("topic", [2, 1], "answer") == {2: b"from 2", 1: b"from 1"}
    assert host.posted("topic", [1, 2]) == {}


def test_world_of_one_waits_for_nobody(host: Rendezvous) -> None:
    host.admit(1, BUCKET)


def test_two_sessions_of_one_token_have_stores_of_their_own(host: Rendezvous) -> None:
    other = Rendezvous.host_session("127.0.0.1", "loopback", TOKEN, TIMEOUT_S)
    assert other.metadata.port != host.metadata.port
    assert other.metadata.session != host.metadata.session


def test_store_listens_on_the_given_address_only(host: Rendezvous) -> None:
    with socket.socket() as probe:
        probe.settimeout(2)
        with pytest.raises(OSError, match="refused"):
            probe.connect(("127.0.0.2", host.metadata.port))


def test_own_address_is_the_one_towards_the_master(host: Rendezvous) -> None:
    assert guest(host).own_address() == "127.0.0.1"


# Disagreement


@pytest.mark.parametrize(
    ("rank", "world_size", "bucket_size", "named"),
    [(1, 3, BUCKET, r"world_size=3, the master 2"), (1, 2, 8192, r"bucket_size=8192, the master 4096")],
)
def test_disagreement_is_an_engine_error_on_both_sides_naming_both_values(
    host: Rendezvous, rank: int, world_size: int, bucket_size: int, named: str
) -> None:
    for error in together(admitting(host, 2), entering(guest(host), rank, world_size, bucket_size)):
        assert type(error) is errors.EngineError
        error_matches(error, f"rank 1.*{named}")


def test_one_receiver_that_disagrees_turns_all_away_with_its_reason(host: Rendezvous) -> None:
    calls = admitting(host, 3), entering(guest(host), 1, 3), entering(guest(host), 2, 3, 8192)
    for error in together(*calls):
        assert type(error) is errors.EngineError
        error_matches(error, "rank 2.*bucket_size=8192, the master 4096")


def test_receiver_beyond_the_masters_world_learns_that_the_worlds_differ(host: Rendezvous) -> None:
    calls = admitting(host, 2), entering(guest(host), 1, 2), entering(guest(host), 2, 3)
    error = together(*calls)[2]
    assert isinstance(error, errors.EngineError)
    error_matches(error, "world_size")


def test_receiver_that_comes_after_the_master_gave_up_still_learns_why(
    host: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "LINGER_S", 60.0)  # on a busy machine the receiver may take its time
    stray(host).set(f"{host.metadata.session}/hello/1", "from a stranger")
    assert isinstance(together(admitting(host, 2))[0], errors.EngineError)
    host.close()
    error = together(lambda: guest(host).enter(1, 2, BUCKET))[0]
    error_matches(error, "malformed hello|is taken")


def test_rank_that_is_taken_is_an_engine_error_naming_it(short_host: Rendezvous) -> None:
    first, second = guest(short_host), guest(short_host)
    results = together(admitting(short_host, 3), entering(first, 1, 3), entering(second, 1, 3))
    taken = [error for error in results[1:] if "rank 1 is taken" in str(error)]
    assert len(taken) == 1
    assert isinstance(taken[0], errors.EngineError)
    assert isinstance(results[0], errors.DeadlineError)
    error_matches(results[0], "rank 2 did not join")
    assert isinstance(next(error for error in results[1:] if error is not taken[0]), errors.TwinkleError)


# Absence


def test_receivers_that_do_not_come_are_named_on_all_sides_in_time(short_host: Rendezvous) -> None:
    began = time.monotonic()
    for error in together(admitting(short_host, 4), entering(guest(short_host), 2, 4)):
        assert type(error) is errors.DeadlineError
        error_matches(error, "rank 1, rank 3 did not join within 1 s")
    assert time.monotonic() - began < SHORT_S + 2


def test_master_that_never_admits_is_a_deadline_error(host: Rendezvous) -> None:
    began = time.monotonic()
    with pytest.raises(errors.DeadlineError, match="the master did not .*within 1 s"):
        guest(host, timeout_s=SHORT_S).enter(1, 2, BUCKET)
    assert time.monotonic() - began < SHORT_S + 2


def test_address_where_nobody_listens_is_a_deadline_error_naming_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    metadata = parse_metadata({"host": "127.0.0.1", "port": port, "session": "s", "engine": "loopback"})
    began = time.monotonic()
    with pytest.raises(errors.DeadlineError, match=f"127.0.0.1:{port} did not answer within 1 s"):
        Rendezvous.join_session(metadata, TOKEN, SHORT_S)
    assert time.monotonic() - began < SHORT_S + 4


def test_master_that_dies_before_the_hello_is_an_engine_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [Rendezvous.host_session("127.0.0.1", "loopback", TOKEN, TIMEOUT_S)]
    side = guest(hosts[0])
    stray(hosts[0]).set(f"{hosts[0].metadata.session}/nonce", auth.nonce())

    def dying() -> bytes:
        hosts.clear()
        return os.urandom(32)

    monkeypatch.setattr(auth, "nonce", dying)  # which enter() asks for just before it says hello
    began = time.monotonic()
    with pytest.raises(errors.EngineError, match=r"the master at 127\.0\.0\.1 is gone"):
        side.enter(1, 2, BUCKET)
    assert time.monotonic() - began < TIMEOUT_S / 2


def test_master_that_dies_before_the_welcome_is_an_engine_error_at_once() -> None:
    hosts = [Rendezvous.host_session("127.0.0.1", "loopback", TOKEN, TIMEOUT_S)]
    side, session = guest(hosts[0]), hosts[0].metadata.session
    stray(hosts[0]).set(f"{session}/nonce", auth.nonce())

    def dying() -> None:
        stray(hosts[0]).get(f"{session}/hello/1")
        hosts.clear()

    began = time.monotonic()
    _, error = together(dying, entering(side, 1, 2))
    assert isinstance(error, errors.EngineError)
    error_matches(error, r"the master at 127\.0\.0\.1 is gone")
    assert time.monotonic() - began < TIMEOUT_S / 2


# Strangers


def test_other_token_is_an_authentication_error_on_both_sides(host: Rendezvous) -> None:
    for error in together(admitting(host, 2), entering(guest(host, OTHER), 1, 2)):
        assert type(error) is errors.AuthenticationError
        error_matches(error, "token")


def test_receiver_does_not_trust_a_master_with_another_token(short_host: Rendezvous) -> None:
    """The master admits whoever comes, as an impostor would."""
    side = guest(short_host)

    def impostor() -> None:
        store = stray(short_host)
        session = short_host.metadata.session
        store.set(f"{session}/nonce", auth.nonce())
        hello = bytes.fromhex(store.get(f"{session}/hello/1").decode())
        nonce = msgspec.msgpack.decode(hello[32:])["nonce"]
        nonces = [b"0" * 32, nonce]
        mac = auth.mac(OTHER, "welcome", session, b"".join(nonces))
        store.set(f"{session}/welcome", msgspec.msgpack.encode(Welcome(nonces, mac)))

    _, error = together(impostor, entering(side, 1, 2))
    assert type(error) is errors.AuthenticationError


@pytest.mark.parametrize(
    "hello",
    [b"garbage", b"", b"\xff\xfe", os.urandom(200), os.urandom(200).hex().encode(), b"00" * 32],
    ids=["text", "empty", "no unicode", "random", "random hex", "a MAC of zeros"],
)
def test_hello_of_a_stranger_gets_nobody_in_and_is_a_clear_error(host: Rendezvous, hello: bytes) -> None:
    def intrude() -> None:
        stray(host).set(f"{host.metadata.session}/hello/1", hello)

    error = together(admitting(host, 2), intrude)[0]
    assert isinstance(error, errors.EngineError | errors.AuthenticationError)
    error_matches(error, "rank 1")


@pytest.mark.parametrize(
    "welcome",
    [
        b"garbage",
        b"",
        msgspec.msgpack.encode({"nonces": 1}),
        msgspec.msgpack.encode(Welcome([], b"", None)),
        msgspec.msgpack.encode({"nonces": [], "mac": b"", "failure": {"type": b"\xff", "message": "x"}}),
    ],
    ids=["text", "empty", "of another type", "without a MAC", "malformed failure"],
)
def test_welcome_of_a_stranger_is_a_clear_error_at_the_receiver(host: Rendezvous, welcome: bytes) -> None:
    store = stray(host)
    store.set(f"{host.metadata.session}/nonce", auth.nonce())
    store.set(f"{host.metadata.session}/welcome", welcome)
    with pytest.raises(errors.TwinkleError):
        guest(host).enter(1, 2, BUCKET)


def test_hello_of_an_earlier_session_is_worth_nothing(host: Rendezvous) -> None:
    together(admitting(host, 2), entering(guest(host), 1, 2))
    old = stray(host).get(f"{host.metadata.session}/hello/1")
    later = Rendezvous.host_session("127.0.0.1", "loopback", TOKEN, TIMEOUT_S)
    stray(later).set(f"{later.metadata.session}/hello/1", old)
    [error] = together(admitting(later, 2))
    assert type(error) is errors.AuthenticationError


def test_message_of_a_stranger_is_an_authentication_error(host: Rendezvous) -> None:
    together(admitting(host, 2), entering(guest(host), 1, 2))
    stray(host).set(f"{host.metadata.session}/ack/1/1", os.urandom(64))
    with pytest.raises(errors.AuthenticationError, match="rank 1"):
        host.collect("ack/1", [1], "answer")


def test_message_for_another_topic_or_rank_is_not_accepted(host: Rendezvous) -> None:
    guests = [guest(host), guest(host)]
    together(admitting(host, 3), entering(guests[0], 1, 3), entering(guests[1], 2, 3))
    guests[0].post("ack/1", b"fine")
    store, session = stray(host), host.metadata.session
    for replayed in ("ack/1/2", "ack/2/1"):
        store.set(f"{session}/{replayed}", store.get(f"{session}/ack/1/1"))
    for topic, rank in (("ack/1", 2), ("ack/2", 1)):
        with pytest.raises(errors.AuthenticationError):
            host.collect(topic, [rank], "answer")


def test_stranger_cannot_find_the_addresses_of_the_data_group(host: Rendezvous) -> None:
    """Whoever can read or write them can take a rank's place in the group, token or not."""
    together(admitting(host, 2), entering(guest(host), 1, 2))
    host.group_store().set("0", "address of rank 0")
    store = stray(host)
    readable = []
    for key in store.list_keys():
        try:
            readable.append(store.get(key))
        except RuntimeError:
            continue
    assert b"address of rank 0" not in readable


GARBAGE = [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"\xff" * 64, bytes(range(256)) * 64, b""]


@pytest.mark.parametrize("garbage", GARBAGE, ids=["http", "zeros", "ones", "bytes", "nothing"])
def test_garbage_on_the_port_disturbs_nobody(host: Rendezvous, garbage: bytes) -> None:
    with disturbance(host, garbage):
        assert together(admitting(host, 2), entering(guest(host), 1, 2)) == [None, None]
        host.group_store().set("x", "y")


def disturbance(host: Rendezvous, garbage: bytes) -> socket.socket:
    connection = socket.create_connection((host.metadata.host, host.metadata.port), timeout=5)
    connection.sendall(garbage)
    return connection


def error_matches(error: BaseException, pattern: str) -> None:
    def throw() -> None:
        raise error

    with pytest.raises(type(error), match=pattern):
        throw()
