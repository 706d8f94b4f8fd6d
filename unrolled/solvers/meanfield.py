"""Mean-field inference in a dense conditional random field."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled import _check


def mean_field(
    logits: Tensor,  # (..., L, N)
    kernels: Sequence[Tensor],  # (..., N, N) each
    weights: Sequence[float | Tensor],
    *,
    compatibility: Tensor | None = None,  # (L, L)
    num_iters: int = 5,
    damping: float = 0.0,
) -> Tensor:  # (..., L, N)
    r"""$u_{k+1} = U - \sum_m \mu\, W_m\, \mathrm{softmax}(u_k)\, K_m^T$, from $u_0 = U$.

    Mean-field inference in a fully connected CRF of N pixels and L classes, with its kernels as matrices.

    Args:
        logits: $U$, the negative unary energies.
        kernels: $K_m$, normalised as wanted: $n^{-1} \odot K$ with $n = K 1$ for averages over the neighbours.
        weights: $W_m$, for each kernel a number, one a class (L,), or a matrix (L, L).
        compatibility: $\mu$, what a class costs next to another; Potts' $-I$ where not given.
        num_iters: number of iterations, at least 1.
        damping: how much of the last iterate stays, at least 0 and less than 1.

    Shape:
        - logits, output: (..., L, N)

    Raises:
        TypeError, ValueError: `logits` is not finite or has less than two dimensions, `kernels` and `weights` differ
            in number, `damping` or `num_iters` is out of range.

    Example:
        >>> smooth = torch.full((3, 3), 1 / 3)
        >>> noisy = torch.tensor([[2.0, 2.0, -1.0], [0.0, 0.0, 0.0]])  # the third pixel disagrees
        >>> mean_field(noisy, [smooth], [10.0]).argmax(0)
        tensor([0, 0, 0])

    Reference:
        P. Krähenbühl and V. Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
        NIPS 2011.
    """
    _check.finite("logits", _check.tensor("logits", logits))
    if logits.dim() < 2:
        raise ValueError(f"logits must have shape (..., L, N), got {tuple(logits.shape)}.")
    if len(kernels) != len(weights):
        raise ValueError(f"There are {len(kernels)} kernels and {len(weights)} weights: pass one weight a kernel.")
    num_iters = _check.integer("num_iters", num_iters)
    if not 0 <= _check.real("damping", damping) < 1:
        raise ValueError(f"damping must be at least 0 and less than 1, got {damping}.")
    mu = -torch.eye(logits.shape[-2]).to(logits) if compatibility is None else compatibility
    matrices = []
    for weight in weights:
        w = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
        matrices.append(w if w.dim() == 2 else torch.diag(w.expand(logits.shape[-2])))
    u = logits
    for _ in range(num_iters):
        q = u.softmax(-2)
        messages = sum(w @ (q @ kernel.mT) for w, kernel in zip(matrices, kernels, strict=True))
        u = damping * u + (1 - damping) * (logits - mu @ messages)
    return u
