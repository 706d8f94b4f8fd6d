"""Where centres start: objects that choose them from data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unrolled import _check
from unrolled.solvers.kmeans import draw, kmeans_plus_plus


class Start(Protocol):
    """Chooses `num_clusters` centres (k, d) from points (n, d); the points of a spherical head come with norm 1."""

    def __call__(
        self, x: Tensor, num_clusters: int, *, weights: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class KMeansPlusPlus:
    r"""Centres by k-means++: points far from one another, see `unrolled.solvers.kmeans_plus_plus`.

    Args:
        num_candidates: draws for every centre, the best of which is taken; $2 + \lfloor\ln k\rfloor$ where not given.
    """

    num_candidates: int | None = None

    def __post_init__(self) -> None:
        if self.num_candidates is not None:
            _check.integer("num_candidates", self.num_candidates)

    def __call__(
        self, x: Tensor, num_clusters: int, *, weights: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return kmeans_plus_plus(
            x, num_clusters, weights=weights, num_candidates=self.num_candidates, generator=generator
        )


@dataclass(frozen=True)
class DataPoints:
    """Centres at points drawn at random, no row twice: cheap; copies of each other where the data have copies."""

    def __call__(
        self, x: Tensor, num_clusters: int, *, weights: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        left = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.detach().cpu().double().clone()
        chosen: list[Tensor] = []
        for _ in range(num_clusters):
            if not bool(left.any()):  # more centres than points of positive weight
                left = torch.ones_like(left).index_fill_(0, torch.cat(chosen), 0.0)
            chosen.append(draw(left, 1, generator))
            left[chosen[-1]] = 0.0
        return x[torch.cat(chosen).to(x.device)]
