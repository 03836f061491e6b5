"""The shared secret of trainers and rollouts: where it is kept, and the MACs made with it.

The token never travels. Each side proves that it has it by an HMAC-SHA256 over fresh nonces of both.

Who has a server's token may do everything there. A tenant's token is derived from it for one name, and may touch only
the adapters of that name: the server derives it again from the name, so it keeps no list of tenants.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import NamedTuple

from twinkle_callbacks.errors import AuthenticationError

TOKEN_ENV = "TWINKLE_TOKEN"
TENANT_FOLDERS_ENV = "TWINKLE_TENANT_FOLDERS"  # on the server
MIN_TOKEN_CHARS = 16
NONCE_BYTES = 32
SIGNATURE_HEADER = "x-twinkle-signature"
MAX_CLOCK_SKEW_S = 300.0
TENANT_PREFIX = "tenant"
TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Signed(NamedTuple):
    """What a checked signature says: the nonce, which may not be accepted twice, and the tenant, empty for none."""

    nonce: str
    tenant: str


def token_path() -> Path:
    """The user's token file, `$XDG_CONFIG_HOME/twinkle_callbacks/token`."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "twinkle_callbacks" / "token"


def load_token(explicit: str | None = None) -> str:
    """Returns the token: the one given, else `$TWINKLE_TOKEN`, else the user's token file, which is made if missing.

    Raises:
        AuthenticationError: the token is shorter than 16 characters, or its file is readable by other users, or cannot
            be made or read.
    """
    token = explicit or os.environ.get(TOKEN_ENV)
    if token is None:
        path = token_path()
        try:
            token = _read(path)
        except AuthenticationError:  # which is an OSError too
            raise
        except OSError as error:
            raise AuthenticationError(f"no token: {path} cannot be made or read ({error}); set {TOKEN_ENV}") from error
    if len(token) < MIN_TOKEN_CHARS:
        raise AuthenticationError(
            f"the token has {len(token)} characters, at least {MIN_TOKEN_CHARS} are needed; "
            f"make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


def _read(path: Path) -> str:
    if not path.exists():
        _create(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise AuthenticationError(f"token file {path} has mode {mode:o}, others can read it; run: chmod 600 {path}")
    return path.read_text().strip()


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"token.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    try:
        os.link(temporary, path)  # atomic, and never over a token that another process made meanwhile
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def tenant_token(token: str, tenant: str) -> str:
    """The token of a tenant, made from the server's.

    Args:
        token: the server's token.
        tenant: the tenant's name: letters, digits, `.`, `_` and `-`.

    Raises:
        AuthenticationError: the name is of another form, or `token` is itself a tenant's.
    """
    if not TENANT_NAME.fullmatch(tenant):
        raise AuthenticationError(f"tenant {tenant!r}: a name has letters, digits, '.', '_', '-', at most 64 of them")
    if tenant_of(token):
        raise AuthenticationError(
            f"this is the token of tenant {tenant_of(token)!r}; only the server's token makes others"
        )
    return f"{TENANT_PREFIX}:{tenant}:{mac(token, 'tenant', tenant).hex()}"


def tenant_of(token: str) -> str:
    """Name of the tenant whose token this is, empty for a server's token."""
    prefix, _, rest = token.partition(":")
    tenant, _, secret = rest.partition(":")
    return tenant if prefix == TENANT_PREFIX and secret else ""


def may_touch(tenant: str, adapter: str) -> bool:
    """Whether a tenant may sync, attach or detach an adapter: its own name, and `<its name>/<anything>`."""
    return not tenant or adapter == tenant or adapter.startswith(f"{tenant}/")


def tenant_folders() -> list[str]:
    """Folders of this server below which its owner lets tenants attach adapter files: none unless the owner says so."""
    return [folder for folder in os.environ.get(TENANT_FOLDERS_ENV, "").split(os.pathsep) if folder]


def key_of(token: str, tenant: str) -> str:
    """On a server with this token: what a tenant signs with."""
    return tenant_token(token, tenant) if tenant else token


def nonce() -> bytes:
    """Fresh random bytes, to be used once."""
    return secrets.token_bytes(NONCE_BYTES)


def mac(token: str, purpose: str, *parts: bytes | str | int) -> bytes:
    """HMAC-SHA256 over length-prefixed parts; `purpose` keeps one use from standing in for another."""
    digest = hmac.new(token.encode(), digestmod=hashlib.sha256)
    for part in (purpose, *parts):
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def verify(expected: bytes, given: bytes) -> bool:
    """Compares two MACs in constant time."""
    return hmac.compare_digest(expected, given)


def sign_request(token: str, method: str, target: str, body: bytes) -> str:
    """Value of the signature header for an HTTP request; `target` is path and query."""
    stamp, fresh = f"{time.time():.3f}", secrets.token_hex(16)
    signature = _request_mac(token, method, target, body, stamp, fresh).hex()
    tenant = tenant_of(token)
    return f"{stamp}:{fresh}:{signature}" + (f":{tenant}" if tenant else "")


def check_request(token: str, header: str, method: str, target: str, body: bytes) -> Signed:
    """Checks a signature header, made with the server's token or that of a tenant.

    Raises:
        AuthenticationError: malformed, older than the allowed clock skew, or made with another token.
    """
    try:
        stamp, fresh, signature, *tenants = header.split(":")
        age_s, given = abs(time.time() - float(stamp)), bytes.fromhex(signature)
        [tenant] = tenants or [""]
    except ValueError:
        raise AuthenticationError(f"malformed {SIGNATURE_HEADER} header") from None
    if not verify(_request_mac(key_of(token, tenant), method, target, body, stamp, fresh), given):
        raise AuthenticationError("the request is signed with another token than the server's")
    if not age_s <= MAX_CLOCK_SKEW_S:
        raise AuthenticationError(
            f"the request was signed {age_s:.0f} s away from the server's clock; synchronize the clocks"
        )
    return Signed(fresh, tenant)


def _request_mac(token: str, method: str, target: str, body: bytes, stamp: str, fresh: str) -> bytes:
    return mac(token, "http", method.upper(), target, hashlib.sha256(body).digest(), stamp, fresh)
