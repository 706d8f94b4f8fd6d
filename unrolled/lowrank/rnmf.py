"""The robust NMF encoder: the robust PCA encoder with nothing below zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.functional import positive_soft_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.lowrank._steps import SeparationStep
from unrolled.solvers import Decomposition
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class RobustNMFStep(SeparationStep):
    r"""$r = x - D s - o,\quad s^+ = \tfrac{[s + W r]_+}{1 + \delta},\quad o^+ = [o + \eta r - \theta]_+$.

    Starts as the proximal gradient method, `unrolled.solvers.separate(..., nonnegative=True)`. The learned $D$ is the
    modulus of `raw_dictionary`, so that it stays nonnegative; $W$ is free.

    Args:
        dictionary: $D$, (m, q), at least 0 everywhere.
        ridge: $\lambda_*$, positive, the weight of $\tfrac12\|s\|^2$.
        alpha: $\lambda$, positive, the weight of $\|o\|_1$.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    nonnegative = True

    @staticmethod
    def project(code: Tensor) -> Tensor:
        return code.relu()

    @staticmethod
    def threshold(sparse: Tensor, theta: Tensor) -> Tensor:
        return positive_soft_threshold(sparse, theta)


class RobustNMFEncoder(Unroll):
    r"""$r = x - D_k s - o,\quad s \leftarrow \tfrac{[s + W_k r]_+}{1 + \delta_k},\quad
    o \leftarrow [o + \eta_k r - \theta_k]_+$ with $D_k \ge 0$: robust NMF as a network of `num_iters` layers.

    `RPCAEncoder` where nothing is below zero: $x \approx D s + o$ with $D, s, o \ge 0$, approximately the minimiser of

    $$\tfrac12\|x - D s - o\|^2 + \tfrac{\lambda_*}{2}\|s\|^2 + \lambda\|o\|_1, \quad s, o \ge 0 .$$

    Made for magnitudes, such as spectrograms, where the sparse part adds to what is there: the voice to the music.
    Both parts of its answer are nonnegative, trained or not. Where $x$ is below $D s$, the sparse part is 0.

    Args:
        dictionary: $D$, (m, q), at least 0 everywhere; see `fit_basis`.
        num_iters: number of layers K.
        ridge, alpha, tied, gradient, stop, device, dtype: as for `RPCAEncoder`.

    Shape, Raises: as for `RPCAEncoder`; a dictionary with negative entries is a ValueError.

    Example:
        >>> net = RobustNMFEncoder(torch.rand(64, 3), 8, ridge=0.01, alpha=0.1)
        >>> low_rank, sparse, code = net(torch.rand(5, 64))
        >>> bool((low_rank >= 0).all() and (sparse >= 0).all() and (code >= 0).all())
        True

    Reference:
        P. Sprechmann, A. M. Bronstein and G. Sapiro, "Learning Efficient Sparse and Low Rank Models", IEEE Transactions
        on Pattern Analysis and Machine Intelligence 37(9), 2015.
    """

    def __init__(
        self,
        dictionary: Tensor,
        num_iters: int = 8,
        *,
        ridge: float,
        alpha: float,
        tied: bool | Sequence[str] = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = RobustNMFStep(dictionary, ridge=ridge, alpha=alpha, device=device, dtype=dtype)
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, x: Tensor, *, state: Decomposition | None = None, num_iters: int | None = None
    ) -> Decomposition:
        return super().forward(x, state=state, num_iters=num_iters)
