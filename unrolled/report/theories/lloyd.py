"""What theory says of iterations of k-means, hard and soft."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.report.columns import Column, Kind, share
from unrolled.report.recording import Layer, Run
from unrolled.report.theory import Theory

LLOYD = "S. P. Lloyd, IEEE Transactions on Information Theory 28(2), 1982"


class LloydTheory(Theory):
    r"""$c_j^+ = c_j + s(\bar x_j - c_j)$ for the inertia $F(c) = \sum_i w_i \min_j \|x_i - c_j\|^2$.

    At a temperature $\tau > 0$, F is $-\tau \sum_i w_i \log \sum_j \exp(-\|x_i - c_j\|^2/\tau)$ in its place.

    | column | measured | predicted |
    |---|---|---|
    | objective | mean F, with the temperature of the first layer | |
    | monotone | share of sets with $F(c^+) \le F(c)$ | 1 |
    | decrease | share with $F(c) - F(c^+) \ge (\tfrac2s - 1) \sum_j n_j \|c^+_j - c_j\|^2$ | 1 |
    | step | $s$, in least squares over centres that have points | 1 |
    | dead | share of centres without points | |

    $n_j$ is the weight of the points of a centre. Each layer is judged by its own temperature. On the sphere
    (`spherical` steps) only the first law is known, for cosines. For a network called with points and starting centres,
    such as `KMeans`.

    Args:
        tolerance: the rise of F, relative to its size, that counts as rounding, at least 0.

    Raises:
        ValueError: a network whose readout are no centres for its first input.

    Reference:
        S. P. Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on Information Theory 28(2), 1982.
    """

    def __init__(self, *, tolerance: float = 1e-6) -> None:
        self.tolerance = tolerance

    def check(self, run: Run) -> None:
        points, centres = run.inputs[0], run.output
        if not isinstance(centres, Tensor) or centres.dim() != points.dim() or centres.shape[-1] != points.shape[-1]:
            raise ValueError(
                "LloydTheory is about centres (..., k, d) of points (..., n, d), the first input; the readout does not "
                "fit it. Pass another theory."
            )

    def objective(self, run: Run) -> Callable[[Any], Tensor]:
        first = run.layers[0]
        return lambda centres: _objective(first, centres)

    def columns(self, run: Run) -> Sequence[Column]:
        columns = [
            Column(
                "monotone",
                lambda layer: self._falls(layer, sufficient=False),
                1.0,
                Kind.AT_LEAST,
                0.0,
                "F(c+) ≤ F(c)",
                f"{LLOYD}; up to {self.tolerance:g} of F",
                "inertia rises",
            ),
            Column("step", _step, 1.0, Kind.EQUALITY, 1e-2, "c+ = the mean of its points", LLOYD),
            Column(
                "dead", lambda layer: (_parts(layer, layer.x)[1] == 0).double().mean(-1), citation="share of centres"
            ),
        ]
        if not _spherical(run.layers[0]):
            columns.insert(
                1,
                Column(
                    "decrease",
                    lambda layer: self._falls(layer, sufficient=True),
                    1.0,
                    Kind.AT_LEAST,
                    0.0,
                    "F(c) - F(c+) ≥ (2/s - 1) Σ n_j |c_j+ - c_j|²",
                    f"from the step, each centre's part being a parabola; up to {self.tolerance:g} of F",
                    "no sufficient decrease",
                ),
            )
        return columns

    def conditions(self, values: Mapping[str, float]) -> list[str]:
        step = values.get("step", 1.0)
        return [f"its step is {step:.3g}, the law needs at most 2"] if step > 2 else []

    def _falls(self, layer: Layer, *, sufficient: bool) -> Tensor:
        before, after = _objective(layer, layer.x), _objective(layer, layer.new_x)
        needed = torch.zeros_like(before)
        step = _step(layer)
        if sufficient and step > 0:  # it is NaN where all centres are at rest
            sizes = _parts(layer, layer.x)[1]
            moved = (layer.new_x - layer.x).double().square().sum(-1)
            needed = (2 / step - 1) * (sizes * moved).sum(-1)
        return share(before - after >= needed - self.tolerance * before.abs())

    def __str__(self) -> str:
        return "Lloyd's algorithm"


def _spherical(layer: Layer) -> bool:
    return bool(getattr(layer.step, "spherical", False))


def _data(layer: Layer) -> tuple[Tensor, Tensor]:
    """Points (..., n, d) and their weights (..., n), in float64."""
    points, *rest = layer.inputs
    weights = rest[1] if len(rest) > 1 and rest[1] is not None else None
    points = points.double()
    if _spherical(layer):
        points = torch.nn.functional.normalize(points, dim=-1)
    return points, points.new_ones(points.shape[:-1]) if weights is None else weights.double()


def _squares(points: Tensor, centres: Tensor) -> Tensor:  # (..., n, k)
    inner = points @ centres.mT
    return (points.square().sum(-1, keepdim=True) - 2 * inner + centres.square().sum(-1).unsqueeze(-2)).clamp(min=0)


def _temperature(layer: Layer) -> float:
    return float(getattr(layer.step, "temperature", 0.0))


def _objective(layer: Layer, centres: Tensor) -> Tensor:
    points, weights = _data(layer)
    squares, tau = _squares(points, centres.double()), _temperature(layer)
    each = squares.amin(-1) if tau == 0 else -tau * torch.logsumexp(-squares / tau, -1)
    return (weights * each).sum(-1)


def _parts(layer: Layer, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the points that belong to each centre, and how many they are."""
    points, weights = _data(layer)
    squares, tau = _squares(points, centres.double()), _temperature(layer)
    if tau == 0:
        parts = (squares.argmin(-1, keepdim=True) == torch.arange(centres.shape[-2], device=centres.device)).double()
    else:
        parts = torch.softmax(-squares / tau, -1)
    parts = parts * weights.unsqueeze(-1)
    return parts.mT @ points, parts.sum(-2)


def _step(layer: Layer) -> float:
    """s in c+ - c = s (mean - c); NaN for centres that are where they belong."""
    centres = layer.x.double()
    sums, sizes = _parts(layer, layer.x)
    alive = (sizes > 0).unsqueeze(-1)
    means = sums / torch.where(alive, sizes.unsqueeze(-1), 1)
    if _spherical(layer):
        means = torch.nn.functional.normalize(sums, dim=-1)
    pull = torch.where(alive, means - centres, 0)
    if float(pull.square().sum()) < 1e-10 * float(centres.square().sum()):
        return float("nan")
    return float((pull * (layer.new_x.double() - centres)).sum() / pull.square().sum())
