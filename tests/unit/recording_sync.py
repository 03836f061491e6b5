"""A fake at the seam between the framework callbacks and `WeightSynchronizer`: it copies what a push would send."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from twinkle_callbacks.config import SyncSettings
from twinkle_callbacks.errors import SyncError
from twinkle_callbacks.report import SyncReport
from twinkle_callbacks.sources.names import select

Weights = dict[str, torch.Tensor]


class RecordingSynchronizer:
    """Has the interface of `WeightSynchronizer`. Give each test a subclass of its own: `made` holds its instances."""

    made: ClassVar[list[RecordingSynchronizer]]
    fail_at: ClassVar[int | None] = None  # version whose push raises

    def __init_subclass__(cls) -> None:
        cls.made = []

    def __init__(self, model: torch.nn.Module, **settings: Any) -> None:
        self.settings = SyncSettings.parse(settings)
        self.model = model
        self.pushes: list[tuple[int, Weights]] = []
        self.is_open = False
        self.closed = 0
        self.made.append(self)

    @property
    def versions(self) -> list[int]:
        return [version for version, _ in self.pushes]

    def open(self, version: int = 0) -> SyncReport:
        self.is_open = True
        return self.push(version)

    def push(self, version: int) -> SyncReport:
        assert self.is_open, "push after close"
        if version == self.fail_at:
            raise SyncError(f"push of version {version} failed", phase="transfer")
        self.pushes.append((version, self.gather()))
        return SyncReport(version, bytes=8, seconds=0.5, gather_s=0.1, transfer_s=0.3, commit_s=0.1)

    def gather(self) -> Weights:
        return weights_of(select(self.model, self.settings.module))

    def close(self) -> None:
        self.is_open = False
        self.closed += 1


def recorder() -> type[RecordingSynchronizer]:
    """Returns a fresh class to put in the place of `WeightSynchronizer`."""

    class Recorder(RecordingSynchronizer):
        pass

    return Recorder


class SquaredOutput(torch.nn.Module):
    """A net of two layers that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)).pow(2).mean()


def weights_of(module: torch.nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Truth:
    """Notes the weights of a module each time they differ from what they were at the last look."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.changes = [weights_of(module)]

    def look(self) -> bool:
        now = weights_of(self.module)
        changed = not same(now, self.changes[-1])
        if changed:
            self.changes.append(now)
        return changed


def assert_pushed(synchronizer: RecordingSynchronizer, truth: Truth, steps: int, first_version: int = 0) -> None:
    """Asserts one push before the first step and one for each real step, each with the weights after that step."""
    assert len(truth.changes) == steps + 1, "the case itself did not behave as the table says"
    assert synchronizer.versions == list(range(first_version, first_version + steps + 1))
    for (version, pushed), expected in zip(synchronizer.pushes, truth.changes, strict=True):
        assert same(pushed, expected), f"version {version} holds other weights than the policy had then"
