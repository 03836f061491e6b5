"""The command line that the recipes share: `--config FILE [--config FILE ...] [--no-sync] [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from recipes.config import RecipeConfig
from twinkle_callbacks.errors import ConfigError, TwinkleError


def run(
    description: str, argv: Sequence[str] | None, action: Callable[[RecipeConfig], int | None], *, trains: bool = True
) -> int:
    """Parses the command line, does what it says, words errors in one line. Returns the exit code.

    Args:
        description: first line of the help.
        argv: arguments, those of the process for None.
        action: what to do with the configuration; may return the exit code.
        trains: whether to offer `--no-sync`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        metavar="FILE",
        help="such as configs/grpo_arithmetic.yaml; given again, such as configs/lightning/ddp.yaml: the last wins",
    )
    parser.set_defaults(no_sync=False)
    if trains:
        parser.add_argument("--no-sync", action="store_true", help="control: no weight sync after the one at the start")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps=10 or optimizer.lr=1e-4")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = RecipeConfig.load(arguments.config, arguments.overrides)
    except ConfigError as error:
        parser.error(str(error))
    try:
        return action(config.without_sync() if arguments.no_sync else config) or 0
    except TwinkleError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
