"""What a run tells its callbacks, and how a callback ends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcore.students.base import StudentLogitsProvider

__all__ = ["Callback", "RunState"]


@dataclass
class RunState:
    """A run as its callbacks see it.

    ``loss`` is the mean training loss of the last step; ``metrics`` has what the last validation found.
    """

    student: StudentLogitsProvider
    total_steps: int
    step: int = 0
    epoch: int = 0
    loss: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    stop_reason: str | None = None

    def stop(self, reason: str) -> None:
        """End the run after this step, as if its steps had been done: it validates, saves and returns."""
        self.stop_reason = reason


class Callback:
    """Hooks of a run; each does nothing by default. Any of them may call :meth:`RunState.stop`."""

    def on_step_begin(self, state: RunState) -> None:
        """Before a step; ``state.step`` steps are done."""

    def on_step_end(self, state: RunState) -> None:
        """After a step, once a step."""

    def on_epoch_end(self, state: RunState) -> None:
        """After the last step of a pass, and its validation."""

    def on_checkpoint(self, state: RunState, path: Path) -> None:
        """After a checkpoint was written, reloaded and found equal."""
