"""Entry point of `twinkle-callbacks`: parses the command line, runs one command, words its error in one line.

Nothing here or in the command files imports torch or vLLM before a command needs it, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import twinkle_callbacks
from twinkle_callbacks.cli import adapters, demo, push, serve, status, token
from twinkle_callbacks.errors import TwinkleError

COMMANDS = {"serve": serve, "status": status, "push": push, "adapters": adapters, "token": token, "demo": demo}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each adds its own arguments and its function under `run`."""
    parser = argparse.ArgumentParser(
        prog="twinkle-callbacks",
        description="Keeps vLLM servers on a trainer's newest weights.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=twinkle_callbacks.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, rest = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{rest}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line. What a command does not know is an error, unless it passes such arguments on."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    attribute = getattr(arguments, "passes_on", None)
    if attribute is not None:
        setattr(arguments, attribute, unknown)
        first = getattr(arguments, "comes_first", None)
        if first is not None and argv[1].startswith("-"):  # `--max-num-seqs 8 MODEL` would take 8 for the model
            parser.error(f"{arguments.command} needs {first} before the flags, not {argv[1]}")
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0: done. 1: a `TwinkleError`, worded on stderr in one line. 2: the command line itself is wrong. 130: interrupted.
    """
    arguments = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("twinkle_callbacks").setLevel(logging.INFO)
    try:
        return int(arguments.run(arguments))
    except TwinkleError as error:
        print(f"twinkle-callbacks {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
