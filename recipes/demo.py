"""The whole path on this machine: a policy, a real vLLM server, Lightning training with weight sync, and a control.

The control starts from the same weights, on the trainer and on the server, and syncs only once, at its start. Writes
`report.json`, `report.png` and each run's `steps.jsonl`; fails if the reward did not rise or the server fell behind.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.config import RecipeConfig
from recipes.server import served
from twinkle_callbacks.errors import ConfigError, TwinkleError

if TYPE_CHECKING:
    from recipes.history import History


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns 0 if everything it promises came true, 1 if not."""
    options = _parser().parse_intermixed_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    shown = ["sync.token=..." if each.startswith("sync.token=") else each for each in arguments]
    command = " ".join(["python -m recipes.demo", *shown])
    try:
        return run(options, command)
    except TwinkleError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def run(options: argparse.Namespace, command: str) -> int:
    """The demo from the warm-up to the verdict."""
    started = time.perf_counter()
    output = Path(options.output)
    config = _configure(options)
    _say("1/4  policy: build it and warm it up")
    _quieten()
    from recipes.prepare import prepare
    from recipes.summary import Runs, show, summarize, write

    warm_up = prepare(config)
    synced, control = _train_both(config, options.control_steps, output)
    _say("4/4  report")
    runs = Runs(config, warm_up, synced.records, control.records, command, time.perf_counter() - started)
    summary = summarize(runs)
    write(summary, output)
    show(summary, output)
    for failure in summary.failures:
        print(f"demo: {failure}", file=sys.stderr)
    return 1 if summary.failures else 0


def _train_both(config: RecipeConfig, control_steps: int, output: Path) -> tuple[History, History]:
    from recipes.grpo_lightning import train

    _say("2/4  server: stock vLLM loads the policy; its log is server.log")
    with served(config.model.path, output / "server.log") as server:
        sync = config.sync_options(rollouts=server.url)
        _say(f"3/4  training: {config.steps} steps, {server.url} synced after each")
        synced = train(config.changed(sync=sync, output_dir=output / "synced"))
        _say(f"     control: {control_steps} steps from the same weights, synced at the start only")
        control = config.changed(sync=sync, output_dir=output / "control", steps=control_steps)
        return synced, train(control.without_sync())


def _configure(options: argparse.Namespace) -> RecipeConfig:
    config = RecipeConfig.load(options.config, options.overrides)
    seed = config.seed if options.seed is None else options.seed
    model = {**config.model.model_dump(), "path": Path(options.output) / "policy"}
    if options.control_steps < 1:
        raise ConfigError(f"--control-steps {options.control_steps}: the control needs at least one step")
    return config.changed(seed=seed, model=model)


def _quieten() -> None:
    """Leaves the terminal to the progress of the run, and half of the cores to the server."""
    import lightning.pytorch  # noqa: F401 -- sets its logger's level when imported
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores // 2)))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # lightning 2.6 on torch 2.13, in lightning/pytorch/utilities/_pytree.py; until lightning asks `is_leaf()`.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def _say(message: str) -> None:
    print(f"== {message}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="GRPO on arithmetic with a synced vLLM server, and a control without.")
    parser.add_argument("--config", default="configs/grpo_arithmetic.yaml", metavar="FILE")
    parser.add_argument("--output", default="runs/demo", metavar="FOLDER")
    parser.add_argument("--seed", type=int, help="of weights and prompts (default: the configuration's)")
    parser.add_argument("--control-steps", type=int, default=20, metavar="N", help="steps without sync (default: 20)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as steps=60")
    return parser


if __name__ == "__main__":
    sys.exit(main())
