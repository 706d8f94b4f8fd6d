"""The rows of the contract suite for LISTA with learned shrinkages, see `systems.py`.

The reference of the generalised shrinkage finds its root by bisection, unlike the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from systems import ALPHA, BAD_SIGNALS, DICTIONARY, FROM_ZERO, System, _ista, _signals
from torch import Tensor

from unrolled import LISTA, Unroll
from unrolled.shrinkage import GeneralizedShrinkage, PiecewiseLinear, Shrinkage, SoftThreshold

N = DICTIONARY.shape[1]


def bisected(x: Tensor, t: float, p: float) -> Tensor:
    """argmin_z 1/2 (z - x)^2 + t |z|^p: the larger root of z + t p z^(p-1) = |x|, or 0 where that costs less."""
    y = x.abs().clamp(min=1e-12)
    # The right side falls before `turn` and rises behind it (for p <= 0 it rises everywhere).
    turn = torch.as_tensor(t * p * (1 - p) if p > 0 else 0.0, dtype=x.dtype) ** (1 / (2 - p))
    low, high = turn.expand_as(y).clone(), y + abs(t * p) ** (1 / (2 - p)) + 1
    for _ in range(200):
        z = (low + high) / 2
        small = z + t * p * z ** (p - 1) < y
        low, high = torch.where(small, z, low), torch.where(small, high, z)
    cost = (high - y) ** 2 / 2 + t * high**p
    return torch.where(cost < y**2 / 2, high, 0.0) * x.sign()


def _proximal_gradient(p: float) -> Callable[[int, Tensor], Tensor]:
    """min_x 1/2 |y - D x|^2 + alpha sum |x|^p by proximal gradient steps of length 1/L."""

    def solve(num_iters: int, y: Tensor) -> Tensor:
        L = torch.linalg.matrix_norm(DICTIONARY, 2).item() ** 2
        x = y.new_zeros(len(y), N)
        for _ in range(num_iters):
            x = bisected(x + (y - x @ DICTIONARY.T) @ DICTIONARY / L, ALPHA / L, p)
        return x

    return solve


def _row(
    name: str,
    shrinkage: Callable[[], Shrinkage],
    reference: Callable[..., Tensor],
    dead: dict[str, str],
    **fixed: Any,
) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        return LISTA(DICTIONARY, num_iters, alpha=ALPHA, shrinkage=shrinkage(), **{**fixed, **options})

    return System(name, make, _signals, reference, BAD_SIGNALS, dead)


STILL = {"steps.0.inhibition": FROM_ZERO}
FACTORED = {"steps.0.dictionary": FROM_ZERO}
SHRINKAGE_SYSTEMS = [
    _row(
        "LISTA weighted soft",
        lambda: SoftThreshold(num_channels=N, dtype=torch.float64),
        _ista,
        STILL,
    ),
    _row(
        "LISTA generalized",
        lambda: GeneralizedShrinkage(0.5, dtype=torch.float64),
        _proximal_gradient(0.5),
        STILL,
    ),
    _row(
        "LISTA generalized, p < 0, tied",
        lambda: GeneralizedShrinkage(-0.4, num_channels=N, dtype=torch.float64),
        _proximal_gradient(-0.4),
        STILL,
        tied=True,
    ),
    _row("LISTA piecewise", lambda: PiecewiseLinear(4, 2, dtype=torch.float64), _ista, STILL),
    _row(
        "LISTA factored, piecewise a code, one dictionary",
        lambda: PiecewiseLinear(2, 2, num_channels=N, dtype=torch.float64),
        _ista,
        FACTORED,
        factored=True,
        tied=("dictionary", "shrinkage"),
    ),
]
