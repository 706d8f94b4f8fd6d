"""The robust PCA encoder: proximal steps on a code and a sparse part, with learned matrices and thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled.functional import soft_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.lowrank._steps import SeparationStep
from unrolled.solvers import Decomposition
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class RPCAStep(SeparationStep):
    r"""$r = x - D s - o,\quad s^+ = \tfrac{s + W r}{1 + \delta},\quad o^+ = S_\theta(o + \eta r)$.

    Starts as the proximal gradient method, `unrolled.solvers.separate`: $W = D^T/L$, $\eta = 1/L$,
    $\theta = \alpha/L$, $\delta = \lambda_*/L$ with $L = \|D\|_2^2 + 1$. Costs $2 m q$ multiplications a signal and
    iteration.

    Args:
        dictionary: $D$, (m, q), real, the columns span the low-rank part.
        ridge: $\lambda_*$, positive, the weight of $\tfrac12\|s\|^2$.
        alpha: $\lambda$, positive, the weight of $\|o\|_1$.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    @staticmethod
    def project(code: Tensor) -> Tensor:
        return code

    @staticmethod
    def threshold(sparse: Tensor, theta: Tensor) -> Tensor:
        return soft_threshold(sparse, theta, inplace=True)


class RPCAEncoder(Unroll):
    r"""$r = x - D_k s - o,\quad s \leftarrow \tfrac{s + W_k r}{1 + \delta_k},\quad
    o \leftarrow S_{\theta_k}(o + \eta_k r)$: robust PCA as a network of `num_iters` layers.

    Splits signals into a part in the span of a few columns and a part with few nonzeros, such as the frames of a video
    into background and what moves: $x \approx D s + o$, approximately the minimiser of

    $$\tfrac12\|x - D s - o\|^2 + \tfrac{\lambda_*}{2}\|s\|^2 + \lambda\|o\|_1 .$$

    Untrained it is the proximal gradient method, `unrolled.solvers.separate`. Training, on the objective
    (`unrolled.losses.SeparationObjective`) or on known parts (`unrolled.losses.Separation`), makes each layer worth
    many iterations. It works sample by sample: a new frame needs none of those before it. `fit_basis` gives a
    dictionary.

    The published layer has one full matrix over s and o together, of $(m + q)^2$ entries; this one learns what that
    matrix is made of, $2 m q$ entries, so that m can be the pixels of an image.

    Args:
        dictionary: $D$, (m, q), real. Scaled to $\|D\|_2 = 1$, as by `fit_basis`, it needs the fewest iterations: a
            factor of its own can be taken out of the code, with `ridge` times its inverse square.
        num_iters: number of layers K.
        ridge: $\lambda_*$, positive, in the units of $\|D\|^2$.
        alpha: $\lambda$, positive, in the units of x: entries of the sparse part below it are zero.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - x: (..., m), the dtype and device of the parameters
        - output: a `Decomposition`: low_rank $D s$ (..., m), sparse $o$ (..., m), code $s$ (..., q). It is the state
          as well: `net(x, state=net(previous))` starts from the parts of the frame before.

    Raises:
        TypeError: `dictionary` or `x` is no real floating point tensor, or their dtypes differ.
        ValueError: a wrong shape or device, NaN or infinity, a zero column, a weight that is not positive,
            `num_iters < 1`.

    Example:
        >>> dictionary = torch.linalg.qr(torch.randn(64, 3)).Q
        >>> net = RPCAEncoder(dictionary, 8, ridge=0.01, alpha=0.1)
        >>> low_rank, sparse, code = net(torch.randn(5, 64))
        >>> low_rank.shape, sparse.shape, code.shape
        (torch.Size([5, 64]), torch.Size([5, 64]), torch.Size([5, 3]))

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
        step = RPCAStep(dictionary, ridge=ridge, alpha=alpha, device=device, dtype=dtype)
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, x: Tensor, *, state: Decomposition | None = None, num_iters: int | None = None
    ) -> Decomposition:
        return super().forward(x, state=state, num_iters=num_iters)
