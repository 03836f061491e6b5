"""Which of this host's addresses others can reach."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from twinkle_callbacks.errors import ConfigError


def address_towards(hosts: Sequence[str]) -> str:
    """This host's address that all of `hosts` can reach: loopback if all are here, else that of the outgoing interface.

    Raises:
        ConfigError: a host's name does not resolve.
    """
    address = "127.0.0.1"
    for host in hosts:
        try:
            family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing; only picks the interface
                mine = str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError(f"rollouts: the host {host!r} cannot be resolved or reached: {error}") from error
        if not ipaddress.ip_address(mine).is_loopback:
            address = mine
    return address
