"""A low-rank part plus a sparse part: codes for a given basis, and robust PCA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from unrolled import _check
from unrolled.functional import positive_soft_threshold, soft_threshold
from unrolled.solvers._common import iterate
from unrolled.solvers.lasso import lipschitz


class Decomposition(NamedTuple):
    """A signal as a low-rank part plus a sparse part, and the code of the former: $x \\approx D s + o$."""

    low_rank: Tensor  # D s, (..., m)
    sparse: Tensor  # o, (..., m)
    code: Tensor  # s, (..., q)


def separation_objective(
    dictionary: Tensor,  # (m, q)
    x: Tensor,  # (..., m)
    code: Tensor,  # (..., q)
    sparse: Tensor,  # (..., m)
    *,
    ridge: float,
    alpha: float,
) -> Tensor:  # (...)
    r"""$F(s, o) = \tfrac12\|x - D s - o\|_2^2 + \tfrac{\lambda_*}{2}\|s\|_2^2 + \lambda\|o\|_1$ of every sample.

    With the ridge on $D$ too, the least value over all $D$ and codes is that of robust PCA with a nuclear norm: that of
    $L$ is the least $\tfrac12(\|D\|_F^2 + \|S\|_F^2)$ over all $D S = L$.

    Args:
        dictionary: $D$, real.
        x: signals.
        code: $s$, the coefficients of the low-rank part.
        sparse: $o$, the sparse part.
        ridge: $\lambda_*$, at least 0.
        alpha: $\lambda$, at least 0.

    Shape:
        - dictionary: (m, q); x, sparse: (..., m); code: (..., q)
        - output: (...)

    Raises:
        TypeError, ValueError: as for `separate`.

    Example:
        >>> separation_objective(
        ...     torch.eye(2), torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]),
        ...     ridge=0.5, alpha=0.25,
        ... )
        tensor(1.)
    """
    D = _check.dictionary("dictionary", dictionary)
    m, q = D.shape
    ridge, alpha = _check.real("ridge", ridge, minimum=0.0), _check.real("alpha", alpha, minimum=0.0)
    _check.signals("x", x, D, m, of="the dictionary")
    _check.signals("code", code, D, q, of="the dictionary")
    _check.signals("sparse", sparse, D, m, of="the dictionary")
    misfit = (x - linear(code, D) - sparse).square().sum(-1) / 2
    return misfit + ridge / 2 * code.square().sum(-1) + alpha * sparse.abs().sum(-1)


def separate(
    dictionary: Tensor,  # (m, q)
    x: Tensor,  # (..., m)
    *,
    ridge: float,
    alpha: float,
    nonnegative: bool = False,
    num_iters: int = 100,
    tol: float | None = None,
) -> Decomposition:
    r"""$r_k = x - D s_k - o_k,\quad s_{k+1} = \tfrac{s_k + D^T r_k / L}{1 + \lambda_*/L},\quad
    o_{k+1} = S_{\lambda/L}(o_k + r_k / L)$ with $L = \|D\|_2^2 + 1$.

    The proximal gradient method for `separation_objective`, which never increases. $L$ is the squared norm of
    $[D, I]$. With `nonnegative`, both are cut off below zero: $s$ before it shrinks, and $o$ as
    $[o_k + r_k/L - \lambda/L]_+$.

    Args:
        dictionary: $D$, real.
        x: signals, with the dtype and device of the dictionary.
        ridge: $\lambda_*$, at least 0.
        alpha: $\lambda$, at least 0.
        nonnegative: whether $s, o \ge 0$.
        num_iters: number of iterations, at least 1.
        tol: as for `ista`, on code and sparse part together.

    Shape:
        - dictionary: (m, q); x: (..., m)
        - output: a `Decomposition`: low_rank (..., m), sparse (..., m), code (..., q)

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, NaN or infinity, a number out of its range.

    Example:
        >>> constant = torch.ones(4, 1) / 2
        >>> parts = separate(constant, torch.tensor([1.0, 1.0, 6.0, 1.0]), ridge=0.0, alpha=0.3)
        >>> parts.low_rank, parts.sparse
        (tensor([1.1000, 1.1000, 1.1000, 1.1000]), tensor([0.0000, 0.0000, 4.6000, 0.0000]))

    Reference:
        P. Sprechmann, A. M. Bronstein and G. Sapiro, "Learning Efficient Sparse and Low Rank Models", IEEE Transactions
        on Pattern Analysis and Machine Intelligence 37(9), 2015.
    """
    D = _check.dictionary("dictionary", dictionary)
    m, q = D.shape
    ridge, alpha = _check.real("ridge", ridge, minimum=0.0), _check.real("alpha", alpha, minimum=0.0)
    _check.signals("x", x, D, m, of="the dictionary")
    L = lipschitz(D) + 1

    def update(z: Tensor) -> Tensor:
        code, sparse = z.split([q, m], dim=-1)
        residual = x - linear(code, D) - sparse
        code = code + linear(residual, D.mT) / L
        sparse = sparse + residual / L
        if nonnegative:
            code, sparse = code.relu(), positive_soft_threshold(sparse, alpha / L)
        else:
            sparse = soft_threshold(sparse, alpha / L)
        return torch.cat([code / (1 + ridge / L), sparse], dim=-1)

    z = iterate(update, x.new_zeros(*x.shape[:-1], q + m), num_iters, tol, (-1,))
    code, sparse = z.split([q, m], dim=-1)
    return Decomposition(linear(code, D), sparse, code)


def nonnegative_ista(
    dictionary: Tensor,  # (m, q)
    x: Tensor,  # (..., m)
    alpha: float,
    *,
    num_iters: int = 100,
    tol: float | None = None,
) -> Tensor:  # (..., q)
    r"""$s_{k+1} = \bigl[s_k + \tfrac1L D^T (x - D s_k) - \tfrac{\alpha}{L}\bigr]_+$ with $L = \|D\|_2^2$.

    The proximal gradient method for $\min_{s \ge 0} \tfrac12\|x - D s\|^2 + \alpha\|s\|_1$: the codes of a nonnegative
    matrix factorisation, or with $\alpha = 0$ nonnegative least squares.

    Args:
        dictionary: $D$, real.
        x: signals, with the dtype and device of the dictionary.
        alpha: weight of the l1 norm, at least 0.
        num_iters: number of iterations, at least 1.
        tol: as for `ista`.

    Shape:
        - dictionary: (m, q); x: (..., m)
        - output: (..., q)

    Raises:
        TypeError, ValueError: as for `separate`.

    Example:
        >>> nonnegative_ista(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), alpha=1.0)
        tensor([2., 0., 0.])
    """
    D = _check.dictionary("dictionary", dictionary)
    alpha = _check.real("alpha", alpha, minimum=0.0)
    _check.signals("x", x, D, len(D), of="the dictionary")
    L = lipschitz(D)

    def update(code: Tensor) -> Tensor:
        return positive_soft_threshold(code + linear(x - linear(code, D), D.mT) / L, alpha / L)

    return iterate(update, x.new_zeros(*x.shape[:-1], D.shape[1]), num_iters, tol, (-1,))


class RobustPCAResult(NamedTuple):
    """A matrix as the sum of one of low rank and a sparse one, and how many iterations that took."""

    low_rank: Tensor  # L, (m, n)
    sparse: Tensor  # S, (m, n)
    num_iters: int


def singular_value_threshold(matrix: Tensor, threshold: float | Tensor) -> Tensor:
    r"""$U\,[\Sigma - t]_+ V^H$ where $X = U \Sigma V^H$: the proximal operator of $t$ times the nuclear norm.

    Args:
        matrix: real or complex, or a batch of matrices.
        threshold: $t \ge 0$, a float or a tensor without dimensions.

    Shape:
        - matrix, output: (..., m, n)

    Raises:
        TypeError, ValueError: `matrix` has less than two dimensions or is not finite, a negative float.

    Example:
        >>> singular_value_threshold(torch.diag(torch.tensor([3.0, 1.0])), 2.0)
        tensor([[1., 0.],
                [0., 0.]])

    Reference:
        J.-F. Cai, E. J. Candès and Z. Shen, "A Singular Value Thresholding Algorithm for Matrix Completion", SIAM
        Journal on Optimization 20(4), 2010.
    """
    _check.finite("matrix", _check.tensor("matrix", matrix, allow_complex=True))
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have shape (..., m, n), got {tuple(matrix.shape)}.")
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U * positive_soft_threshold(s, threshold).unsqueeze(-2)) @ Vh


@torch.no_grad()
def robust_pca(
    matrix: Tensor,  # (m, n)
    alpha: float | None = None,
    *,
    num_iters: int = 100,
    tol: float | None = None,
) -> RobustPCAResult:
    r"""$L_{k+1} = \mathrm{SVT}_{1/\mu}(M - S_k + Y_k/\mu),\quad S_{k+1} = S_{\alpha/\mu}(M - L_{k+1} + Y_k/\mu),\quad
    Y_{k+1} = Y_k + \mu (M - L_{k+1} - S_{k+1}),\quad \mu \leftarrow 1.5\,\mu$.

    Robust PCA, also called principal component pursuit, $\min \|L\|_* + \alpha\|S\|_1$ subject to $L + S = M$, by the
    inexact method of augmented Lagrange multipliers. Where the rank of $L$ and the number of nonzeros of $S$ are small
    enough, and neither looks like the other, it recovers both exactly. Each iteration takes a singular value
    decomposition of the whole matrix. Samples may be its rows or its columns.

    No gradient flows through it.

    Args:
        matrix: $M$, real or complex, not zero everywhere.
        alpha: weight of the l1 norm, positive; $1/\sqrt{\max(m, n)}$ where not given, with which the theorem holds.
        num_iters: the most iterations, at least 1.
        tol: ends once $\|M - L - S\|_F \le \mathrm{tol}\,\|M\|_F$, positive; where not given $10^{-7}$, in half and
            single precision the square root of their machine epsilon (3e-4).

    Returns:
        A `RobustPCAResult`: low_rank and sparse, both (m, n), and num_iters, the iterations that ran. They sum to the
        matrix up to the tolerance.

    Raises:
        TypeError, ValueError: `matrix` is no finite matrix or zero everywhere, a number is out of its range.

    Example:
        >>> low_rank = torch.ones(20, 20)
        >>> sparse = torch.zeros(20, 20).index_put_((torch.arange(20), torch.arange(20)), torch.tensor(5.0))
        >>> parts = robust_pca(low_rank + sparse, tol=1e-5)
        >>> bool((parts.low_rank - low_rank).abs().max() < 1e-3)
        True

    Reference:
        Z. Lin, M. Chen and Y. Ma, "The Augmented Lagrange Multiplier Method for Exact Recovery of Corrupted Low-Rank
        Matrices", arXiv:1009.5055, 2010. The theorem is of E. J. Candès, X. Li, Y. Ma and J. Wright, "Robust Principal
        Component Analysis?", Journal of the ACM 58(3), 2011.
    """
    M = _check.finite("matrix", _check.tensor("matrix", matrix, allow_complex=True))
    if M.dim() != 2:
        raise ValueError(f"matrix must have shape (m, n), got {tuple(M.shape)}. Flatten samples into its rows.")
    if not bool(M.any()):
        raise ValueError("matrix is zero everywhere: there is nothing to decompose. Check how it was made.")
    num_iters = _check.integer("num_iters", num_iters)
    alpha = max(M.shape) ** -0.5 if alpha is None else _check.real("alpha", alpha, above=0.0)
    tol = max(1e-7, torch.finfo(M.dtype).eps ** 0.5) if tol is None else _check.real("tol", tol, above=0.0)
    norm = torch.linalg.matrix_norm(M, 2)
    size = torch.linalg.matrix_norm(M)
    Y = M / torch.maximum(norm, M.abs().max() / alpha)
    S = torch.zeros_like(M)
    mu = 1.25 / norm
    largest = 1e7 * mu
    k = 0
    residual = M
    while k < num_iters and bool(torch.linalg.matrix_norm(residual) > tol * size):
        L = singular_value_threshold(M - S + Y / mu, 1 / mu)
        S = soft_threshold(M - L + Y / mu, alpha / mu, inplace=True)
        residual = M - L - S
        Y += mu * residual
        mu = torch.minimum(1.5 * mu, largest)
        k += 1
    return RobustPCAResult(L, S, k)
