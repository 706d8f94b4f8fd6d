"""Step size and threshold of a layer, from what it does: no matter what its parameters are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Fit(NamedTuple):
    """The two numbers that describe a layer best."""

    step: float
    threshold: float


def fit(through: Callable[[Tensor], Tensor], z: Tensor, new: Tensor, pulled: Tensor) -> Fit | None:
    """(s, theta) of x+ = S_theta(z + s g), g = A'(y - A z), by least squares in s; None where there is nothing to see.

    Args:
        through: the layer, as a map of z.
        z: where it is, (batch, ...).
        new: what it makes of z.
        pulled: g.
    """
    theta = threshold_of(through, z, 3 * float(new.abs().max()))
    if theta is None:
        return None
    kept = new != 0
    g, after = double(pulled[kept]), double(new[kept])
    moved = after - double(z[kept]) + theta * torch.sgn(after)
    size = float(g.abs().square().sum())
    return Fit(float((g.conj() * moved).real.sum()) / size, theta) if size else None


def threshold_of(through: Callable[[Tensor], Tensor], z: Tensor, scale: float) -> float | None:
    """The mean theta of a layer T(z) = S_theta(M z + c), from four points far out where signs are those of M z.

    There T(z) = M z + c - theta sgn(M z). Opposite points do away with c, and points twice as far out with M.
    """
    source = torch.Generator(z.device).manual_seed(0)
    far = scale * torch.randn(z.shape, generator=source, device=z.device, dtype=z.dtype)
    ahead, behind, twice, back = (double(through(c * far)) for c in (1, -1, 2, -2))
    sign = torch.sgn(ahead)
    kept = (sign != 0) & (behind != 0) & ((torch.sgn(behind) + sign).abs() < 0.1)
    kept &= ((torch.sgn(twice) - sign).abs() < 0.1) & ((torch.sgn(back) + sign).abs() < 0.1)
    if not bool(kept.any()):
        return None
    twice_theta = (twice - back) - 2 * (ahead - behind)
    return float((twice_theta * sign.conj()).real[kept].mean()) / 2


def double(x: Tensor) -> Tensor:
    """In float64, or complex128."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)
