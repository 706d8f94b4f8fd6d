"""What head, steps and restarts share: directions, assignments, and the moves of centres; no checks, any batch."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled.solvers.kmeans import unit as unit


def one_hot(labels: Tensor, num_clusters: int, dtype: torch.dtype) -> Tensor:  # (...) -> (..., k)
    """As `torch.nn.functional.one_hot`, but of a floating point dtype, and traceable."""
    return (labels.unsqueeze(-1) == torch.arange(num_clusters, device=labels.device)).to(dtype)


def assignments(logits: Tensor, temperature: float | Tensor) -> Tensor:  # (..., k)
    """softmax(logits / temperature); one-hot at the largest (the first of equals) where the temperature is 0."""
    if not isinstance(temperature, Tensor) and temperature == 0:
        return one_hot(logits.argmax(-1), logits.shape[-1], logits.dtype)
    return torch.softmax(logits / temperature, dim=-1)


def spherical_move(centres: Tensor, sums: Tensor, step_size: float) -> Tensor:  # (..., k, d)
    """unit(C + s unit(G)): a step of fixed length towards the sum G of a centre's points, then back to the sphere."""
    return unit(centres + step_size * unit(sums))


def euclidean_move(centres: Tensor, sums: Tensor, sizes: Tensor, step_size: float) -> Tensor:  # (..., k, d)
    """C + s (G / n - C), a step towards the mean of a centre's points; a centre without points stays."""
    sizes = sizes.unsqueeze(-1)
    alive = sizes > 0
    return torch.where(alive, centres + step_size * (sums / torch.where(alive, sizes, 1.0) - centres), centres)
