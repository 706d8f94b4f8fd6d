"""Iterative hard thresholding, with a number of nonzeros or a price for each."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled import _check
from unrolled.functional import hard_threshold, top_k_threshold
from unrolled.operators import LinearOperator
from unrolled.solvers._common import checked_weight, event_dims, gradient_map, iterate, start


def iht(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    sparsity: int,
    *,
    num_iters: int = 100,
    step_size: float | Tensor | None = None,
    x0: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:  # (..., n)
    r"""$x_{k+1} = H_M\bigl(x_k + s D^H (y - D x_k)\bigr)$, $H_M$ keeping the $M$ entries of largest modulus.

    Iterative hard thresholding: seeks $\min_x \|y - Dx\|^2$ over codes with at most $M$ nonzeros. It finds a local
    minimum, which depends on `x0`.

    Args:
        dictionary, y, num_iters, x0, tol: as for `ista`.
        sparsity: $M$, from 1 to n: the entries that a sample may have.
        step_size: $s$, a positive number, at most $1/\|D\|_2^2$, which is the default.

    Shape, Raises: as for `ista`.

    Example:
        >>> iht(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), sparsity=2)
        tensor([ 3., -2.,  0.])

    Reference:
        T. Blumensath and M. Davies, "Iterative Hard Thresholding for Compressed Sensing", Applied and Computational
        Harmonic Analysis 27(3), 2009.
    """
    A, s, x = start(dictionary, y, step_size, x0)
    event = event_dims(A)
    size = torch.Size(A.in_shape).numel()
    if _check.integer("sparsity", sparsity) > size:
        raise ValueError(f"sparsity must be at most {size}, the number of entries of a code, got {sparsity}.")
    gradient_step = gradient_map(A, y, s)

    def update(x: Tensor) -> Tensor:
        return top_k_threshold(gradient_step(x).flatten(event[0]), sparsity).unflatten(-1, A.in_shape)

    return iterate(update, x, num_iters, tol, event)


def iht_penalized(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    alpha: float | Tensor,
    *,
    num_iters: int = 100,
    step_size: float | Tensor | None = None,
    x0: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:  # (..., n)
    r"""$x_{k+1} = H_{\sqrt{2 \alpha s}}\bigl(x_k + s D^H (y - D x_k)\bigr)$, $H_\theta$ keeping what exceeds $\theta$.

    Seeks $\min_x \tfrac12\|y - Dx\|^2 + \alpha\|x\|_0$. It finds a local minimum, which depends on `x0`.

    Args:
        dictionary, y, num_iters, x0, tol: as for `ista`.
        alpha: the price of one nonzero, at least 0, in the units of $\|y\|^2$; a tensor is broadcast to the shape of x.
        step_size: $s$, a positive number, at most $1/\|D\|_2^2$, which is the default.

    Shape, Raises: as for `ista`.

    Example:
        >>> iht_penalized(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), alpha=0.5)
        tensor([ 3., -2.,  0.])

    Reference:
        T. Blumensath and M. Davies, "Iterative Thresholding for Sparse Approximations", Journal of Fourier Analysis
        and Applications 14, 2008.
    """
    A, s, x = start(dictionary, y, step_size, x0)
    theta = (2 * checked_weight(alpha, x) * s) ** 0.5
    gradient_step = gradient_map(A, y, s)

    def update(x: Tensor) -> Tensor:
        return hard_threshold(gradient_step(x), theta)

    return iterate(update, x, num_iters, tol, event_dims(A))
