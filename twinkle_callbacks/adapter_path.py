"""What stands in `LoRARequest.lora_path`: one version of an adapter, by a stamp that is never used twice.

vLLM keys its prefix cache by an adapter's name and path, so a path that names one version keeps the cached prefixes of
one version from those of another. A version that is loaded is never changed: the next one has another path and another
`lora_int_id`, and requests under way end on the version they began with.

    twinkle:<stamp>@<version>    a trainer sent it; the workers hold it in memory
    twinkle:<stamp>=<path>       attached from files in the folder `path` on the server
"""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

_STAMP_BYTES = 8
_PATTERN = re.compile(r"twinkle:(?P<stamp>[0-9a-f]{16})(?:@(?P<version>[0-9]{1,20})|=(?P<folder>.+))", re.DOTALL)


class AdapterPath(NamedTuple):
    """One version of an adapter; exactly one of `version` and `folder` is set."""

    stamp: str
    version: int | None = None
    folder: str | None = None

    def __str__(self) -> str:
        return f"twinkle:{self.stamp}" + (f"@{self.version}" if self.folder is None else f"={self.folder}")

    @classmethod
    def sent(cls, version: int) -> AdapterPath:
        """A fresh path for a version that a trainer sends."""
        return cls(secrets.token_hex(_STAMP_BYTES), version)

    @classmethod
    def attached(cls, folder: str) -> AdapterPath:
        """A fresh path for what the folder holds now."""
        return cls(secrets.token_hex(_STAMP_BYTES), folder=folder)

    @classmethod
    def parse(cls, path: str) -> AdapterPath | None:
        """Reads a path, None if it is not one of these, such as a plain folder."""
        found = _PATTERN.fullmatch(path)
        if found is None:
            return None
        version = found["version"]
        return cls(found["stamp"], None if version is None else int(version), found["folder"])
