r"""Solvers of the linear fixed point $v = J^\top v + u$ that `Implicit` meets in the backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from unrolled import _check


class Solution(NamedTuple):
    """What a solver found."""

    v: Tensor  # (batch, features)
    residual: float  # ||g(v) - v|| / ||g(v)|| of the worst sample, where v was looked at last
    num_iters: int  # how often g was applied


class Solver(Protocol):
    r"""Finds $v = g(v)$ with $g(v) = J^\top v + u$ for every row: `solver(g, u, tol, max_iters)`.

    It begins at u and ends once the relative residual of every row is at most `tol`, or after `max_iters` products.
    """

    def __call__(self, g: Callable[[Tensor], Tensor], u: Tensor, tol: float, max_iters: int) -> Solution: ...


@dataclass(frozen=True)
class Neumann:
    r"""$v \leftarrow J^\top v + u$ from $v = u$: after n steps the first terms $\sum_{j \le n} (J^\top)^j u$.

    One product and one addition a step, and nothing to go wrong where J contracts: the error falls by the contraction
    factor q in each. To reach `tol` takes about $\ln \mathrm{tol} / \ln q$ steps: 270 at q = 0.95 for 1e-6, 2756 at
    0.995.

    Example:
        >>> v, residual, num_iters = Neumann()(lambda v: 0.5 * v + 1, torch.ones(1, 1), 1e-3, 50)
        >>> round(v.item(), 3), num_iters
        (1.998, 9)
    """

    def __call__(self, g: Callable[[Tensor], Tensor], u: Tensor, tol: float, max_iters: int) -> Solution:
        v, best = u, Solution(u, float("inf"), 0)
        for k in range(1, max_iters + 1):
            new = g(v)
            residual = relative_change(v, new)
            v = new
            if residual < best.residual or k == 1:
                best = Solution(v, residual, k)
            if residual <= tol or not residual < float("inf"):
                break
        return best._replace(num_iters=k)


@dataclass(frozen=True)
class Anderson:
    r"""Anderson acceleration: the combination of the last steps whose residual is least, sample by sample.

    For this linear problem it is close to GMRES with a short memory: where the iteration contracts slowly it needs a
    fraction of the products that `Neumann` needs, for a few states of memory more.

    Args:
        memory: how many earlier steps are combined, at least 1. It keeps twice as many vectors of the size of the
            state while the backward pass runs.

    Example:
        >>> v, residual, num_iters = Anderson(memory=2)(lambda v: 0.9 * v + 1, torch.ones(1, 1), 1e-6, 50)
        >>> round(v.item(), 3), num_iters
        (10.0, 3)

    Reference:
        H. F. Walker and P. Ni, "Anderson Acceleration for Fixed-Point Iterations", SIAM J. Numerical Analysis 49(4),
        2011, equation (2.2).
    """

    memory: int = 5

    def __post_init__(self) -> None:
        _check.integer("memory", self.memory)

    def __call__(self, g: Callable[[Tensor], Tensor], u: Tensor, tol: float, max_iters: int) -> Solution:
        v, best = u, Solution(u, float("inf"), 0)
        images: list[Tensor] = []  # g(v) of the latest steps
        errors: list[Tensor] = []  # g(v) - v
        for k in range(1, max_iters + 1):
            image = g(v)
            residual = relative_change(v, image)
            if residual < best.residual or k == 1:
                best = Solution(image, residual, k)
            if residual <= tol or not residual < float("inf"):
                break
            images = [*images[-self.memory :], image]
            errors = [*errors[-self.memory :], image - v]
            v = image if k == 1 else _extrapolate(images, errors)
        return best._replace(num_iters=k)


def relative_change(v: Tensor, new: Tensor) -> float:
    """||new - v|| / ||new|| of the worst row; a row of zeros that stays one counts as 0."""
    change, size = torch.linalg.vector_norm(new - v, dim=-1), torch.linalg.vector_norm(new, dim=-1)
    return float(torch.where(change == 0, 0.0, change / size).max())


def _extrapolate(images: list[Tensor], errors: list[Tensor]) -> Tensor:
    """g_k - sum_j gamma_j (g_{j+1} - g_j) with the gamma that makes the same combination of errors least."""
    steps = torch.stack([new - old for old, new in itertools.pairwise(images)], -1)  # (batch, features, memory)
    drops = torch.stack([new - old for old, new in itertools.pairwise(errors)], -1)
    scale = torch.linalg.vector_norm(drops, dim=-2, keepdim=True)  # columns of norm 1, so that old ones count as well
    scale = torch.where(scale > 0, scale, 1.0)
    drops = drops / scale
    gram = drops.mT @ drops
    ridge = 10 * torch.finfo(gram.dtype).eps * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gamma = torch.linalg.solve(gram + ridge, drops.mT @ errors[-1].unsqueeze(-1))
    return images[-1] - (steps / scale @ gamma).squeeze(-1)
