"""Make the policy that the recipes train and the servers load, in some seconds.

Run in the checkout:

    python -m recipes.prepare --config configs/grpo_arithmetic.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes import cli
from recipes.config import RecipeConfig

if TYPE_CHECKING:
    from recipes.policy import WarmUp


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the policy's folder and says what to run next."""
    return cli.run("Makes and warms up the policy of a recipe.", argv, _prepare_and_advise, trains=False)


def prepare(config: RecipeConfig) -> WarmUp:
    """Builds the policy, warms it up and writes it to `config.model.path`, over what is there."""
    from recipes import arithmetic, policy

    model = policy.build_policy(config.seed, config.model)
    tasks = [arithmetic.TASKS[name] for name in config.tasks]
    done = policy.warm_up(model, config.seed, config.model, config.data.max_operand, tasks, progress=_show)
    policy.save_policy(model, config.model.path)
    print(
        f"policy of {model.num_parameters():,} parameters in {config.model.path}: right with probability "
        f"{done.accuracy:.3f} after {done.steps} supervised steps, {done.seconds:.1f} s",
        flush=True,
    )
    return done


def _prepare_and_advise(config: RecipeConfig) -> None:
    prepare(config)
    print(
        f"now serve it: twinkle-callbacks serve {config.model.path} --dtype float32 --max-model-len 64 --enforce-eager "
        f"--kv-cache-memory-bytes 64M"
    )


def _show(step: int, accuracy: float) -> None:
    if step % 25 == 0:
        print(f"warm-up step {step:>4}  accuracy {accuracy:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
