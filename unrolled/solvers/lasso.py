"""Lasso: its objective, ISTA and FISTA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unrolled import _check
from unrolled.functional import soft_threshold
from unrolled.operators import LinearOperator, as_operator
from unrolled.solvers._common import checked_code, checked_weight, event_dims, gradient_map, iterate, start


def lipschitz(dictionary: Tensor | LinearOperator) -> Tensor:
    r"""$L = \|D\|_2^2$, the Lipschitz constant of the gradient of $\tfrac12\|y - Dx\|^2$, a differentiable scalar.

    Exact for a matrix; for an operator, the square of its `norm()`.

    Args:
        dictionary: $D$, a matrix (m, n) or a `LinearOperator`.

    Example:
        >>> lipschitz(torch.diag(torch.tensor([1.0, 3.0])))
        tensor(9.)
    """
    return as_operator(dictionary).norm().square()


def lasso_objective(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    x: Tensor,  # (..., n)
    alpha: float | Tensor,
) -> Tensor:  # (...)
    r"""$F(x) = \tfrac12\|y - Dx\|_2^2 + \alpha\|x\|_1$ of every sample.

    scikit-learn's `Lasso(alpha=alpha / m)` minimises the same function, divided by m.

    Args:
        dictionary: $D$, a matrix (m, n) with atoms as columns or a `LinearOperator`.
        y: signals.
        x: codes.
        alpha: weight of the l1 norm, at least 0; a tensor is broadcast to the shape of x.

    Shape:
        - y: (..., m), or (..., *out_shape) for an operator
        - x: (..., n), or (..., *in_shape)
        - output: (...)

    Example:
        >>> lasso_objective(torch.eye(2), torch.tensor([3.0, 0.0]), torch.tensor([1.0, -1.0]), alpha=0.5)
        tensor(3.5000)
    """
    A = as_operator(dictionary)
    _check.finite("y", A.check("y", y, A.out_shape))
    checked_code("x", x, A, y)
    misfit = (y - A(x)).abs().square().flatten(-len(A.out_shape)).sum(-1) / 2
    return misfit + (checked_weight(alpha, x) * x.abs()).sum(event_dims(A))


def ista(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    alpha: float | Tensor,
    *,
    num_iters: int = 100,
    step_size: float | Tensor | None = None,
    x0: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:  # (..., n)
    r"""$x_{k+1} = S_{\alpha s}\bigl(x_k + s D^H (y - D x_k)\bigr)$, iterative soft thresholding.

    Minimises the Lasso, `lasso_objective`, which never increases from one iteration to the next while
    $s \le 1/\|D\|_2^2$. A matrix with $n < 2 m$ is used by way of $D^H D$, once computed, any other by way of the
    residual; the answers agree to rounding.

    Args:
        dictionary: $D$, a matrix (m, n) with atoms as columns or a `LinearOperator`.
        y: signals, with the dtype and device of the dictionary.
        alpha: weight of the l1 norm, at least 0; a tensor is broadcast to the shape of x.
        num_iters: number of iterations, at least 1.
        step_size: $s$, a positive number; $1/\|D\|_2^2$ where not given. From $2/\|D\|_2^2$ on it diverges.
        x0: where to start; 0 where not given.
        tol: relative tolerance: a sample stops once $\|x_{k+1} - x_k\| \le \mathrm{tol}\,\|x_{k+1}\|$. `None` runs all
            iterations.

    Shape:
        - y: (..., m), or (..., *out_shape) for an operator
        - x0, output: (..., n), or (..., *in_shape)

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, NaN or infinity, a number out of its range.

    Example:
        >>> ista(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), alpha=1.0)
        tensor([ 2., -1.,  0.])

    Reference:
        I. Daubechies, M. Defrise and C. De Mol, "An iterative thresholding algorithm for linear inverse problems with
        a sparsity constraint", Communications on Pure and Applied Mathematics 57(11), 2004.
    """
    A, s, x = start(dictionary, y, step_size, x0)
    theta = checked_weight(alpha, x) * s
    gradient_step = gradient_map(A, y, s)

    def update(x: Tensor) -> Tensor:
        return soft_threshold(gradient_step(x), theta)

    return iterate(update, x, num_iters, tol, event_dims(A))


class _FISTAState(NamedTuple):
    x: Tensor  # (..., n)
    z: Tensor  # (..., n), the extrapolated point
    t: Tensor  # (..., 1), Nesterov's counter


def fista(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    alpha: float | Tensor,
    *,
    num_iters: int = 100,
    step_size: float | Tensor | None = None,
    x0: Tensor | None = None,
    restart: bool = False,
    tol: float | None = None,
) -> Tensor:  # (..., n)
    r"""$x_k = S_{\alpha s}\bigl(z_k + s D^H (y - D z_k)\bigr),\quad
    t_{k+1} = \tfrac12\bigl(1 + \sqrt{1 + 4 t_k^2}\bigr),\quad
    z_{k+1} = x_k + \tfrac{t_k - 1}{t_{k+1}} (x_k - x_{k-1})$.

    ISTA with Nesterov's extrapolation: its error falls like $1/k^2$ instead of $1/k$, not monotonically.

    Args:
        dictionary, y, alpha, num_iters, x0, tol: as for `ista`.
        step_size: $s$, a positive number, at most $1/\|D\|_2^2$, which is the default.
        restart: forget the momentum of a sample whenever it points uphill, $\langle z_k - x_k, x_k - x_{k-1}\rangle >
            0$; far faster near the solution.

    Shape, Raises: as for `ista`.

    Example:
        >>> fista(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), alpha=1.0, restart=True)
        tensor([ 2., -1.,  0.])

    Reference:
        A. Beck and M. Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems",
        SIAM J. Imaging Sciences 2(1), 2009, equations (4.1) to (4.3). The restart is the gradient scheme of
        B. O'Donoghue and E. Candès, "Adaptive Restart for Accelerated Gradient Schemes", Foundations of Computational
        Mathematics 15, 2015.
    """
    if not isinstance(restart, bool):
        raise TypeError(f"restart must be True or False, got {restart!r}.")
    A, s, x = start(dictionary, y, step_size, x0)
    theta = checked_weight(alpha, x) * s
    gradient_step = gradient_map(A, y, s)
    event = event_dims(A)

    def update(state: _FISTAState) -> _FISTAState:
        previous, z, t = state
        x = soft_threshold(gradient_step(z), theta)
        t_next = (1 + torch.sqrt(1 + 4 * t.square())) / 2
        momentum = (t - 1) / t_next
        if restart:
            uphill = ((z - x).conj() * (x - previous)).real.sum(event, keepdim=True) > 0
            momentum = torch.where(uphill, 0.0, momentum)
            t_next = torch.where(uphill, 1.0, t_next)
        return _FISTAState(x, x + momentum * (x - previous), t_next)

    t = torch.ones_like(x.real.sum(event, keepdim=True))
    return iterate(update, _FISTAState(x, x, t), num_iters, tol, event)
