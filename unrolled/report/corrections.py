"""Corrections: what may be done about a layer. Each makes a new network and shares with the old what it leaves."""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.momentum import Momentum
from unrolled.report.theory import Theory
from unrolled.step import Step
from unrolled.unroll import Unroll, _tensors

if TYPE_CHECKING:
    from unrolled.report.layer_report import LayerReport


class Correction(abc.ABC):
    """A change of a network, applied by `LayerReport.apply`."""

    @abc.abstractmethod
    def apply(self, report: LayerReport) -> Unroll:
        """The new network.

        Args:
            report: of the old one.
        """

    def theory(self, theory: Theory) -> Theory:
        """The theory of the new network.

        Args:
            theory: that of the old one.
        """
        return theory

    @abc.abstractmethod
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Drop(Correction):
    """Leave a layer out; of a tied network, run one iteration less.

    Args:
        layer: its number, from 0.
    """

    layer: int

    def apply(self, report: LayerReport) -> Unroll:
        net, k = report.net, _index(report.net, self.layer)
        if len(net) == 1:
            raise ValueError("the network has one layer: it cannot be dropped.")
        if net.tied is True:
            return net[: len(net) - 1]
        return _with(net, [step for j, step in enumerate(_steps(net)) if j != k])

    def __str__(self) -> str:
        return f"drop layer {self.layer}"


@dataclass(frozen=True)
class Repeat(Correction):
    """Insert a copy of a layer behind it, with parameters of its own; of a tied network, run one iteration more.

    Args:
        layer: its number, from 0.
    """

    layer: int

    def apply(self, report: LayerReport) -> Unroll:
        net, k = report.net, _index(report.net, self.layer)
        if net.tied is True:
            longer = net[:]
            longer.num_iters = len(net) + 1
            return longer
        steps = _steps(net)
        names = net.tied if isinstance(net.tied, tuple) else ()
        shared = [getattr(owner, key) for name in names for _, owner, key in _tensors(steps[k], name)]
        twin = copy.deepcopy(steps[k], {id(tensor): tensor for tensor in shared})
        return _with(net, [*steps[: k + 1], twin, *steps[k + 1 :]])

    def __str__(self) -> str:
        return f"repeat layer {self.layer}"


@dataclass(frozen=True)
class Untie(Correction):
    """Give every layer parameters of its own, equal at first. Buffers, which do not learn, stay shared."""

    def apply(self, report: LayerReport) -> Unroll:
        net = report.net
        if net.tied is False:
            raise ValueError("the layers of this network have parameters of their own already.")
        first, *others = [net[k] for k in range(len(net))]
        shared = {id(buffer): buffer for buffer in first.buffers()}
        part = net[:]
        part.steps = nn.ModuleList([first, *(copy.deepcopy(step, dict(shared)) for step in others)])
        part.tied = tuple(name for name, _ in first.named_buffers()) or False
        part._check_gradient()
        return part

    def __str__(self) -> str:
        return "untie the layers"


@dataclass(frozen=True)
class AddMomentum(Correction):
    """Extrapolate between the layers, by `Momentum` around every step."""

    def apply(self, report: LayerReport) -> Unroll:
        net = report.net
        if any(isinstance(step, Momentum) for step in net.steps):
            raise ValueError("the network has momentum already.")
        if not isinstance(report.run.layers[0].state, Tensor):
            raise ValueError("Momentum needs a step whose state is one Tensor.")
        part = net[:]
        part.steps = nn.ModuleList([Momentum(step) for step in _steps(net)])
        if isinstance(net.tied, tuple):
            part.tied = tuple(f"step.{name}" for name in net.tied)
        return part

    def theory(self, theory: Theory) -> Theory:
        return theory.with_momentum()

    def __str__(self) -> str:
        return "add momentum"


@dataclass(frozen=True)
class Scale(Correction):
    """Multiply the step sizes and thresholds of layers, as far as the theory knows where these are kept.

    Args:
        step_sizes: a positive factor for every layer.
        thresholds: likewise; those of the steps where not given.
    """

    step_sizes: tuple[float, ...]
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, values in (("step_sizes", self.step_sizes), ("thresholds", self.thresholds or ())):
            for k, value in enumerate(values):
                _check.real(f"{name}[{k}]", value, above=0.0)

    def apply(self, report: LayerReport) -> Unroll:
        net, thresholds = report.net, self.thresholds or self.step_sizes
        factors = list(zip(self.step_sizes, thresholds, strict=True))
        if len(factors) != len(net):
            raise ValueError(f"step_sizes has {len(factors)} factors for {len(net)} layers.")
        if net.tied is True:
            if len(set(factors)) > 1:
                raise ValueError("the layers are one step, which takes one factor. Untie them first.")
            factors = factors[:1]
        steps = []
        for step, (step_size, threshold) in zip(_steps(net), factors, strict=True):
            twin = step if step_size == threshold == 1 else report.theory.scaled(step, step_size, threshold)
            if twin is None:
                raise ValueError(
                    f"the theory ({report.theory}) does not know how to scale a {type(step).__name__} by "
                    f"{step_size:.3g} and {threshold:.3g}."
                )
            steps.append(twin)
        return _with(net, steps)

    def __str__(self) -> str:
        parts = []
        for what, values in (("step size", self.step_sizes), ("threshold", self.thresholds or self.step_sizes)):
            changed = sorted({round(value, 3) for value in values if value != 1})
            if changed:
                size = f"{changed[0]:.3g}" if len(changed) == 1 else f"{changed[0]:.3g} to {changed[-1]:.3g}"
                parts.append(f"{what} times {size}")
        return f"{' and '.join(parts) or 'change nothing'} in {_listed(self.layers)}"

    @property
    def layers(self) -> list[int]:
        """Those that change."""
        pairs = zip(self.step_sizes, self.thresholds or self.step_sizes, strict=True)
        return [k for k, pair in enumerate(pairs) if pair != (1, 1)]


@dataclass(frozen=True)
class CapLipschitz(Correction):
    """Move a layer's parameters towards those before training, no further than its Lipschitz constant needs.

    On the straight line between the two, the first point is taken where the largest constant seen is at most the limit.

    Args:
        layer: its number, from 0.
        limit: of the Lipschitz constant, positive.
    """

    layer: int
    limit: float = 1.0

    @property
    def layers(self) -> list[int]:
        """The one that changes."""
        return [self.layer]

    def __post_init__(self) -> None:
        _check.real("limit", self.limit, above=0.0)

    def apply(self, report: LayerReport) -> Unroll:
        net, k = report.net, _index(report.net, self.layer)
        untrained = report.untrained_steps()
        if untrained is None or "lipschitz" not in report.columns:
            raise ValueError("the parameters before training are not known: pass untrained=, the network as it was.")
        if self._seen(report, untrained[k]) > self.limit + report.rules.expansive:
            raise ValueError(f"even before training the layer's Lipschitz constant exceeds {self.limit:g}.")
        low, high = 0.0, 1.0
        for _ in range(7):
            middle = (low + high) / 2
            seen = self._seen(report, _between(_steps(net)[k], untrained[k], middle))
            low, high = (low, middle) if seen <= self.limit + report.rules.expansive / 2 else (middle, high)
        twin = _between(_steps(net)[k], untrained[k], high)
        return _with(net, [twin if j == k else step for j, step in enumerate(_steps(net))])

    def _seen(self, report: LayerReport, step: Step) -> float:
        """The largest constant of a step in this layer's place."""
        layer = report.run.probe.layers[self.layer]
        context = step.prepare(*layer.inputs)
        value = report.columns["lipschitz"].measure(dataclasses.replace(layer, step=step, context=context))
        return math.inf if value is None else float(value)

    def __str__(self) -> str:
        return f"cap the Lipschitz constant of layer {self.layer} at {self.limit:g}"


def _between(step: Step, other: Step, part: float) -> Step:
    twin = copy.deepcopy(step)
    with torch.no_grad():
        for mine, its in zip(twin.parameters(), other.parameters(), strict=True):
            mine.lerp_(its.to(mine), part)
    return twin


def _steps(net: Unroll) -> list[Step]:
    return cast(list[Step], list(net.steps))


def _index(net: Unroll, layer: int) -> int:
    """The position among the distinct steps."""
    if not 0 <= _check.integer("layer", layer, minimum=0) < len(net):
        raise ValueError(f"layer must be less than {len(net)}, the number of layers, got {layer}.")
    return 0 if net.tied is True else layer


def _with(net: Unroll, steps: list[Step]) -> Unroll:
    """The network with other steps; what its layers share must still be equal in all of them."""
    part = net[:]
    for name in net.tied if isinstance(net.tied, tuple) else ():
        for path, owner, key in _tensors(steps[0], name):
            mine = getattr(owner, key)
            for step in steps[1:]:
                if not torch.equal(getattr(step.get_submodule(path), key), mine):
                    raise ValueError(
                        f"the layers share {name}, which this would change in some of them. Untie them first."
                    )
    part.steps = nn.ModuleList(steps)
    if net.tied is not True:
        part.num_iters = len(steps)
    part._tie()
    return part


def _listed(layers: Sequence[int]) -> str:
    """layer 3, layers 3, 5, layers 3 to 7."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"
