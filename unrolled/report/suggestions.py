"""Suggestions: from verdicts to corrections, each with its effect as tried on the report's inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from unrolled.momentum import Momentum
from unrolled.report.corrections import AddMomentum, CapLipschitz, Correction, Drop, Repeat, Scale, Untie
from unrolled.report.recording import plain
from unrolled.report.verdicts import Verdict, amount

if TYPE_CHECKING:
    from unrolled.report.layer_report import LayerReport

LONGER = 1.05  # a step that may grow by less is long enough


class Suggestion(NamedTuple):
    """A correction, the verdict that calls for it, and what it does before any training."""

    correction: Correction
    verdict: Verdict
    effect: float  # in units of the report; negative: better
    unit: str

    @property
    def expected(self) -> str:
        """The effect in words."""
        if math.isnan(self.effect):
            return "effect unknown before training"
        if abs(self.effect) < 5e-4:
            return "changes nothing before training"
        word = "gains" if self.effect < 0 else "costs"
        return f"{word} {amount(abs(self.effect), self.unit)} before training"

    def __str__(self) -> str:
        return f"{self.correction}: {self.expected} ({self.verdict.name}: {self.verdict.reason})"


def suggest(report: LayerReport) -> list[Suggestion]:
    """Every correction that a verdict calls for and the network admits, best first.

    Args:
        report: with its verdicts.
    """
    found: dict[Correction, Suggestion] = {}
    for correction, verdict in _candidates(report):
        if correction in found:
            continue
        try:
            effect = _effect(report, correction)
        except ValueError:
            continue  # the correction says that it does not fit this network
        found[correction] = Suggestion(correction, verdict, effect, report.unit)
    return sorted(found.values(), key=lambda s: (math.isnan(s.effect), s.effect))


def _effect(report: LayerReport, correction: Correction) -> float:
    net = correction.apply(report)
    return report.goal.cost(plain(net)(*report.run.inputs))


def _candidates(report: LayerReport) -> Iterator[tuple[Correction, Verdict]]:
    """Pairs of a correction and the first verdict that calls for it."""
    last = len(report) - 1
    named: dict[str, list[Verdict]] = {}
    for verdict in report.verdicts:
        named.setdefault(verdict.name, []).append(verdict)
    for name in ("harmful", "redundant"):
        for verdict in named.get(name, []):
            yield Drop(last if report.net.tied is True else verdict.layer), verdict
    for verdict in named.get("worth repeating", []):
        yield Repeat(last if report.net.tied is True else verdict.layer), verdict
    for verdict in named.get("expansive", []):
        yield CapLipschitz(0 if report.net.tied is True else verdict.layer), verdict
    if stalling := named.get("stalling"):
        yield from _against_stalling(report, stalling)
    for name in ("step beyond 2/L", "no sufficient decrease"):
        if verdicts := named.get(name):
            yield from _shorter(report, verdicts)
    for name in ("over-thresholding", "under-thresholding"):
        if verdicts := named.get(name):
            yield from _other_threshold(report, verdicts)


def _against_stalling(report: LayerReport, verdicts: list[Verdict]) -> Iterator[tuple[Correction, Verdict]]:
    run, factors = report.run, {}
    for verdict in verdicts:
        factor = report.theory.longest_step(run, verdict.layer)
        if factor is not None and factor > LONGER:
            factors[verdict.layer] = factor
    if factors and (report.net.tied is not True or len(factors) == len(report)):
        least = min(factors.values())
        steps = tuple(least if report.net.tied is True else factors.get(k, 1.0) for k in range(len(report)))
        yield Scale(steps), verdicts[0]
    if isinstance(run.layers[0].state, Tensor) and not isinstance(report.net[0], Momentum):
        yield AddMomentum(), verdicts[0]
    if report.net.tied is not False:
        yield Untie(), verdicts[0]


def _shorter(report: LayerReport, verdicts: list[Verdict]) -> Iterator[tuple[Correction, Verdict]]:
    """Back to the step 1/L, with the same weight of the l1 norm."""
    if "step" not in report.columns:
        return
    steps = report.value("step")
    factors = {verdict.layer: 1 / float(steps[verdict.layer]) for verdict in verdicts if steps[verdict.layer] > 1.01}
    if factors:
        yield _scale(report, factors, factors), verdicts[0]


def _other_threshold(report: LayerReport, verdicts: list[Verdict]) -> Iterator[tuple[Correction, Verdict]]:
    steps, thresholds = report.value("step"), report.value("threshold")
    factors = {v.layer: float(steps[v.layer] / thresholds[v.layer]) for v in verdicts if thresholds[v.layer] > 0}
    if factors:
        yield _scale(report, {}, factors), verdicts[0]


def _scale(report: LayerReport, steps: dict[int, float], thresholds: dict[int, float]) -> Scale:
    count = range(len(report))
    if report.net.tied is True:  # one step: the first layer speaks for all
        one = [next(iter(factors.values()), 1.0) for factors in (steps, thresholds)]
        return Scale((one[0],) * len(count), (one[1],) * len(count))
    return Scale(tuple(steps.get(k, 1.0) for k in count), tuple(thresholds.get(k, 1.0) for k in count))
