"""How the ranks of an engine meet: a TCPStore of their own, and proof of the shared token before any data.

    master                                 receiver r
    nonce ------------------------------->
          <------------- hello/r: rank, world, bucket size, its nonce, MAC(token, all of it and the master's nonce)
    welcome: MAC(token, every nonce) ----> or the reason why not, for every receiver
    group key = MAC(token, every nonce): the key under which the data group's addresses are exchanged, sealed

Without the token nobody can read or replace the data group's addresses. Values are msgpack, never pickle.
"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from twinkle_callbacks import auth
from twinkle_callbacks.buckets.frames import PROTOCOL_VERSION, Failure
from twinkle_callbacks.errors import (
    AuthenticationError,
    ConfigError,
    DeadlineError,
    EngineError,
    TwinkleError,
    from_wire,
    text_of,
)

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

MAC_BYTES = 32
LINGER_S = 5.0


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the master's `prepare()` hands out: where to meet. No secret."""

    host: str
    port: int
    session: str
    engine: str


class Hello(msgspec.Struct, frozen=True):
    """A receiver's request to enter, and what it must agree on with the master."""

    rank: int
    world_size: int
    bucket_size: int
    protocol: int
    nonce: bytes


class Welcome(msgspec.Struct, frozen=True):
    """The master's answer to all: every rank's nonce and proof of the token, or why the session ends."""

    nonces: list[bytes]
    mac: bytes
    failure: Failure | None = None


def parse_metadata(metadata: dict[str, Any]) -> Metadata:
    """Checks the master's metadata.

    Raises:
        ConfigError: a field is missing, unknown, or of another type.
    """
    try:
        return msgspec.convert(metadata, Metadata)
    except msgspec.ValidationError as error:
        raise ConfigError(f"master_metadata={metadata!r} is not what prepare() returns: {error}") from None


class Rendezvous:
    """One session of an engine: the store, the key of the group, and authenticated receipts."""

    def __init__(self, store: TCPStore, metadata: Metadata, token: str, timeout_s: float) -> None:
        self.metadata = metadata
        self._opened: TCPStore | None = store
        self._token = token
        self._timeout_s = timeout_s
        self._key = b""
        self._rank = 0
        self._turned_away = False

    @classmethod
    def host_session(cls, host: str, engine: str, token: str, timeout_s: float) -> Rendezvous:
        """On the master: opens a store on a free port of `host`, and of no other address."""
        from torch.distributed import TCPStore

        try:
            listener = socket.create_server((host, 0), backlog=128, family=_family(host))
        except OSError as error:
            raise ConfigError(f"host={host!r}: cannot listen on this address: {error}") from error
        port = listener.getsockname()[1]
        store = TCPStore(
            host,
            port,
            None,
            True,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return cls(store, Metadata(host, port, uuid.uuid4().hex, engine), token, timeout_s)

    @classmethod
    def join_session(cls, metadata: Metadata, token: str, timeout_s: float) -> Rendezvous:
        """On a receiver: connects to the master's store."""
        from torch.distributed import DistError, TCPStore

        try:
            store = TCPStore(
                metadata.host, metadata.port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False
            )
        except (DistError, RuntimeError, ValueError) as error:
            raise DeadlineError(
                f"the master at {metadata.host}:{metadata.port} did not answer within {timeout_s:g} s: {_text(error)}"
            ) from error
        return cls(store, metadata, token, timeout_s)

    @property
    def _store(self) -> TCPStore:
        if self._opened is None:
            raise EngineError("this session has ended; call prepare() and init_process_group() again")
        return self._opened

    def close(self) -> None:
        """Leaves the session; on the master also ends it and lets go of the port. Idempotent.

        A master that turned its receivers away stays reachable for a few seconds, so that late ones learn why.
        """
        store, self._opened = self._opened, None
        if store is not None and self._turned_away:
            lingering = threading.Timer(LINGER_S, _let_go, [store])
            lingering.daemon = True
            lingering.start()

    def group_store(self) -> Store:
        """Where the data group's ranks exchange their addresses: open to ranks with the token alone."""
        from twinkle_callbacks.engines.sealed_store import SealedStore

        return SealedStore(self._store, self._name("group"), auth.mac(self._token, "group", self._key))

    def admit(self, world_size: int, bucket_size: int) -> None:
        """On the master: checks the hello of every receiver, then welcomes all, or turns all away with the reason."""
        nonces = [auth.nonce()]
        self._set("nonce", nonces[0])
        try:
            values = self._wait([f"hello/{rank}" for rank in range(1, world_size)], "join")
            for rank, value in enumerate(values, start=1):
                nonces.append(self._check_hello(rank, value, nonces[0], world_size, bucket_size))
        except TwinkleError as error:
            self._turned_away = True
            self._set("welcome", msgspec.msgpack.encode(Welcome([], b"", Failure.of(error))))
            raise
        self._key = b"".join(nonces)
        welcome = Welcome(nonces, auth.mac(self._token, "welcome", self.metadata.session, self._key))
        self._set("welcome", msgspec.msgpack.encode(welcome))

    def enter(self, rank: int, world_size: int, bucket_size: int) -> None:
        """On a receiver: says hello and waits to be welcomed."""
        self._rank = rank
        [master_nonce] = self._wait(["nonce"], "be reached")
        own = auth.nonce()
        hello = msgspec.msgpack.encode(Hello(rank, world_size, bucket_size, PROTOCOL_VERSION, own))
        signed = self._sign("hello", master_nonce, hello)
        self._claim(rank, signed.hex())
        [value] = self._wait(["welcome"], "admit every receiver")
        try:
            welcome = msgspec.msgpack.decode(value, type=Welcome)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise AuthenticationError(f"the welcome at {self.metadata.host} is not the master's: {error}") from None
        if welcome.failure is not None:
            raise from_wire(welcome.failure.type, f"the master turned this session away: {welcome.failure.message}")
        self._key = b"".join(welcome.nonces)
        expected = auth.mac(self._token, "welcome", self.metadata.session, self._key)
        if not auth.verify(expected, welcome.mac):
            raise AuthenticationError(_other_token(f"the master at {self.metadata.host}"))
        if own not in welcome.nonces:
            raise EngineError(
                f"rank {rank} has world_size={world_size}, the master {len(welcome.nonces)}; they must be the same"
            )

    def _claim(self, rank: int, hello: str) -> None:
        try:
            taken = self._store.compare_set(self._name(f"hello/{rank}"), "", hello)
        except RuntimeError as error:
            raise EngineError(f"the master at {self.metadata.host} is gone: {_text(error)}") from error
        if taken != hello.encode():
            raise EngineError(f"rank {rank} is taken by another receiver of this session; give each its own rank")

    def post(self, topic: str, payload: bytes) -> None:
        """On a receiver: leaves an authenticated message for the master."""
        self._set(f"{topic}/{self._rank}", self._sign(f"{topic}/{self._rank}", self._key, payload))

    def is_master_there(self) -> bool:
        """On a receiver: whether the master's store still answers. It cannot tell from a message that it sends."""
        try:
            self._store.check([self._name("nonce")])
        except (RuntimeError, EngineError):
            return False
        return True

    def collect(self, topic: str, ranks: Iterable[int], doing: str) -> dict[int, bytes]:
        """On the master: waits for the message of each rank, checks and removes it."""
        ranks = list(ranks)
        values = self._wait([f"{topic}/{rank}" for rank in ranks], doing)
        messages = {}
        for rank, value in zip(ranks, values, strict=True):
            messages[rank] = self._open_signed(f"{topic}/{rank}", self._key, value, f"rank {rank}")
            self._store.delete_key(self._name(f"{topic}/{rank}"))
        return messages

    def posted(self, topic: str, ranks: Iterable[int]) -> dict[int, bytes]:
        """On the master: the messages on this topic that are there already; waits for none and removes none."""
        found = {}
        for rank in ranks:
            key = f"{topic}/{rank}"
            if self._store.check([self._name(key)]):
                found[rank] = self._open_signed(key, self._key, self._store.get(self._name(key)), f"rank {rank}")
        return found

    def own_address(self) -> str:
        """On a receiver: this host's address on the way to the master."""
        with socket.socket(_family(self.metadata.host), socket.SOCK_DGRAM) as probe:
            probe.connect((self.metadata.host, self.metadata.port))  # sends nothing; only picks the interface
            return str(probe.getsockname()[0])

    def _check_hello(self, rank: int, value: bytes, master_nonce: bytes, world_size: int, bucket_size: int) -> bytes:
        try:
            signed = bytes.fromhex(value.decode())
            data = self._open_signed("hello", master_nonce, signed, f"rank {rank}")
            hello = msgspec.msgpack.decode(data, type=Hello)
        except (ValueError, msgspec.MsgspecError) as error:
            raise EngineError(f"rank {rank} sent a malformed hello: {error}") from None
        ours = (rank, world_size, bucket_size, PROTOCOL_VERSION)
        theirs = (hello.rank, hello.world_size, hello.bucket_size, hello.protocol)
        names = ("rank", "world_size", "bucket_size", "wire protocol")
        for name, mine, other in zip(names, ours, theirs, strict=True):
            if mine != other:
                raise EngineError(f"rank {rank} has {name}={other}, the master {mine}; they must be the same")
        return hello.nonce

    def _sign(self, purpose: str, key: bytes, payload: bytes) -> bytes:
        return auth.mac(self._token, purpose, self.metadata.session, key, payload) + payload

    def _open_signed(self, purpose: str, key: bytes, value: bytes, who: str) -> bytes:
        given, payload = value[:MAC_BYTES], value[MAC_BYTES:]
        if not auth.verify(auth.mac(self._token, purpose, self.metadata.session, key, payload), given):
            raise AuthenticationError(_other_token(who))
        return payload

    def _name(self, key: str) -> str:
        return f"{self.metadata.session}/{key}"

    def _set(self, key: str, value: bytes) -> None:
        try:
            self._store.set(self._name(key), value)  # type: ignore[arg-type]  # takes bytes; its stub says str
        except RuntimeError as error:
            raise EngineError(f"the master at {self.metadata.host} is gone: {_text(error)}") from error

    def _wait(self, keys: list[str], doing: str) -> list[bytes]:
        names = [self._name(key) for key in keys]
        if not names:
            return []
        try:
            return list(self._store.multi_get(names))  # which waits for them, as long as the store was told
        except RuntimeError as error:
            try:
                missing = [key for key, name in zip(keys, names, strict=True) if not self._store.check([name])]
            except RuntimeError:
                raise EngineError(f"the master at {self.metadata.host} is gone: {_text(error)}") from error
            who = ", ".join(f"rank {key.rsplit('/', 1)[1]}" if "/" in key else "the master" for key in missing)
            raise DeadlineError(f"{who or 'a rank'} did not {doing} within {self._timeout_s:g} s") from error


def _let_go(store: TCPStore) -> None:
    """The last reference goes with the argument."""


def _other_token(who: str) -> str:
    return f"{who} has another token than this side; give both the same {auth.TOKEN_ENV} or token file"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _text(error: BaseException) -> str:
    return text_of(error).splitlines()[0]
