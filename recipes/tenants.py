"""Tenants that train adapters of one base at the same time, each in a process of its own, on one vLLM server.

    python -m recipes.tenants --config configs/tenants.yaml

Makes the base if there is none, serves it, and starts the Accelerate recipe once for each tenant, with a token that may
touch its own adapter only. Meanwhile it asks the base itself, whose answers must stay what they were. Writes
`report.json`, `report.png` and a folder for each tenant; fails if a reward did not rise, or the base changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from recipes import arithmetic, cli
from recipes.config import RecipeConfig
from recipes.history import StepRecord
from recipes.rollout import Sampler
from recipes.server import served
from recipes.tenants_report import BaseAnswers, show, summarize, write
from twinkle_callbacks import auth
from twinkle_callbacks.errors import ConfigError, TwinkleError

POLL_S = 0.5
POLLS_PER_LINE = 10
PROMPTS_PER_TASK = 16
STOP_TIMEOUT_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Trains all tenants. Returns 0 if everything came true, 1 if not."""
    return cli.run("GRPO of several adapters at once on one vLLM server.", argv, run, trains=False)


def run(config: RecipeConfig) -> int:
    """From the base to the verdict."""
    if not config.tenants or config.adapter is None:
        raise ConfigError("sections tenants and adapter are needed, as in configs/tenants.yaml")
    if config.sync.token is not None:
        raise ConfigError(f"sync.token: leave it out; the tenants' are made of the server's, from ${auth.TOKEN_ENV}")
    started, output = time.perf_counter(), config.output_dir
    output.mkdir(parents=True, exist_ok=True)
    _prepare_base(config)
    _say("2/4  server: stock vLLM loads the base; its log is server.log")
    flags = ("--enable-lora", "--max-loras", str(len(config.tenants)), "--max-lora-rank", str(config.adapter.r))
    with (
        served(config.model.path, output / "server.log", flags) as server,
        Sampler.of(config.changed(sync=config.sync_options(rollouts=server.url))) as base,
    ):
        _say(f"3/4  training: {', '.join(config.tenants)}, {config.steps} steps each; logs are */trainer.log")
        answers, records = _train_all([Trainer(config, name, server.url) for name in config.tenants], config, base)
    _say("4/4  report")
    report = summarize(config, records, answers, time.perf_counter() - started)
    write(report, output)
    show(report, output)
    for failure in report.failures:
        print(f"tenants: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


class Trainer:
    """One tenant: `recipes.grpo_accelerate` in a process of its own.

    Args:
        config: of all tenants.
        name: the tenant's, and its adapter's.
        url: address of the server.
    """

    def __init__(self, config: RecipeConfig, name: str, url: str) -> None:
        self.name = name
        self._config = config.tenant(name, url)
        self._records = self._config.output_dir / "steps.jsonl"

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Runs the process while the block runs, at most."""
        folder = self._config.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._records.unlink(missing_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False))
        command = [sys.executable, "-m", "recipes.grpo_accelerate", "--config", str(folder / "config.yaml")]
        token = auth.tenant_token(auth.load_token(), self.name)
        # One thread each, as torchrun has it: the processes share the cores.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, auth.TOKEN_ENV: token}
        with self._log.open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def records(self) -> list[StepRecord]:
        """What it has recorded so far."""
        text = self._records.read_text() if self._records.exists() else ""
        complete, _, _ = text.rpartition("\n")
        return [StepRecord.model_validate_json(line) for line in complete.splitlines()]

    def check(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether it still runs.

        Raises:
            TwinkleError: it failed; carries the end of its log.
        """
        code = process.poll()
        if code:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
            raise TwinkleError(
                f"the trainer of {self.name!r} ended with exit code {code}; {self._log} ends with\n{end}"
            )
        return code is None

    @property
    def _log(self) -> Path:
        return self._config.output_dir / "trainer.log"


def _train_all(
    trainers: Sequence[Trainer], config: RecipeConfig, base: Sampler
) -> tuple[BaseAnswers, dict[str, list[StepRecord]]]:
    """Runs all trainers to their end. Asks the base before, every half second while all of them train, and after."""
    prompts = [
        arithmetic.encode(problem.prompt)
        for task in config.tasks
        for problem in arithmetic.draw_problems(
            PROMPTS_PER_TASK,
            task=arithmetic.TASKS[task],
            max_operand=config.data.max_operand,
            seed=config.seed,
            step=0,
        )
    ]
    answers, started, polls = BaseAnswers(base.greedy(prompts)), time.perf_counter(), 0
    with ExitStack() as stack:
        processes = [stack.enter_context(trainer.running()) for trainer in trainers]
        while sum(trainer.check(process) for trainer, process in zip(trainers, processes, strict=True)):
            records = {trainer.name: trainer.records() for trainer in trainers}
            if all(0 < len(each) <= config.steps for each in records.values()):
                answers.add_during(base.greedy(prompts))
            if polls % POLLS_PER_LINE == 0:
                print(_progress(time.perf_counter() - started, config.steps, records), flush=True)
            polls += 1
            time.sleep(POLL_S)
    answers.add_after(base.greedy(prompts))
    return answers, {trainer.name: trainer.records() for trainer in trainers}


def _progress(seconds: float, steps: int, records: dict[str, list[StepRecord]]) -> str:
    parts = [f"{seconds:4.0f} s"]
    for name, each in records.items():
        reward = f"{each[-1].reward:.3f}" if each else "  -  "
        parts.append(f"{name} {max(0, len(each) - 1):>3}/{steps}  reward {reward}")
    return "   ".join(parts)


def _prepare_base(config: RecipeConfig) -> None:
    if (config.model.path / "config.json").exists():
        _say(f"1/4  base: the one in {config.model.path}")
        return
    _say("1/4  base: build it and warm it up, partly")
    from recipes.prepare import prepare

    prepare(config)


def _say(message: str) -> None:
    print(f"== {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
