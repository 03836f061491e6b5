"""The verdict on tenants that trained at the same time: numbers of each, and whether the base stayed what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from recipes.config import RecipeConfig
from recipes.history import StepRecord
from recipes.rollout import Completion
from recipes.summary import RunNumbers, machine, run_checks

MIN_REWARD_GAIN = 0.1
MAX_BASE_DIFFERENCE = 1e-4  # float32 rounding: a server batches the same prompts with other requests each time


class BaseAnswers:
    """What the base answered to the same prompts over time, compared with its first answers.

    Attributes:
        during: comparisons made while all tenants trained.
        after: comparisons made when all had ended.
        same_tokens: whether all answers had the tokens of the first.
        difference: largest absolute difference of a token's logprob, as far as the tokens were the same.
    """

    def __init__(self, first: Sequence[Completion]) -> None:
        self._first = first
        self.during = self.after = 0
        self.same_tokens, self.difference = True, 0.0

    def add_during(self, answers: Sequence[Completion]) -> None:
        self._compare(answers)
        self.during += 1

    def add_after(self, answers: Sequence[Completion]) -> None:
        self._compare(answers)
        self.after += 1

    def _compare(self, answers: Sequence[Completion]) -> None:
        for before, now in zip(self._first, answers, strict=True):
            if before.token_ids != now.token_ids:
                self.same_tokens = False
                continue
            differences = (abs(a - b) for a, b in zip(before.logprobs, now.logprobs, strict=True))
            self.difference = max(self.difference, *differences)


class TenantSummary(RunNumbers):
    """One tenant.

    Attributes:
        task: what it trained.
        records: every step, and the measurement after the last.
    """

    task: str
    records: list[StepRecord]


class TenantsReport(BaseModel):
    """The content of `report.json`.

    Attributes:
        tenants: by name.
        base_comparisons_during: how often the base was asked while all tenants trained.
        base_comparisons_after: how often it was asked when all had ended.
        base_tokens_same: whether it gave the tokens that it gave before each time.
        base_logprob_difference_max: largest absolute difference of a token's logprob from what it was before.
        seconds: of the whole run.
        machine: what it ran on.
        failures: what did not come true; empty when all is well.
    """

    model_config = ConfigDict(frozen=True)

    tenants: dict[str, TenantSummary]
    base_comparisons_during: int
    base_comparisons_after: int
    base_tokens_same: bool
    base_logprob_difference_max: float
    seconds: float
    machine: dict[str, str | int]
    failures: list[str]

    @property
    def base_is_untouched(self) -> bool:
        return self.base_tokens_same and self.base_logprob_difference_max <= MAX_BASE_DIFFERENCE


def summarize(
    config: RecipeConfig, records: Mapping[str, Sequence[StepRecord]], base: BaseAnswers, seconds: float
) -> TenantsReport:
    """Computes the numbers and judges them."""
    report = TenantsReport(
        tenants={
            name: TenantSummary(
                task=config.tenants[name],
                records=list(each),
                **RunNumbers.of(config.steps, each).model_dump(),
            )
            for name, each in records.items()
        },
        base_comparisons_during=base.during,
        base_comparisons_after=base.after,
        base_tokens_same=base.same_tokens,
        base_logprob_difference_max=base.difference,
        seconds=seconds,
        machine=machine(),
        failures=[],
    )
    return report.model_copy(update={"failures": _failures(report)})


def write(report: TenantsReport, folder: Path) -> None:
    """Writes `report.json` and `report.png`."""
    from recipes.plot import draw

    (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
    draw({name: tenant.records for name, tenant in report.tenants.items()}, folder / "report.png")


def show(report: TenantsReport, folder: Path) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Adapters trained at the same time on one vLLM server")
    table.add_column("measured")
    for name, tenant in report.tenants.items():
        table.add_column(f"{name}: {tenant.task}", justify="right")
    rows = {
        "reward, first 10 steps": "{0.reward_first:.3f}",
        "reward, last 10 steps": "{0.reward_last:.3f}",
        "logprob gap after a sync, largest": "{0.logprob_gap_max:.1e}",
        "versions seen on the server": "{0.versions_committed}",
        "seconds per sync, median": "{0.sync_seconds_median:.3f}",
        "bytes per sync": "{0.bytes_per_sync:,}",
    }
    for label, value in rows.items():
        table.add_row(label, *(value.format(tenant) for tenant in report.tenants.values()))
    console = Console()
    console.print(table)
    console.print(
        f"base: asked {report.base_comparisons_during} times while all trained and {report.base_comparisons_after} "
        f"after, {'the same tokens' if report.base_tokens_same else 'other tokens'}, logprobs within "
        f"{report.base_logprob_difference_max:.1e} of those before; {report.seconds:.0f} s in all\n"
        f"{folder / 'report.json'}\n{folder / 'report.png'}",
        highlight=False,
        soft_wrap=True,
    )


def _failures(report: TenantsReport) -> list[str]:
    failures = [
        f"{name}: {text}" for name, tenant in report.tenants.items() for text in run_checks(tenant, MIN_REWARD_GAIN)
    ]
    if not report.base_comparisons_during or not report.base_comparisons_after:
        failures.append("the base was not asked both while all tenants trained and after; give them more steps")
    if not report.base_is_untouched:
        failures.append(
            f"the base answers otherwise than before: same tokens {report.base_tokens_same}, logprobs up to "
            f"{report.base_logprob_difference_max:.1e} apart, more than {MAX_BASE_DIFFERENCE:g} is not rounding"
        )
    return failures
