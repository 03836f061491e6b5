"""When to push: counts real optimizer steps and says which of them are due.

The weight version of a push is the number of real optimizer steps the policy has behind it, so the same weights carry
the same version before and after a resume.
"""

from __future__ import annotations

from typing import Any


class PushSchedule:
    """Counts real optimizer steps; `due` is true after every `every_n_steps`-th one.

    Framework hooks call `record_step()` once for each step that changed the weights, and push when `due`.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        self.every_n_steps = every_n_steps
        self.steps = 0

    @property
    def version(self) -> int:
        """Version of the weights as they are now."""
        return self.steps

    @property
    def due(self) -> bool:
        return self.steps % self.every_n_steps == 0

    def record_step(self) -> bool:
        """Counts one real optimizer step and returns whether a push is due."""
        self.steps += 1
        return self.due

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
