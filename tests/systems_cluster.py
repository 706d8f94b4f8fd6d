"""The rows of the contract suite for k-means unrolled, see `systems.py`.

The references are written here once more, centre by centre, as loops over sets and points: nothing is shared with the
steps. The hard row takes part of each step, because whole ones end exactly at a fixed point, from where on no step size
has a gradient and there is nothing left to stop early; `test_kmeans.py` holds whole steps against `solvers.lloyd`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from systems import System, _randn
from torch import Tensor

from unrolled import Unroll
from unrolled.cluster import KMeans
from unrolled.solvers.kmeans import lloyd, soft_kmeans

N, K, D = 11, 3, 4
CORNERS = 3 * torch.eye(K, D, dtype=torch.float64) + 1


def _inputs(batch: int) -> tuple[Tensor, Tensor]:
    """Points in three clouds and centres beside them, well away from the borders where a label changes."""
    which = torch.arange(N) % K
    points = CORNERS[which] + 0.5 * _randn(batch, N, D, seed=1)
    return points, CORNERS + 0.6 * _randn(batch, K, D, seed=2)


def _loops(temperature: float, step_size: float, spherical: bool) -> Callable[..., Tensor]:
    def one_set(points: Tensor, centres: Tensor, num_iters: int) -> Tensor:
        if spherical:
            points = points / points.norm(dim=1, keepdim=True)
            centres = centres / centres.norm(dim=1, keepdim=True)
        for _ in range(num_iters):
            shares = []
            for x in points:
                squares = torch.stack([(x - c).square().sum() for c in centres])
                hard = torch.nn.functional.one_hot(squares.argmin(), K).to(squares)
                shares.append(torch.softmax(-squares / temperature, 0) if temperature else hard)
            P = torch.stack(shares)
            moved = []
            for j, c in enumerate(centres):
                total = sum(p * x for p, x in zip(P[:, j], points))
                mean = total / (total.norm() if spherical else P[:, j].sum())
                new = c + step_size * (mean - c)
                moved.append(new / new.norm() if spherical else new)
            centres = torch.stack(moved)
        return centres

    def solve(num_iters: int, points: Tensor, centres: Tensor) -> Tensor:
        return torch.stack([one_set(x, c, num_iters) for x, c in zip(points, centres)])

    return solve


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "one point": ((_randn(D), _randn(K, D)), ValueError, r"points must have shape \(\.\.\., n, d\)"),
    "length": ((_randn(3, N, D), _randn(3, K, D + 1)), ValueError, rf"centres must have shape \(\.\.\., {D}\)"),
    "batch": ((_randn(3, N, D), _randn(K, D)), ValueError, "centres must have the batch dimensions of points"),
    "dtype": ((_randn(3, N, D).float(), _randn(3, K, D)), TypeError, "points is torch.float32"),
    "integers": ((torch.ones(3, N, D, dtype=torch.long), _randn(3, K, D)), TypeError, "points must be floating point"),
    "no tensor": (([[1.0]], _randn(3, K, D)), TypeError, "points must be a torch.Tensor"),
    "nan": ((torch.full((3, N, D), torch.nan).double(), _randn(3, K, D)), ValueError, "points has 132 NaN"),
    "nan centres": ((_randn(3, N, D), _randn(3, K, D) / 0), ValueError, "centres has 36 NaN"),
    "empty": ((torch.empty(3, 0, D).double(), _randn(3, K, D)), ValueError, "points is empty"),
    "device": ((torch.empty(3, N, D, device="meta").double(), _randn(3, K, D)), ValueError, "points is on meta"),
    "weights": ((*_inputs(3), -torch.ones(3, N).double()), ValueError, "weights must be at least 0"),
    "weights' shape": ((*_inputs(3), torch.ones(N).double()), ValueError, "weights must have shape"),
}


def _row(name: str, temperature: float, step_size: float, spherical: bool, reference: Callable[..., Tensor]) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        return KMeans(
            num_iters,
            temperature=temperature,
            step_size=step_size,
            spherical=spherical,
            **{"dtype": torch.float64, **options},
        )

    return System(name, make, _inputs, reference, BAD)


def _solver(name: str, temperature: float, step_size: float, spherical: bool) -> System:
    def reference(num_iters: int, points: Tensor, centres: Tensor) -> Tensor:
        options: dict[str, Any] = {"spherical": spherical, "step_size": step_size, "num_iters": num_iters}
        if temperature:
            return soft_kmeans(points, centres, temperature, **options)
        return lloyd(points, centres, **options)

    return _row(name, temperature, step_size, spherical, reference)


CLUSTER_SYSTEMS = [
    _solver("k-means", 0.0, 0.6, False),
    _solver("soft k-means", 3.0, 1.0, False),
    _row("soft k-means, loops", 3.0, 0.8, False, _loops(3.0, 0.8, False)),
    _row("spherical k-means", 0.0, 0.6, True, _loops(0.0, 0.6, True)),
    _solver("spherical soft k-means", 0.3, 1.0, True),
]
