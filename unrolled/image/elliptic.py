"""Linear elliptic systems on a graph, solved exactly: dense or sparse, with gradients through the solution."""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from unrolled import _check

DENSE_NODES = 1024  # up to here a dense Cholesky factor is fast and small


class Factor(Protocol):
    """A factorised symmetric system A."""

    def solve(self, right: Tensor) -> Tensor:
        """A^-1 right for each sample, (B, N) -> (B, N)."""


def grid_edges(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The pairs of neighbouring pixels of an image, each pixel with those beside, above and below it.

    Args:
        height, width: of the image, at least 1; pixels are numbered row by row.
        device: of the result.

    Shape:
        - output: (2, E), integers; those beside each other first

    Example:
        >>> grid_edges(2, 2)
        tensor([[0, 2, 0, 1],
                [1, 3, 2, 3]])
    """
    _check.integer("height", height)
    _check.integer("width", width)
    number = torch.arange(height * width, device=device).reshape(height, width)
    beside = torch.stack([number[:, :-1].flatten(), number[:, 1:].flatten()])
    below = torch.stack([number[:-1].flatten(), number[1:].flatten()])
    return torch.cat([beside, below], 1)


def solve_elliptic(
    edges: Tensor,  # (2, E)
    weights: Tensor,  # (B, E)
    absorption: Tensor,  # (B, N)
    guidance: Tensor,  # (B, N)
    seeds: Tensor | None = None,  # (B, N)
    *,
    dense_nodes: int = DENSE_NODES,
) -> Tensor:
    r"""$(D - W + \Lambda) f = \Lambda g$ with $f = 1$ at the seeds: `solvers.seeded_diffusion`, with gradients.

    The backward pass solves once more with the transpose, which is the same symmetric matrix, and the factors of the
    forward pass: $y = A^{-T} \bar f$ for the gradient $\bar f$, then $-y_p f_p$ for the diagonal and
    $-(y_p - y_q)(f_p - f_q)$ for an edge. It can be differentiated again.

    Args:
        edges: the two ends of each edge.
        weights: $w$, at least 0.
        absorption: $\lambda$, positive.
        guidance: $g$.
        seeds: bool, True where f is 1.
        dense_nodes: up to so many nodes the system is solved by a dense Cholesky factor in torch, above by SciPy's
            sparse LU, on the CPU and in float64.

    Shape:
        - output: (B, N)

    Example:
        >>> chain = torch.tensor([[0, 1, 2], [1, 2, 3]])
        >>> ends = torch.tensor([[True, False, False, False]])
        >>> solve_elliptic(chain, torch.ones(1, 3), torch.full((1, 4), 0.5), torch.zeros(1, 4), ends)
        tensor([[1.0000, 0.5116, 0.2791, 0.1860]])
    """
    right, diagonal = absorption * guidance, absorption
    if seeds is not None:
        # Rows and columns of seeds leave the system; what flows in from them goes to the right-hand side. The system
        # keeps its size, which may differ from sample to sample otherwise.
        first, second = edges
        for here, there in ((first, second), (second, first)):
            inflow = torch.where(seeds[:, there] & ~seeds[:, here], weights, 0)
            diagonal = diagonal.index_add(1, here, inflow)
            right = right.index_add(1, here, inflow)
        diagonal = torch.where(seeds, 1, diagonal)
        right = torch.where(seeds, 1, right)
        weights = torch.where(seeds[:, first] | seeds[:, second], 0, weights)
    factor = factorize(edges, weights.detach(), diagonal.detach(), dense_nodes=dense_nodes)
    return cast(Tensor, _Solve.apply(weights, diagonal, right, edges, factor))


def factorize(edges: Tensor, weights: Tensor, diagonal: Tensor, *, dense_nodes: int = DENSE_NODES) -> Factor:
    r"""Factorise $D - W + \mathrm{diag}(\lambda)$ for each sample.

    Args:
        edges: (2, E).
        weights: $w$, (B, E).
        diagonal: $\lambda$, (B, N).
        dense_nodes: the largest N for a dense factor.
    """
    return (Dense if diagonal.shape[-1] <= dense_nodes else Sparse)(edges, weights, diagonal)


class Dense:
    """Cholesky factors, (B, N, N)."""

    def __init__(self, edges: Tensor, weights: Tensor, diagonal: Tensor) -> None:
        count, n = diagonal.shape
        first, second = edges
        matrix = diagonal.new_zeros(count, n * n)
        for here, there in ((first, second), (second, first)):
            matrix = matrix.index_add(1, here * n + there, -weights).index_add(1, here * (n + 1), weights)
        self.lower = torch.linalg.cholesky(matrix.reshape(count, n, n) + torch.diag_embed(diagonal))

    def solve(self, right: Tensor) -> Tensor:
        return torch.cholesky_solve(right.unsqueeze(-1), self.lower).squeeze(-1)


class Sparse:
    """SciPy's sparse LU factors, one a sample."""

    def __init__(self, edges: Tensor, weights: Tensor, diagonal: Tensor) -> None:
        from scipy.sparse import coo_matrix
        from scipy.sparse.linalg import splu

        first, second = edges.cpu().numpy()
        n = diagonal.shape[1]
        own = np.arange(n)
        rows, columns = (
            np.concatenate([first, second, first, second, own]),
            np.concatenate([second, first, first, second, own]),
        )
        self.lu = []
        for w, d in zip(weights.double().cpu().numpy(), diagonal.double().cpu().numpy(), strict=True):
            matrix = coo_matrix((np.concatenate([-w, -w, w, w, d]), (rows, columns)), shape=(n, n)).tocsc()
            # Positive definite: no pivoting is needed, and an order for symmetric matrices fills in least.
            self.lu.append(
                splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
            )

    def solve(self, right: Tensor) -> Tensor:
        columns = right.detach().double().cpu().numpy()
        found = np.stack([lu.solve(column) for lu, column in zip(self.lu, columns, strict=True)])
        return torch.from_numpy(found).to(right)


class _Solve(torch.autograd.Function):
    """A^-1 right, where A is made of weights and diagonal, and `factor` is its factor."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, diagonal: Tensor, right: Tensor, edges: Tensor, factor: Factor) -> Tensor:
        f = factor.solve(right)
        ctx.save_for_backward(weights, diagonal, edges, f)
        ctx.factor = factor
        return f

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        weights, diagonal, edges, f = ctx.saved_tensors
        y = cast(Tensor, _Solve.apply(weights, diagonal, grads[0], edges, ctx.factor))  # A is its own transpose
        first, second = edges
        return -(y[:, first] - y[:, second]) * (f[:, first] - f[:, second]), -y * f, y, None, None
