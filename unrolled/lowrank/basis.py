"""A dictionary for the low-rank encoders, learned from signals that are not clean."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled import _check
from unrolled.functional import positive_soft_threshold, soft_threshold


@torch.no_grad()
def fit_basis(
    x: Tensor,  # (N, m)
    rank: int,
    *,
    alpha: float,
    ridge: float = 0.0,
    nonnegative: bool = False,
    num_iters: int = 50,
) -> Tensor:  # (m, rank)
    r"""$\min_{D, S, O} \sum_i \tfrac12\|x_i - D s_i - o_i\|^2 + \tfrac{\lambda_*}{2}\|s_i\|^2 + \lambda\|o_i\|_1$.

    The columns that explain the signals best once everything sparse is taken out: where principal components would
    bend towards cars, these keep to the road. The columns are orthonormal, or with `nonnegative` (and then
    $s, o \ge 0$ as well) of norm 1.

    $S$, $O$ and $D$ take turns, where nonnegative column by column, and each is the exact minimiser while the others
    are held, so that the objective never increases. It starts at the principal components, where nonnegative at their
    positive parts, and finds a local minimum.

    The rank is what keeps the low-rank part from explaining everything: choose it small.

    Args:
        x: signals as rows.
        rank: how many columns, at most the smaller of N and m.
        alpha: $\lambda$, the weight of the l1 norm, positive, in the units of x.
        ridge: $\lambda_*$, the weight of $\tfrac12\|s\|^2$, at least 0.
        nonnegative: whether $D, s, o \ge 0$.
        num_iters: how many times all are updated, at least 1.

    Shape:
        - x: (N, m)
        - output: (m, rank)

    Raises:
        TypeError: `x` is no real floating point tensor, a number is of the wrong kind.
        ValueError: `x` is no finite matrix or zero everywhere, a number is out of its range.

    Example:
        >>> road = torch.nn.functional.normalize(torch.rand(64), dim=0)
        >>> frames = (5 + torch.rand(50, 1)) * road + 3.0 * (torch.rand(50, 64) < 0.05)
        >>> basis = fit_basis(frames, rank=1, alpha=0.05)
        >>> bool((basis.squeeze(1) @ road).abs() > 0.99)
        True
    """
    _check.finite("x", _check.tensor("x", x))
    if x.dim() != 2:
        raise ValueError(f"x must have shape (N, m) with signals as rows, got {tuple(x.shape)}.")
    if not bool(x.any()):
        raise ValueError("x is zero everywhere: no column can be learned from it. Check how it was made.")
    if _check.integer("rank", rank) > min(x.shape):
        raise ValueError(f"rank must be at most {min(x.shape)}, the smaller side of x {tuple(x.shape)}, got {rank}.")
    alpha = _check.real("alpha", alpha, above=0.0, hint="It weighs the l1 norm of the sparse part.")
    ridge = _check.real("ridge", ridge, minimum=0.0)
    num_iters = _check.integer("num_iters", num_iters)
    if nonnegative:
        return _nonnegative(x, rank, alpha, ridge, num_iters)
    return _orthonormal(x, rank, alpha, ridge, num_iters)


def _orthonormal(x: Tensor, rank: int, alpha: float, ridge: float, num_iters: int) -> Tensor:
    D = torch.linalg.svd(x, full_matrices=False).Vh[:rank].mT
    sparse = torch.zeros_like(x)
    for _ in range(num_iters):
        for _ in range(3):  # the two are cheap beside the new D, and settle slowly
            code = (x - sparse) @ D / (1 + ridge)
            sparse = soft_threshold(x - code @ D.mT, alpha)
        # The orthonormal D that is best for these codes: Procrustes' problem.
        U, _, Vh = torch.linalg.svd((x - sparse).mT @ code, full_matrices=False)
        D = U @ Vh
    return D.contiguous()


def _nonnegative(x: Tensor, rank: int, alpha: float, ridge: float, num_iters: int) -> Tensor:
    Vh = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
    # Of v and -v, the one with more above zero.
    turn = torch.where(Vh.relu().square().sum(1) < (-Vh).relu().square().sum(1), -1.0, 1.0)
    D = torch.nn.functional.normalize((turn.unsqueeze(1) * Vh).relu().mT, dim=0)
    code = (x @ D).relu()
    sparse = torch.zeros_like(x)
    for _ in range(num_iters):
        clean = x - sparse
        gram, drive = D.mT @ D, clean @ D
        for j in range(rank):
            rest = drive[:, j] - code @ gram[:, j] + code[:, j] * gram[j, j]
            code[:, j] = rest.relu() / (gram[j, j] + ridge)
        gram, drive = code.mT @ code, clean.mT @ code
        for j in range(rank):
            column = (drive[:, j] - D @ gram[:, j] + D[:, j] * gram[j, j]).relu()
            norm = torch.linalg.vector_norm(column)
            if norm > 0:  # else nothing is left for this column, and the old one stays
                # Of all unit columns the best one; its codes are found anew in the next turn.
                D[:, j] = column / norm
        sparse = positive_soft_threshold(x - code @ D.mT, alpha)
    return D
