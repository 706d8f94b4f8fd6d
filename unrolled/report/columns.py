"""The cells of a report: what a column measures, what theory predicts there and how, and one row of numbers."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrolled import _check
from unrolled.report.recording import Layer

Value = float | Tensor | None


class Kind(enum.Enum):
    """What a prediction claims.

    | | claims | where it fails |
    |---|---|---|
    | `EQUALITY` | this value, up to the tolerance | the layer is another one than the theory's |
    | `AT_MOST`, `AT_LEAST` | a law: no larger, no smaller | a condition of the law is broken |
    | `BOUND` | a law that need not be sharp: no larger | as for a law; the distance to it says nothing |
    | `MEASURED` | nothing | nowhere |
    """

    EQUALITY = "="
    AT_MOST = "≤"
    AT_LEAST = "≥"
    BOUND = "≤ (bound)"
    MEASURED = ""

    @property
    def sign(self) -> str:
        """=, ≤ or ≥; nothing where nothing is predicted."""
        return self.value[:1]


@dataclass(frozen=True)
class Column:
    r"""A quantity of every layer: how it is measured, what theory predicts for it, by which equation, and whose.

    Args:
        name: of the column.
        measure: a function of the `Layer`: a number, one number a sample (their mean is reported, NaN left out), or
            `None` where there is nothing to measure.
        predict: the number predicted, or a function of the `Layer` that returns one (or one a sample, or `None`).
        kind: what the prediction claims.
        tolerance: by how much a measured value may fail it, at least 0; relative to the prediction where that is larger
            than 1.
        equation: the formula behind the prediction, for the reader.
        citation: whose it is, or how the column is to be read.
        broken: the verdict on a layer that fails the prediction; "off theory: NAME" where not given.

    Raises:
        TypeError, ValueError: `measure` is no function, `kind` no Kind, `tolerance` is negative; a kind without a
            prediction or a prediction without a kind.

    Example:
        >>> column = Column("norm", lambda layer: layer.norm(layer.new_x), predict=1.0, kind=Kind.AT_MOST,
        ...                 equation="|x| <= 1", citation="a projection to the unit ball")
    """

    name: str
    measure: Callable[[Layer], Value]
    predict: float | Callable[[Layer], Value] | None = None
    kind: Kind = Kind.MEASURED
    tolerance: float = 1e-3
    equation: str = ""
    citation: str = ""
    broken: str = ""

    def __post_init__(self) -> None:
        if not callable(self.measure):
            raise TypeError(f"measure must be a function of a Layer, got {self.measure!r}.")
        if not isinstance(self.kind, Kind):
            raise TypeError(f"kind must be one of {', '.join(map(str, Kind))}, got {self.kind!r}.")
        if (self.predict is None) != (self.kind is Kind.MEASURED):
            raise ValueError(
                f"column {self.name!r} has predict={self.predict!r} and kind={self.kind}: a prediction must say what "
                "it claims, by a kind other than Kind.MEASURED, and Kind.MEASURED has none."
            )
        _check.real("tolerance", self.tolerance, minimum=0.0)

    def row(self, layer: Layer) -> Row:
        """This column's row for a layer."""
        measured = average(self.measure(layer))
        predicted = average(self.predict(layer) if callable(self.predict) else self.predict)
        return Row(layer.index, self.name, measured, predicted, self.kind, self.tolerance)

    @property
    def verdict(self) -> str:
        """What a layer is called that fails the prediction."""
        return self.broken or f"off theory: {self.name}"


class Row(NamedTuple):
    """One quantity of one layer. NaN stands for what cannot be told, in `measured`, and is not predicted."""

    layer: int
    quantity: str
    measured: float
    predicted: float
    kind: Kind
    tolerance: float

    @property
    def deviation(self) -> float:
        """Measured minus predicted, NaN where one of them is missing."""
        return self.measured - self.predicted

    @property
    def holds(self) -> bool | None:
        """Whether the prediction holds up to the tolerance; `None` where there is none, or nothing measured."""
        if self.kind is Kind.MEASURED or math.isnan(self.measured) or math.isnan(self.predicted):
            return None
        slack = self.tolerance * max(1.0, abs(self.predicted))
        over, under = self.measured > self.predicted + slack, self.measured < self.predicted - slack
        if self.kind is Kind.EQUALITY:
            return not (over or under)
        return not (under if self.kind is Kind.AT_LEAST else over)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain numbers and strings, `None` for NaN and infinity, ready for JSON."""
        numbers = {name: getattr(self, name) for name in ("measured", "predicted", "deviation")}
        return {
            "layer": self.layer,
            "quantity": self.quantity,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "kind": self.kind.name.lower(),
            "tolerance": self.tolerance,
            "holds": self.holds,
        }


def average(value: Value) -> float:
    """The mean of the samples that tell something; NaN where none does."""
    if value is None:
        return math.nan
    if not isinstance(value, Tensor):
        return float(value)
    value = value.detach().double()
    known = value[~value.isnan()] if value.dim() else value
    return float(known.mean()) if known.numel() else math.nan


def share(holds: Tensor) -> Tensor:
    """1 for the samples where something holds and 0 for the others, to be averaged to their share."""
    return holds.to(torch.float64)
