"""A store inside a store: whoever reaches the outer one can neither read nor set what is in here."""

from __future__ import annotations

import secrets
from datetime import timedelta

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from torch.distributed import Store

from twinkle_callbacks.errors import AuthenticationError

NONCE_BYTES = 12


class SealedStore(Store):
    """Keeps values encrypted and bound to their keys (ChaCha20-Poly1305, RFC 8439).

    A TCPStore tells every client all keys and values, and lets it set any. The addresses under which a process group
    meets would let a stranger take a rank's place.

    Args:
        store: the store underneath.
        prefix: put before every key.
        key: 32 secret bytes.
    """

    def __init__(self, store: Store, prefix: str, key: bytes) -> None:
        super().__init__()
        self._store = store
        self._prefix = prefix
        self._cipher = ChaCha20Poly1305(key)

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        nonce, name = secrets.token_bytes(NONCE_BYTES), self._name(key)
        self._store.set(name, nonce + self._cipher.encrypt(nonce, data, name.encode()))  # type: ignore[arg-type]  # takes bytes; its stub says str

    def get(self, key: str) -> bytes:
        """The value of a key; waits for it.

        Raises:
            AuthenticationError: somebody without the key has set it.
        """
        name = self._name(key)
        sealed = self._store.get(name)
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise AuthenticationError(f"a stranger without the token has set {key!r} in the rendezvous store") from None

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        names = [self._name(key) for key in keys]
        if timeout is None:
            self._store.wait(names)
        else:
            self._store.wait(names, timeout)

    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check([self._name(key) for key in keys]))

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{key}"
