"""Seeds for diffusion, chosen greedily: what they light up is a submodular function of where they are."""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled import _check
from unrolled.image.elliptic import DENSE_NODES, factorize

SLACK = 1 + 1e-9  # so that a bound stays one in spite of rounding


class Seeds(NamedTuple):
    """Seeds in the order in which they were chosen."""

    nodes: list[int]
    gains: list[float]  # by how much each made the objective grow
    evaluations: int  # how many gains were computed


def greedy_seeds(
    edges: Tensor,  # (2, E)
    weights: Tensor,  # (E,)
    absorption: Tensor,  # (N,)
    guidance: Tensor,  # (N,)
    *,
    num_seeds: int,
    value: Tensor | None = None,  # (N,)
    candidates: Tensor | None = None,  # (M,)
    lazy: bool = True,
    dense_nodes: int = DENSE_NODES,
) -> Seeds:
    r"""$\max_{|S| \le n} F(S) = \sum_p q_p f_p(S)$, one seed after the other, $f(S)$ being diffused from the seeds S.

    $f(S)$ solves $(D - W + \Lambda) f = \Lambda g$ with $f = 1$ on S. A walk from p moves to neighbours by the weights
    until it is absorbed: $f_p(S)$ is the mean of 1 for walks that have met S, and of g where the others end. So F
    counts what S covers; with $g \le 1$ and $q \ge 0$ it is monotone and submodular, and greedy seeds reach at least
    $1 - 1/e$ of the optimum.

    A seed at s changes f by a multiple of the column of s of the Green's function $G = (D - W + \Lambda)^{-1}$ given S,
    and F by $(1 - f_s)\,(Gq)_s / G_{ss}$. A gain costs one solve the first time that it is asked for. The lazy form
    asks only for those that can still be the largest; it begins with the bound $1/G_{ss} \le A_{ss}$.

    Args:
        edges: the two ends of each edge.
        weights: $w$, at least 0.
        absorption: $\lambda$, positive.
        guidance: $g$, at most 1.
        num_seeds: n, at most as many as there are candidates.
        value: $q$, at least 0; the guidance where not given.
        candidates: the nodes that may become seeds; all where not given.
        lazy: the same seeds with fewer evaluations; False computes every gain in every round.
        dense_nodes: see `solve_elliptic`.

    Returns:
        The `Seeds`. Of equal gains the node of the least number wins.

    Raises:
        TypeError, ValueError: a guidance above 1, a negative value, more seeds than candidates.

    Example:
        >>> chain = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
        >>> seeds = greedy_seeds(chain, torch.ones(4), torch.full((5,), 0.1), torch.zeros(5), num_seeds=1,
        ...                      value=torch.ones(5))
        >>> seeds.nodes
        [2]

    Reference:
        R. Liu, G. Zhong, J. Cao, Z. Lin, S. Shan and Z. Luo, "Learning to Diffuse: A New Perspective to Design PDEs for
        Visual Analysis", IEEE TPAMI 2016; M. Minoux, "Accelerated greedy algorithms for maximizing submodular set
        functions", 1978, for the lazy form.
    """
    n = len(guidance)
    value = guidance if value is None else value
    for name, field in (("guidance", guidance), ("value", value), ("weights", weights), ("absorption", absorption)):
        _check.finite(name, _check.tensor(name, field))
    if bool((guidance > 1).any()):
        raise ValueError(f"guidance must be at most 1, which is what seeds have, got {guidance.max().item():g}.")
    if bool((value < 0).any()):
        raise ValueError(f"value must be at least 0, got {value.min().item():g}: the objective would not be monotone.")
    nodes = sorted(set(range(n) if candidates is None else candidates.tolist()))
    if _check.integer("num_seeds", num_seeds) > len(nodes):
        raise ValueError(f"num_seeds must be at most {len(nodes)}, the number of candidates, got {num_seeds}.")

    objective = _Objective(edges, weights, absorption, guidance, value, dense_nodes)
    heap = [(-(objective.bound(s) if lazy else math.inf), s) for s in nodes]
    heapq.heapify(heap)
    chosen: list[int] = []
    gains = []
    for _ in range(num_seeds):
        fresh: list[tuple[float, int]] = []
        best = -math.inf
        while heap and -heap[0][0] * SLACK >= best:  # gains only shrink: an old one is a bound
            s = heapq.heappop(heap)[1]
            fresh.append((-objective.gain(s), s))
            best = max(best, -fresh[-1][0])
        gain, s = min(fresh)
        objective.add(s)
        chosen.append(s)
        gains.append(-gain)
        fresh.remove((gain, s))
        for key, node in fresh:
            heapq.heappush(heap, (key if lazy else -math.inf, node))
    return Seeds(chosen, gains, objective.evaluations)


class _Objective:
    """F(S), as a set S grows: f given S, and what is left of h = G q and of G's diagonal, in float64."""

    def __init__(
        self,
        edges: Tensor,
        weights: Tensor,
        absorption: Tensor,
        guidance: Tensor,
        value: Tensor,
        dense_nodes: int,
    ) -> None:
        weights, absorption, guidance, value = (
            x.detach().double().cpu() for x in (weights, absorption, guidance, value)
        )
        edges = edges.cpu()
        self.factor = factorize(edges, weights[None], absorption[None], dense_nodes=dense_nodes)
        self.f = self.factor.solve((absorption * guidance)[None])[0]
        self.h = self.factor.solve(value[None])[0]
        self.degree = absorption.index_add(0, edges[0], weights).index_add(0, edges[1], weights)
        self.removed = torch.zeros_like(self.f)  # what the seeds took from the diagonal of G
        self.columns: list[Tensor] = []  # G given S is G - sum_c c c'
        self.diagonal: dict[int, float] = {}
        self.evaluations = 0

    def bound(self, s: int) -> float:
        """At least the gain of a first seed at s."""
        return float((1 - self.f[s]) * self.h[s] * self.degree[s])

    def gain(self, s: int) -> float:
        self.evaluations += 1
        if s not in self.diagonal:
            self.diagonal[s] = float(self._column(s)[s])
        return float((1 - self.f[s]) * self.h[s] / (self.diagonal[s] - self.removed[s]))

    def add(self, s: int) -> None:
        column = self._column(s)
        for c in self.columns:
            column = column - c[s] * c
        unit = column / column[s].sqrt()
        self.f = self.f + unit * ((1 - self.f[s]) / unit[s])
        self.h = self.h - unit * (self.h[s] / unit[s])
        self.removed = self.removed + unit.square()
        self.columns.append(unit)

    def _column(self, s: int) -> Tensor:
        impulse = torch.zeros_like(self.f)
        impulse[s] = 1
        return self.factor.solve(impulse[None])[0]
