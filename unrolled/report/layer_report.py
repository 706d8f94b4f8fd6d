"""`LayerReport`: for every layer what is measured, what theory predicts, and a verdict."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from unrolled import _check
from unrolled._tree import describe, same_structure
from unrolled.report import html, measures, table
from unrolled.report.columns import Column, Kind, Row
from unrolled.report.corrections import Correction
from unrolled.report.recording import Run, quiet
from unrolled.report.suggestions import Suggestion, suggest
from unrolled.report.theory import Theory
from unrolled.report.verdicts import Rules, Verdict, judge
from unrolled.step import Step
from unrolled.unroll import Unroll


class LayerReport:
    r"""What every layer of an unrolled network does: measured, predicted, the deviation, and a verdict in words.

    An optical designer can say what each lens of an objective is there for. A layer of an unrolled network is an
    iteration of a solver, and theory says what iterations do; so the same can be said of it. The report runs the
    network once, measures each layer at the states that the data lead to, and compares. `print(report)` is a table.

    The report changes nothing: parameters, gradients, hooks, modes and random numbers stay as they are. A stopping rule
    is left out, all layers are run.

    | column | measures | needs |
    |---|---|---|
    | objective | its mean after the layer | an objective |
    | change | $\|x^+ - x\| / \|x^+\|$, mean | |
    | residual gain | $\|x^+ - x\|$ over that of the layer before, mean | |
    | lipschitz | the largest spectral norm seen of the layer's Jacobian, by power iteration | |
    | zeros | the share of entries that are exactly 0 | a readout that has some |
    | gain to truth | $\|x^+ - x^\star\| / \|x - x^\star\|$, mean | the truth |
    | precision, recall | of the support, all samples together | a truth with zeros |
    | removal, repeat | what leaving the layer out costs, and running it twice | |
    | drift | distance of the parameters to those before training, relative | what these were |

    A theory adds columns of its own and predictions; see `ISTATheory` and its kin, and `Theory` to write one.

    Costs of removal and repetition are in dB where the truth is known, or an objective and its minimum. With an
    objective alone they are shares of its change from start to end, with nothing of the sort shares of the way from
    start to end. In a tied network both are the same for all layers: one iteration less, or more.

    Args:
        net: the network, an `Unroll`.
        inputs: what it is called with, a tensor or a tuple; a few hundred samples, not those of the training.
        theory: the theory of its algorithm, such as `ISTATheory(dictionary, alpha=0.1)`; `None` for none.
        objective: `objective(x, *inputs)`, one number a sample, in place of the theory's.
        truth: what the network should return, of the shape of its output.
        untrained: the network before training, for the drift; where not given, the steps' `reset_parameters` and the
            theory are asked.
        rules: the limits of the verdicts; those of `Rules()` where not given.
        sensitivity: whether layers are left out and repeated, which takes K forward passes.
        power_iters: power iterations for each Jacobian, 0 to leave these columns out. More come nearer to the norm,
            always from below.
        num_probes: how many samples the Jacobians are taken of, at least 1: the first ones.

    Attributes:
        net, theory, rules: as given.
        columns: the columns by name.
        rows: the `Row`s, layer by layer.
        verdicts: the `Verdict`s, in the order of the layers.
        unit: of costs, dB or share.
        quality: how good the network is: its NMSE in dB, the relative gap to the optimum in dB, or the mean objective;
            `None` where neither truth nor objective is known.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a truth or an untrained network that does not fit; a theory that is not about such a network; an
            objective that does not return one finite number a sample.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(25, 50), dim=0)
        >>> net, y = LISTA(dictionary, 3, alpha=0.1), torch.randn(64, 25)
        >>> report = LayerReport(net, y, ISTATheory(dictionary, alpha=0.1))
        >>> print(report.value("decrease"))
        [1. 1. 1.]
        >>> report.row("step", layer=0).holds
        True

    Reference:
        A. Rahimi asked for such a language of networks, after that of lenses, in "Lessons from Optics, The Other Deep
        Learning", 2018.
    """

    def __init__(
        self,
        net: Unroll,
        inputs: Tensor | tuple[Any, ...],
        theory: Theory | None = None,
        objective: Callable[..., Tensor] | None = None,
        truth: Any = None,
        *,
        untrained: Unroll | None = None,
        rules: Rules | None = None,
        sensitivity: bool = True,
        power_iters: int = 15,
        num_probes: int = 16,
    ) -> None:
        if not isinstance(net, Unroll):
            raise TypeError(
                f"net must be an Unroll, got {type(net).__name__}. Of a compiled network pass the original; of a "
                "larger model the Unroll inside it, with the inputs that it gets there."
            )
        if theory is not None and not isinstance(theory, Theory):
            kind = f"the class {theory.__name__}" if isinstance(theory, type) else type(theory).__name__
            raise TypeError(f"theory must be a Theory such as ISTATheory(dictionary, alpha=0.1), got {kind}.")
        if objective is not None and not callable(objective):
            raise TypeError(f"objective must be called as objective(x, *inputs), got {type(objective).__name__}.")
        if rules is not None and not isinstance(rules, Rules):
            raise TypeError(f"rules must be a Rules such as Rules(stalling=0.95), got {rules!r}.")
        self.net, self.rules = net, Rules() if rules is None else rules
        self.theory = Theory() if theory is None else theory
        self._objective, self._truth, self._untrained = objective, truth, untrained
        self.sensitivity = bool(sensitivity)
        self._options = {
            "power_iters": _check.integer("power_iters", power_iters, minimum=0),
            "num_probes": _check.integer("num_probes", num_probes),
        }
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        with quiet(net):
            self.run = Run(net, given, truth, **self._options)
            self._check_truth()
            self.theory.check(self.run)
            self._measure()

    def _measure(self) -> None:
        run, theory = self.run, self.theory
        function = theory.objective(run)
        if self._objective is not None:
            mine = self._objective
            function = lambda x: mine(x, *run.inputs)  # noqa: E731
        # The theory's solution is one of the theory's objective.
        run.solution = theory.solution(run)
        if function is not None:
            readouts = [run.layers[0].x, *(layer.new_x for layer in run.layers)]
            run.objectives = [self._checked(function(x)) for x in readouts]
        self.goal = measures.Goal(run, function, self._truth, known=self._objective is None)
        self.unit, self.quality = self.goal.unit, self.goal.quality
        special = {column.name: column for column in theory.columns(run)}
        general = measures.general_columns(run, self.goal, self._truth, self.untrained_steps(), self.sensitivity)
        own = [column for column in general if column.name not in special]
        # What says how well it goes first, then theory's own, then the price of each layer.
        late = {"removal", "repeat", "drift"}
        ordered = [*special.values(), *own]
        ordered.sort(key=lambda c: (c.name in late, c.name != "objective"))
        self.columns: dict[str, Column] = {column.name: column for column in ordered}
        self.rows: list[Row] = [column.row(layer) for layer in run.layers for column in ordered]
        self.verdicts: list[Verdict] = self._judged()

    def _judged(self) -> list[Verdict]:
        layers = [[row for row in self.rows if row.layer == k] for k in range(len(self))]
        means = [float(value.mean()) for value in self.run.objectives]
        return judge(layers, self.columns, means, self.theory, self.rules, self.unit)

    def with_rules(self, rules: Rules) -> LayerReport:
        """The same report, with nothing measured again, judged by other rules.

        Args:
            rules: the limits of the verdicts.
        """
        twin = copy.copy(self)
        twin.rules = rules
        twin.verdicts = twin._judged()
        return twin

    def _check_truth(self) -> None:
        if self._truth is not None and not _alike(self._truth, self.run.output):
            raise ValueError(
                f"truth must be like what the network returns, {describe(self.run.output)}, got "
                f"{describe(self._truth)}."
            )

    def _checked(self, values: Any) -> Tensor:
        if not isinstance(values, Tensor) or values.shape != self.run.batch or values.is_complex():
            got = describe(values) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"objective must return one real number a sample, {self.run.batch}, got {got}.")
        return values.detach().double()

    def untrained_steps(self) -> list[Step] | None:
        """The steps of all layers as they were before training; `None` where it is not known of all."""
        steps: list[Step | None]
        if self._untrained is not None:
            if not isinstance(self._untrained, Unroll) or len(self._untrained) != len(self.net):
                raise ValueError(f"untrained must be an Unroll of {len(self.net)} layers, as net is.")
            steps = [self._untrained[k] for k in range(len(self.net))]
            for mine, other in zip(self.net, steps, strict=True):
                if [p.shape for p in mine.parameters()] != [p.shape for p in other.parameters()]:  # type: ignore[union-attr]
                    raise ValueError("untrained must have parameters of the shapes of net's.")
        elif self.net.tied is True:
            steps = [self.theory.untrained(self.net[0])] * len(self.net)
        else:
            steps = [self.theory.untrained(step) for step in self.net]
        known = [step for step in steps if step is not None]
        return known if len(known) == len(steps) else None

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.run.layers)

    def row(self, quantity: str, layer: int) -> Row:
        """One row.

        Args:
            quantity: the name of a column.
            layer: the number of the layer, from 0.

        Raises:
            KeyError: there is no such column.
            IndexError: there is no such layer.
        """
        self._known(quantity)
        index = range(len(self))[layer]
        return next(row for row in self.rows if row.layer == index and row.quantity == quantity)

    def value(self, quantity: str) -> np.ndarray:
        """What was measured of a quantity, (layers,).

        Args:
            quantity: the name of a column.

        Raises:
            KeyError: there is no such column.
        """
        self._known(quantity)
        return np.array([row.measured for row in self.rows if row.quantity == quantity])

    def predicted(self, quantity: str) -> np.ndarray:
        """What was predicted of a quantity, (layers,), NaN where nothing was.

        Args:
            quantity: the name of a column.

        Raises:
            KeyError: there is no such column.
        """
        self._known(quantity)
        return np.array([row.predicted for row in self.rows if row.quantity == quantity])

    def names(self, layer: int) -> list[str]:
        """The names of the verdicts on a layer.

        Args:
            layer: its number, from 0.
        """
        index = range(len(self))[layer]
        return [verdict.name for verdict in self.verdicts if verdict.layer == index]

    def _known(self, quantity: str) -> None:
        if quantity not in self.columns:
            raise KeyError(f"there is no column {quantity!r} in this report; there is {', '.join(self.columns)}.")

    # ---- What to do ----

    def suggest(self) -> list[Suggestion]:
        """Corrections that the verdicts call for, each tried on the inputs, those that help most first.

        The effect is that before any training. A correction that costs something may still pay after it.
        """
        with quiet(self.net):
            return suggest(self)

    def apply(self, suggestion: Suggestion | Correction) -> Unroll:
        """A new network with the correction, which shares with this one all layers that it leaves as they are.

        Train it, and the shared layers of this network learn with it; take `copy.deepcopy` of it to keep this one.

        Args:
            suggestion: one of `suggest()`, or a correction such as `Drop(3)`.

        Raises:
            TypeError: it is neither.
            ValueError: the correction does not fit the network.
        """
        correction = suggestion.correction if isinstance(suggestion, Suggestion) else suggestion
        if not isinstance(correction, Correction):
            raise TypeError(f"suggestion must be a Suggestion or a Correction such as Drop(3), got {correction!r}.")
        with quiet(self.net):
            return correction.apply(self)

    # ---- Output ----

    def __str__(self) -> str:
        return table.text(self)

    def __repr__(self) -> str:
        return f"LayerReport({type(self.net).__name__}, {len(self)} layers, theory={self.theory})"

    def explain(self) -> str:
        """What each column is, with its equation and citation, and the reason of every verdict."""
        return table.explanation(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings, ready for JSON."""
        return table.as_dict(self)

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return table.as_frame(self)

    def to_html(self) -> str:
        """The report as one HTML page without anything to load from elsewhere."""
        return html.page(self)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write `to_html()` to a file.

        Args:
            path: of the file.
        """
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def plot(self, quantities: Sequence[str] | None = None) -> Any:
        """A matplotlib `Figure` with a panel for each quantity: measured, predicted, and where a prediction fails.

        Args:
            quantities: names of columns; all where not given.

        Raises:
            KeyError: there is no such column.
        """
        from unrolled.plot import layer_report

        for name in quantities or ():
            self._known(name)
        return layer_report(self, quantities)

    def holds(self) -> bool:
        """Whether every prediction of every layer holds within its tolerance."""
        return all(row.holds is not False for row in self.rows)

    def predictions(self) -> list[Row]:
        """The rows that have a prediction."""
        return [row for row in self.rows if row.kind is not Kind.MEASURED and not math.isnan(row.predicted)]


def _alike(truth: Any, output: Any) -> bool:
    if isinstance(truth, Tensor) and isinstance(output, Tensor):
        return truth.shape == output.shape and truth.device == output.device
    return same_structure(truth, output)
