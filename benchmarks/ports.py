"""Ports for processes that take seconds to start before they listen."""

from __future__ import annotations

import contextlib
import random
import socket

PORTS = range(20_000, 32_000)  # below those that systems give to connections, which could take one before rank 0 does


def free_port() -> int:
    """A port that is free, and that no connection takes before a process listens there."""
    for port in random.sample(PORTS, 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError(f"no port of a hundred between {PORTS.start} and {PORTS.stop} is free")
