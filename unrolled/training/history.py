"""`History`: what a training leaves behind besides the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """One stage of `fit_stagewise`."""

    layers: int  # how many layers the network had
    name: str
    steps: int
    first_loss: float
    last_loss: float


@dataclass(repr=False)
class History:
    """What `fit` returns.

    Attributes:
        loss: the loss of every step, before its update.
        seconds: CPU seconds of this process, over all its threads. Left out of comparisons.
        stages: the stages of `fit_stagewise`, in order; empty after `fit`.
    """

    loss: list[float] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)
    stages: list[Stage] = field(default_factory=list)

    def __len__(self) -> int:
        """How many steps were done."""
        return len(self.loss)

    def __repr__(self) -> str:
        losses = f", loss {self.loss[0]:.4g} -> {self.loss[-1]:.4g}" if self.loss else ""
        stages = f", {len(self.stages)} stages" if self.stages else ""
        return f"History({len(self)} steps{losses}{stages}, {self.seconds:.1f} s)"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers, ready for JSON."""
        stages = [stage._asdict() for stage in self.stages]
        return {"loss": list(self.loss), "seconds": self.seconds, "stages": stages}
