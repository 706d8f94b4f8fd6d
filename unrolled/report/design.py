"""`Design`: simulate, correct, optimise, again; and a log that says why every layer is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from unrolled.report.corrections import Correction, Drop, Repeat
from unrolled.report.layer_report import LayerReport
from unrolled.report.suggestions import Suggestion
from unrolled.report.table import number
from unrolled.report.theory import Theory
from unrolled.report.verdicts import Rules, amount
from unrolled.unroll import Unroll


class Entry(NamedTuple):
    """One change of a design: what, why, and what became of it."""

    what: str
    why: str
    layers: int
    before: float | None  # the quality, see `LayerReport`
    after: float | None


class Design:
    r"""A network under design: report, correct, train, again, with the reason of every layer written down.

    | as of lenses | here |
    |---|---|
    | a first stack-up | the classical solver, untrained |
    | simulate it | `design.report()` |
    | correct what falls short | `design.apply(suggestion)` |
    | optimise | `design.optimise(train)` |
    | what each element is for | `design.reasons`, `print(design)` |

    Args:
        net: where to start. It takes part: training the design trains it; pass a copy to keep it.
        inputs, theory, objective, truth: as for `LayerReport`. They judge the design: take other data than that of the
            training, and other data again to measure the result.
        **options: further arguments of `LayerReport`.

    Attributes:
        net: the network as it is now.
        theory: its theory, which changes where the network gets momentum.
        log: an `Entry` for every change.
        reasons: for every layer, why it is there.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(25, 50), dim=0)
        >>> y = torch.randn(64, 25)
        >>> design = Design(LISTA(dictionary, 6, alpha=0.1), y, ISTATheory(dictionary, alpha=0.1))
        >>> report = design.report()
        >>> design.apply(report.suggest()[0])            # doctest: +SKIP
        >>> design.optimise(lambda net: fit(net, batches, loss, num_steps=300))   # doctest: +SKIP
        >>> len(design.reasons)
        6
    """

    def __init__(
        self,
        net: Unroll,
        inputs: Tensor | tuple[Any, ...],
        theory: Theory | None = None,
        objective: Callable[..., Tensor] | None = None,
        truth: Any = None,
        **options: Any,
    ) -> None:
        self.net, self.inputs, self.theory = net, inputs, theory
        self._given = {"objective": objective, "truth": truth, **options}
        self._report: LayerReport | None = None
        report = self.report()
        self.reasons = [f"an iteration of the classical solver ({report.theory})"] * len(report)
        self.log: list[Entry] = []
        self.start = report.quality

    def report(self, rules: Rules | None = None) -> LayerReport:
        """The report on the network as it is now; made anew after every change.

        Args:
            rules: judge by these, this time only.
        """
        if self._report is None:
            self._report = LayerReport(self.net, self.inputs, self.theory, **self._given)
        return self._report if rules is None else self._report.with_rules(rules)

    def apply(self, suggestion: Suggestion | Correction, why: str = "") -> Unroll:
        """Correct the network, and write down why.

        Args:
            suggestion: one of `design.report().suggest()`, or a correction with a reason of your own.
            why: the reason; where not given, the verdict that the suggestion answers to.

        Returns:
            The new network, which is `design.net` from now on.
        """
        report = self.report()
        correction = suggestion.correction if isinstance(suggestion, Suggestion) else suggestion
        if isinstance(suggestion, Suggestion):
            why = why or f"layer {suggestion.verdict.layer} was {suggestion.verdict.name}: {suggestion.verdict.reason}"
        net = report.apply(suggestion)
        self._follow(correction, why or "no reason given", report)
        if self.theory is not None:
            self.theory = correction.theory(self.theory)
        self._changed(net, str(correction), why or "no reason given", report.quality)
        return net

    def optimise(self, train: Callable[[Unroll], Any], why: str = "") -> Any:
        """Train the network, and write down what it brought.

        Args:
            train: called with the network, which it trains in place.
            why: the reason, for the log.

        Returns:
            What `train` returns.
        """
        before = self.report().quality
        result = train(self.net)
        self._changed(self.net, "optimise", why or "training", before)
        return result

    def _follow(self, correction: Correction, why: str, report: LayerReport) -> None:
        """Keep the reasons in step with the layers."""
        if isinstance(correction, Drop):
            self.reasons.pop(len(report) - 1 if report.net.tied is True else correction.layer)
        elif isinstance(correction, Repeat):
            k = len(report) - 1 if report.net.tied is True else correction.layer
            self.reasons.insert(k + 1, f"repeats the layer before it: {why}")
        else:
            touched = getattr(correction, "layers", None)
            layers = range(len(report)) if touched is None or report.net.tied is True else touched
            for k in layers:
                self.reasons[k] += f"; {correction}"

    def _changed(self, net: Unroll, what: str, why: str, before: float | None) -> None:
        self.net, self._report = net, None
        report = self.report()
        self.log.append(Entry(what, why, len(report), before, report.quality))

    def __str__(self) -> str:
        report = self.report()
        lines = [f"Design: {report.goal.describes}"]
        for k, entry in enumerate(self.log):
            change = (
                ""
                if entry.before is None or entry.after is None
                else f"{number(entry.before)} -> {number(entry.after)}"
            )
            lines.append(f"  {k + 1}. {entry.what}, {entry.layers} layers: {change} ({entry.why})")
        lines.append("Layers")
        for k, reason in enumerate(self.reasons):
            cost = (
                f", leaving it out costs {amount(report.row('removal', k).measured, report.unit)}"
                if report.sensitivity
                else ""
            )
            lines.append(f"  {k}: {reason}{cost}")
        return "\n".join(lines)
