"""Verdicts: what the rows say of a layer, by rules whose limits are arguments."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unrolled import _check
from unrolled.report.columns import Column, Row
from unrolled.report.theory import Theory

AS_PREDICTED = "as predicted"


class Verdict(NamedTuple):
    """What is to be said of a layer, and why."""

    layer: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.name}: {self.reason}"


@dataclass(frozen=True)
class Rules:
    """The limits of the verdicts. They are conventions, found on a few networks: choose your own.

    Args:
        expansive: how far the largest Lipschitz constant seen may exceed 1.
        stalling: the gain above which a layer comes hardly nearer: of the distance to the truth where it is known, else
            to the theory's solution, else of the change from one layer to the next.
        redundant_db, redundant_share: what leaving a layer out must cost at least, in dB or as a share.
        load_bearing: how many times the median layer's cost of removal makes a layer load-bearing, and how many times
            that cost a layer must gain by running twice to be worth repeating.
        over_threshold: by which factor the threshold of a layer may differ from step size times alpha.
        rises: by how much of its size the mean objective may rise in a layer.

    Raises:
        TypeError, ValueError: a limit that is no number or negative.
    """

    expansive: float = 1e-3
    stalling: float = 0.98
    redundant_db: float = 0.05
    redundant_share: float = 0.01
    load_bearing: float = 2.0
    over_threshold: float = 2.0
    rises: float = 1e-6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check.real(name, value, minimum=0.0)

    def redundant(self, unit: str) -> float:
        """The limit of "redundant" in this unit, dB or share."""
        return self.redundant_db if unit == "dB" else self.redundant_share


def judge(
    rows: Sequence[Sequence[Row]],
    columns: Mapping[str, Column],
    objectives: Sequence[float],
    theory: Theory,
    rules: Rules,
    unit: str,
) -> list[Verdict]:
    """All verdicts, layer by layer.

    Args:
        rows: of every layer.
        columns: by name.
        objectives: the mean objective at the start and after every layer; empty where there is none.
        theory: whose conditions are named.
        rules: the limits.
        unit: of the costs.
    """
    costs = [
        row.measured for layer in rows for row in layer if row.quantity == "removal" and math.isfinite(row.measured)
    ]
    median = statistics.median(costs) if costs else math.nan
    found = []
    for k, layer in enumerate(rows):
        values = {row.quantity: row.measured for row in layer}
        named = [
            *_broken(layer, columns, theory.conditions(values)),
            *theory.judge(values, rules),
            *_lipschitz(values, layer, rules),
            *_progress(values, rules),
            *_objective(objectives[k : k + 2], rules),
            *_sensitivity(values, median, rules, unit),
        ]
        if not named and any(row.holds for row in layer):
            named = [(AS_PREDICTED, "every law and equality holds within its tolerance")]
        found += [Verdict(k, name, reason) for name, reason in dict(reversed(named)).items()][::-1]
    return found


def _broken(layer: Sequence[Row], columns: Mapping[str, Column], conditions: list[str]) -> list[tuple[str, str]]:
    because = f"; {'; '.join(conditions)}" if conditions else ""
    found = []
    for row in layer:
        if row.holds is False:
            column = columns[row.quantity]
            says = f"{row.quantity} is {row.measured:.4g}, predicted {row.kind.sign} {row.predicted:.4g}"
            found.append((column.verdict, says + (because if column.broken else "")))
    return found


def _lipschitz(values: Mapping[str, float], layer: Sequence[Row], rules: Rules) -> list[tuple[str, str]]:
    seen = values.get("lipschitz", math.nan)
    if not seen > 1 + rules.expansive:
        return []
    return [("expansive", f"it moves some neighbours apart by {seen:.4g}, the largest Lipschitz constant seen")]


def _progress(values: Mapping[str, float], rules: Rules) -> list[tuple[str, str]]:
    for name in ("gain to truth", "gain", "residual gain"):
        value = values.get(name, math.nan)
        if not math.isnan(value):
            if value > 1 + rules.expansive:
                return [("changes grow" if name == "residual gain" else "moving away", f"{name} is {value:.3g}")]
            return [("stalling", f"{name} is {value:.3g}, above {rules.stalling:g}")] if value > rules.stalling else []
    return []


def _objective(pair: Sequence[float], rules: Rules) -> list[tuple[str, str]]:
    if len(pair) < 2 or not pair[1] > pair[0] + rules.rises * abs(pair[0]):
        return []
    return [("objective rises", f"the mean objective goes from {pair[0]:.4g} to {pair[1]:.4g}")]


def _sensitivity(values: Mapping[str, float], median: float, rules: Rules, unit: str) -> list[tuple[str, str]]:
    removal, repeat = values.get("removal", math.nan), values.get("repeat", math.nan)
    limit = rules.redundant(unit)
    found = []
    if removal < -limit:
        found.append(("harmful", f"without it the result is {amount(-removal, unit)} better"))
    elif removal < limit:
        found.append(("redundant", f"leaving it out costs {amount(removal, unit)}, less than {amount(limit, unit)}"))
    elif removal > rules.load_bearing * max(median, limit):
        reason = f"leaving it out costs {amount(removal, unit)}, the median layer {amount(median, unit)}"
        found.append(("load-bearing", reason))
    if -repeat > rules.load_bearing * max(median, limit):
        found.append(("worth repeating", f"running it twice gains {amount(-repeat, unit)}"))
    return found


def amount(value: float, unit: str) -> str:
    """A cost in words: 0.3 dB, or 2 % of what the network does."""
    return f"{value:.2g} dB" if unit == "dB" else f"{100 * value:.2g} %"
