"""Adapter files on a rollout: attached, listed, replaced and detached, beside those that trainers keep fresh."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from types import TracebackType
from typing import NamedTuple, Self

from twinkle_callbacks.adapter_path import AdapterPath
from twinkle_callbacks.config import ADAPTER_NAME_PATTERN, MAX_ADAPTER_NAME_CHARS
from twinkle_callbacks.errors import ConfigError
from twinkle_callbacks.rollouts.base import Rollout
from twinkle_callbacks.rollouts.http import HTTPRollout


class ServedAdapter(NamedTuple):
    """An adapter that requests can name.

    Attributes:
        name: the model name that requests give.
        version: that its trainer pushed; None if it was attached from files.
        folder: its files, on the rollout's host; None if a trainer pushed it.
    """

    name: str
    version: int | None
    folder: str | None


class AdapterRegistry:
    """The adapters of one rollout. Any process with the token may have one; each call ends within the timeout.

    A version never changes: requests under way end on the one they began with, also when it is replaced or its files
    are gone. What is attached is host memory of the rollout until it is detached.

    Args:
        rollout: URL of a server that `twinkle-callbacks serve` started with `--enable-lora`, or a rollout.
        token: shared secret, the server's or that of a tenant, who may touch its own adapters only. Default:
            `$TWINKLE_TOKEN`, else the user's token file.
        timeout_s: seconds that one call may take.

    Raises:
        ConfigError: the URL is not an http(s) one.
    """

    def __init__(self, rollout: str | Rollout, *, token: str | None = None, timeout_s: float = 300.0) -> None:
        if isinstance(rollout, str):
            rollout = HTTPRollout(rollout, token=token, timeout_s=timeout_s)
        self._rollout = rollout

    def list(self) -> list[ServedAdapter]:
        """All adapters, by name."""
        return [_served(name, path) for name, path in sorted(self._rollout.adapters().items())]

    def attach(self, name: str, folder: str) -> None:
        """Serves the adapter in a folder, as PEFT saves it, under a name; replaces what has that name.

        Args:
            name: the model name that requests will give.
            folder: absolute path on the rollout's host; read now, and not again.

        Raises:
            ConfigError: the name or the folder is of another form.
            AuthenticationError: the adapter is not this tenant's, or the folder is not one that tenants may attach.
            RolloutError: vLLM refuses the adapter, the name is the base model's, or all slots are taken; what was
                served is served on.
        """
        if not re.fullmatch(ADAPTER_NAME_PATTERN, name):
            raise ConfigError(f"adapter name {name!r}: give one without blanks, which requests can name as their model")
        if len(name) > MAX_ADAPTER_NAME_CHARS:
            raise ConfigError(
                f"adapter name {name[:20]!r}... has {len(name)} characters: give at most {MAX_ADAPTER_NAME_CHARS}"
            )
        if not PurePosixPath(folder).is_absolute():
            raise ConfigError(f"folder {folder!r}: give an absolute path, as it is on the rollout's host")
        self._rollout.load_adapter(name, folder)

    def detach(self, name: str) -> None:
        """Takes an adapter away, whether it came from files or from a trainer, and frees its slot.

        Raises:
            AuthenticationError: the adapter is not this tenant's.
            RolloutError: there is none of that name, or requests under way use it.
        """
        self._rollout.unload_adapter(name)

    def close(self) -> None:
        """Frees the connection; the adapters stay. Idempotent."""
        self._rollout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _served(name: str, path: str) -> ServedAdapter:
    parsed = AdapterPath.parse(path)
    return ServedAdapter(name, None, path) if parsed is None else ServedAdapter(name, parsed.version, parsed.folder)
