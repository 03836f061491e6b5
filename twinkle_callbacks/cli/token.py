"""Print the token of a tenant, which may sync, attach and detach the adapters of its name and nothing else.

It is made from the server's token ($TWINKLE_TOKEN, else the user's token file); the server needs no list of tenants.
Give it to the tenant's trainer as $TWINKLE_TOKEN. The tenant NAME may touch the adapter NAME, and those named NAME/...
"""

from __future__ import annotations

import argparse

from twinkle_callbacks import auth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `token`."""
    parser.add_argument("tenant", metavar="NAME", help="name of the tenant, and of its adapter")


def run(arguments: argparse.Namespace) -> int:
    """Prints the token, alone on a line of standard output."""
    print(auth.tenant_token(auth.load_token(), arguments.tenant))
    return 0
