"""`Theory`: what an algorithm's theory says of each of its layers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from unrolled.momentum import Momentum
from unrolled.report.columns import Column
from unrolled.report.recording import Run
from unrolled.step import Step

if TYPE_CHECKING:
    from unrolled.report.verdicts import Rules


class Theory:
    r"""What theory says of each layer: its columns, and where it knows them, the objective and the solution.

    A theory of your own names its columns; all else is there for those that know more. Each method may be left out.

    | method | says |
    |---|---|
    | `columns(run)` | what is measured and predicted, by which equation of whom |
    | `check(run)` | raises where the theory is not about this network |
    | `objective(run)` | the function from a readout to F, what the algorithm minimises |
    | `solution(run)` | the readout where it is smallest |
    | `untrained(step)` | a copy of the step as it was before training |
    | `conditions(values)` | which conditions of the laws a layer leaves |
    | `judge(values, rules)` | further verdicts on a layer, from its measured values |
    | `scaled(step, step_size, threshold)` | a copy with another step size and threshold |
    | `longest_step(run, index)` | by which factor a layer's step may grow |
    | `with_momentum()` | the theory of the same layers with momentum |

    Example:
        >>> class Averaging(Theory):
        ...     def columns(self, run):
        ...         return [Column("norm", lambda layer: layer.norm(layer.new_x) / layer.norm(layer.x), predict=0.5,
        ...                        kind=Kind.EQUALITY, equation="|x+| = |x| / 2", citation="the definition")]
    """

    def columns(self, run: Run) -> Sequence[Column]:
        """The theory's columns for a network at work.

        Args:
            run: the call that is reported on.
        """
        return []

    def check(self, run: Run) -> None:
        """Raise a ValueError where this theory is not about such a network.

        Args:
            run: the call that is reported on.
        """

    def objective(self, run: Run) -> Callable[[Any], Tensor] | None:
        """The function from a readout to F of every sample, (batch); `None` where nothing is minimised.

        Args:
            run: the call that is reported on, with its `inputs`.
        """
        return None

    def solution(self, run: Run) -> Any:
        """The readout of least objective, or `None` where it is not known.

        Args:
            run: the call that is reported on, with its `inputs`.
        """
        return None

    def untrained(self, step: Step) -> Step | None:
        """A copy of the step with the parameters of the classical solver, or `None` where they are not known.

        Args:
            step: a layer's step.
        """
        twin = copy.deepcopy(step)
        if isinstance(twin, Momentum):
            inner = self.untrained(twin.step)
            if inner is None:
                return None
            twin.step = inner
        reset = getattr(twin, "reset_parameters", None)
        if reset is None:
            return twin if not list(twin.parameters()) else None
        if any(
            p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in inspect.signature(reset).parameters.values()
        ):
            return None
        reset()
        return twin

    def conditions(self, values: Mapping[str, float]) -> list[str]:
        """In words, which conditions of the theory's laws a layer leaves.

        Args:
            values: the measured value of every column.
        """
        return []

    def judge(self, values: Mapping[str, float], rules: Rules) -> list[tuple[str, str]]:
        """Further verdicts on a layer: pairs of a name and a reason.

        Args:
            values: the measured value of every column.
            rules: the limits of the verdicts.
        """
        return []

    def scaled(self, step: Step, step_size: float, threshold: float) -> Step | None:
        """A copy of the step with its step size and its threshold multiplied, or `None` where that is not known how.

        Args:
            step: a layer's step.
            step_size, threshold: the factors, positive.
        """
        return None

    def longest_step(self, run: Run, index: int) -> float | None:
        """By which factor the step of a layer may be longer, by theory; `None` where that is not known.

        Args:
            run: the call that is reported on.
            index: the layer's number.
        """
        return None

    def with_momentum(self) -> Theory:
        """The theory of these layers with `Momentum` around them."""
        return Theory()

    def __str__(self) -> str:
        return "no theory" if type(self) is Theory else type(self).__name__
