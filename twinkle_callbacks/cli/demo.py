"""Run the GRPO demo of the checkout: a trainer, a real vLLM server, and a control without syncing.

Further arguments go to `python -m recipes.demo`, which runs in the checkout and writes its report to runs/demo there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import twinkle_callbacks
from twinkle_callbacks.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `demo`."""
    parser.usage = "twinkle-callbacks demo [arguments of recipes.demo]"
    parser.set_defaults(passes_on="rest")


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo as a child process and returns its exit code.

    Raises:
        ConfigError: this package was not installed from a checkout, and none is the working directory.
    """
    return subprocess.call([sys.executable, "-m", "recipes.demo", *arguments.rest], cwd=find_checkout())


def find_checkout() -> Path:
    """Returns the folder that holds `recipes/demo.py`: the one this package lies in, else the working directory."""
    candidates = [Path(twinkle_callbacks.__file__).resolve().parents[1], Path.cwd()]
    for folder in candidates:
        if (folder / "recipes" / "demo.py").is_file():
            return folder
    raise ConfigError(
        f"no recipes/demo.py in {' or '.join(str(folder) for folder in candidates)}; the recipes are not part of the "
        "installed package: clone the repository and run `make demo` in it"
    )
