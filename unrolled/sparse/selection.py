"""Support selection: the largest entries are trusted and pass the threshold unshrunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unrolled import _check
from unrolled.functional import soft_threshold


def select_support(
    z: Tensor,
    theta: float | Tensor,
    fraction: float | Tensor,
    *,
    most: float = 1.0,
    event_dim: int = 1,
) -> Tensor:
    r"""$z_i$ where $|z_i|$ is among the largest $\mathrm{round}(p n)$ and $|z_i| \ge \theta$, else $S_\theta(z_i)$.

    The soft threshold $S_\theta$ biases every entry that it keeps by $\theta$. Those that surely belong to the support
    need no such bias. With $p = 0$ this is the soft threshold, with $p = 1$ the hard one. Which entries are selected is
    a constant to autograd.

    Args:
        z: real or complex.
        theta: threshold, at least 0, a float or a real tensor that broadcasts with `z`.
        fraction: $p$ in [0, 1]: a float (checked), or a real tensor, one value for all samples or one for each, (...).
        most: the largest value that a tensor `fraction` can take; a smaller one saves time. It counts for tensors only.
        event_dim: how many trailing dimensions make up one sample of n entries.

    Shape:
        - z, output: (..., n), or (..., *event) with `event_dim` dimensions

    Raises:
        TypeError: `z` is no floating point or complex tensor, or a number is none.
        ValueError: `fraction` or `most` lies outside of [0, 1], `theta` is negative, `event_dim` too large.

    Example:
        >>> select_support(torch.tensor([3.0, -2.0, 1.0, 0.1]), theta=0.5, fraction=0.25)
        tensor([ 3.0000, -1.5000,  0.5000,  0.0000])

    Reference:
        X. Chen, J. Liu, Z. Wang and W. Yin, "Theoretical Linear Convergence of Unfolded ISTA and its Practical Weights
        and Thresholds", NeurIPS 2018.
    """
    _check.tensor("z", z, allow_complex=True)
    if _check.integer("event_dim", event_dim) > z.dim():
        raise ValueError(f"event_dim is {event_dim}, but z has {z.dim()} dimensions, its shape is {tuple(z.shape)}.")
    magnitude = z.detach().abs()
    flat = magnitude.flatten(-event_dim)
    n = flat.shape[-1]
    if not isinstance(fraction, Tensor):
        most = _unit("fraction", fraction)
        fraction = flat.new_tensor(most)
    largest = round(_unit("most", most) * n)
    if largest == 0:
        return soft_threshold(z, theta)
    if not isinstance(theta, Tensor):
        theta = magnitude.new_tensor(_check.real("theta", theta, minimum=0.0))
    keep = (magnitude >= theta).flatten(-event_dim)
    count = (fraction.detach() * n).round().expand(flat.shape[:-1])
    crowded = keep.sum(-1) > count
    if _check.can_look_at(crowded):
        # Ranking takes longer than the rest of a layer: rank only in samples where more than that many pass.
        if bool(crowded.any()):
            count = count[crowded]
            keep[crowded] &= _among_largest(flat[crowded], count, min(largest, int(count.max())))
    else:
        keep = keep & _among_largest(flat, count, largest)
    return soft_threshold(z, torch.where(keep.reshape(z.shape), 0.0, theta))


def _among_largest(
    magnitude: Tensor,  # (..., n)
    count: Tensor,  # (...)
    largest: int,
) -> Tensor:
    """Whether an entry is among the `count` largest of its sample; no `count` exceeds `largest`."""
    indices = magnitude.topk(largest).indices
    # A mask over the ranks, not a comparison with the smallest selected value: ties must not raise the count.
    selected = torch.arange(largest, device=magnitude.device) < count.unsqueeze(-1)
    return torch.zeros_like(magnitude, dtype=torch.bool).scatter(-1, indices, selected)


@dataclass(frozen=True)
class SupportSelection:
    r"""$p_k = \min(\mathrm{rate} \cdot k,\ \mathrm{maximum})$ per cent of the entries for layer $k = 1, 2, \dots$

    The defaults suit codes with about 10 % nonzeros: `maximum` should lie a little above their share.

    Args:
        rate: percentage points added in every layer, from 0 to 100.
        maximum: the most, in per cent, from 0 to 100.

    Raises:
        TypeError, ValueError: one of them is no number or out of its range.

    Example:
        >>> LISTACP(dictionary, 16, support_selection=SupportSelection(rate=1.2, maximum=13.0))   # doctest: +SKIP
    """

    rate: float = 1.2
    maximum: float = 13.0

    def __post_init__(self) -> None:
        for name in ("rate", "maximum"):
            value = getattr(self, name)
            if _check.real(name, value, minimum=0.0, hint="It is in per cent.") > 100:
                raise ValueError(f"{name} must be at most 100 (per cent), got {value}.")

    def __call__(self, z: Tensor, theta: float | Tensor, k: Tensor, *, event_dim: int = 1) -> Tensor:
        """`select_support` with the fraction of layer k, a real tensor without dimensions."""
        fraction = (self.rate * k).clamp(max=self.maximum) / 100
        return select_support(z, theta, fraction, most=self.maximum / 100, event_dim=event_dim)


def _unit(name: str, value: float) -> float:
    if _check.real(name, value, minimum=0.0, hint="It is a fraction, not a percentage.") > 1:
        raise ValueError(f"{name} must be at most 1, got {value}. It is a fraction, not a percentage.")
    return float(value)
