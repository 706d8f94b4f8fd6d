"""What is measured of every layer, whatever the algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unrolled._tree import State, leaves, map_state
from unrolled.gradient import contraction_factor
from unrolled.report.columns import Column
from unrolled.report.recording import Layer, Run
from unrolled.step import Step

REST = 300  # units in the last place: a distance below is rounding, and its ratio to another one tells nothing


class Goal:
    """How good an output of the network is, and what a change of the network costs, in one unit.

    | given | an output's loss | unit |
    |---|---|---|
    | the truth | squared error | dB |
    | an objective F and its minimum | F minus its minimum | dB |
    | an objective F | F | share of its change from start to end |
    | nothing | squared distance to the output | share of the way from start to end |
    """

    def __init__(self, run: Run, objective: Callable[[Any], Tensor] | None, truth: Any, *, known: bool) -> None:
        self.run, self.objective, self.truth = run, objective, truth
        gap = objective is not None and run.solution is not None and known
        self.decibel = truth is not None or gap
        if truth is None and objective is not None and gap:
            self.least = float(objective(run.solution).double().mean())
        self.now = self.loss(run.output)

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return "dB" if self.decibel else "share"

    @property
    def quality(self) -> float | None:
        """How good the network is: NMSE or relative gap to the minimum in dB, the mean objective, or unknown."""
        if self.truth is not None:
            return _decibel(self.now / max(float(self.run.norm(self.truth).square().mean()), 1e-300))
        if self.objective is None:
            return None
        return _decibel(self.now / max(abs(self.least), 1e-300)) if self.decibel else self.now

    @property
    def describes(self) -> str:
        """What `quality` is."""
        if self.truth is not None:
            return "NMSE in dB"
        if self.objective is None:
            return "unknown"
        return "relative gap to the optimum in dB" if self.decibel else "mean objective"

    def loss(self, output: Any) -> float:
        """The mean loss of an output."""
        if self.truth is not None:
            return float(self.run.norm(_minus(output, self.truth)).square().mean())
        if self.objective is None:
            return float(self.run.norm(_minus(output, self.run.output)).square().mean())
        value = float(self.objective(output).double().mean())
        # What lies below the best that a solver found in finite time is as good as it.
        return max(value - self.least, 1e-7 * abs(self.least)) if self.decibel else value

    def cost(self, output: Any) -> float:
        """What it would cost if the network returned this; negative where it would be better."""
        loss = self.loss(output)
        if self.decibel:
            return 0.0 if loss == self.now else _decibel(loss / max(self.now, 1e-300))
        if self.objective is not None:
            way = abs(float(self.run.objectives[0].mean()) - self.now)
            return (loss - self.now) / way if way else math.nan
        way = float(self.run.norm(_minus(self.run.layers[0].x, self.run.output)).square().mean())
        return (loss / way) ** 0.5 if way else math.nan


def _minus(value: Any, other: Any) -> Any:
    return map_state(torch.sub, value, other)


def _decibel(ratio: float) -> float:
    return 10 * math.log10(max(ratio, 1e-300))


# ---- Columns ---------------------------------------------------------------------------------------------------------


def general_columns(run: Run, goal: Goal, truth: Any, untrained: list[Step] | None, sensitivity: bool) -> list[Column]:
    """The columns that need no theory, as far as this network and what is known of it allow."""
    columns = []
    if run.objectives:
        columns.append(Column("objective", lambda layer: run.objectives[layer.index + 1], citation="mean"))
    columns.append(Column("change", change, citation="|x+ - x| / |x+|, mean"))
    columns.append(Column("residual gain", residual_gain, citation="|x+ - x| over that of the layer before, mean"))
    if run.power_iters:
        columns.append(Column("lipschitz", largest_lipschitz, citation="largest norm of the Jacobian seen"))
    readouts = [run.layers[0].x, *(layer.new_x for layer in run.layers)]
    if all(isinstance(x, Tensor) for x in readouts) and any(bool((x == 0).any()) for x in readouts[1:]):
        columns.append(Column("zeros", zeros, citation="share of entries that are exactly 0"))
    if truth is not None:
        columns.append(
            Column("gain to truth", lambda layer: gain(layer, truth), citation="|x+ - truth| / |x - truth|, mean")
        )
        if isinstance(truth, Tensor) and bool((truth == 0).any()):
            columns.append(
                Column("precision", lambda layer: precision(layer, truth), citation="of the support, for all samples")
            )
            columns.append(
                Column("recall", lambda layer: recall(layer, truth), citation="of the support, for all samples")
            )
    if untrained is not None:
        columns.append(
            Column("drift", lambda layer: drift(layer.step, untrained[layer.index]), citation="of the parameters")
        )
    if sensitivity:
        columns += sensitivity_columns(run, goal)
    return columns


def sensitivity_columns(run: Run, goal: Goal) -> list[Column]:
    """What it costs to leave a layer out, and to run it twice."""
    alike: dict[str, float] = {}

    def once(name: str, output: Callable[[int], Any], layer: Layer) -> float:
        if run.net.tied is not True:
            return goal.cost(output(layer.index))
        if name not in alike:  # one step: whichever layer is left out, it is one iteration less
            alike[name] = goal.cost(output(0))
        return alike[name]

    what = "one iteration less" if run.net.tied is True else "without this layer"
    more = "one iteration more" if run.net.tied is True else "with this layer twice"
    return [
        Column("removal", lambda layer: once("removal", run.without, layer), citation=f"cost in {goal.unit}, {what}"),
        Column("repeat", lambda layer: once("repeat", run.repeated, layer), citation=f"cost in {goal.unit}, {more}"),
    ]


def change(layer: Layer) -> Tensor:
    size = layer.norm(layer.new_x)
    return layer.distance(layer.new_x, layer.x) / torch.where(size > 0, size, 1)


def residual_gain(layer: Layer) -> Tensor | None:
    if layer.index == 0:
        return None
    before = layer.run.layers[layer.index - 1]
    x: list[State] = [before.x, layer.x, layer.new_x]
    factor = contraction_factor(x, event_dim=layer.step.event_dim, window=1)
    return torch.where(factor.isfinite(), factor, torch.nan)


def largest_lipschitz(layer: Layer) -> float | None:
    seen = layer.probe.lipschitz()
    return None if seen is None else float(seen.max())


def zeros(layer: Layer) -> float:
    return float((layer.new_x == 0).double().mean())


def gain(layer: Layer, goal: Any) -> Tensor:
    """How much nearer the layer comes to a goal; NaN for samples that are there already."""
    before, after = layer.distance(layer.x, goal), layer.distance(layer.new_x, goal)
    resolution = REST * torch.finfo(_first(layer.new_x).dtype).eps
    return torch.where(before > resolution * layer.norm(goal), after / before, torch.nan)


def precision(layer: Layer, truth: Tensor) -> float:
    found, true = layer.new_x != 0, truth != 0
    return float((found & true).sum()) / float(found.sum()) if bool(found.any()) else math.nan


def recall(layer: Layer, truth: Tensor) -> float:
    found, true = layer.new_x != 0, truth != 0
    return float((found & true).sum()) / float(true.sum()) if bool(true.any()) else math.nan


def drift(step: Step, untrained: Step) -> float:
    """The distance of the parameters to those before training, relative to their norm."""
    here = [p.detach().to(torch.complex128 if p.is_complex() else torch.float64) for p in step.parameters()]
    there = [p.detach().to(h) for p, h in zip(untrained.parameters(), here, strict=True)]
    if not here:
        return 0.0
    distance = sum(float((h - t).abs().square().sum()) for h, t in zip(here, there, strict=True))
    size = sum(float(t.abs().square().sum()) for t in there)
    return math.sqrt(distance / size) if size else math.sqrt(distance)


def _first(value: Any) -> Tensor:
    return next(leaves(value))
