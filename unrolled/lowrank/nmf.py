"""The NMF encoder: sparse nonnegative codes for a nonnegative dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.functional import positive_soft_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.lowrank._steps import FactoredStep
from unrolled.solvers import lipschitz
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class _Prepared(NamedTuple):
    x: Tensor  # (..., m)
    weight: Tensor  # W^T, (m, q)
    dictionary: Tensor  # D^T, (q, m)
    theta: Tensor  # (q,)


class NMFStep(FactoredStep):
    r"""$s^+ = [s + W (x - D s) - \theta]_+$.

    Starts as the proximal gradient method, `unrolled.solvers.nonnegative_ista`: $W = D^T/L$, $\theta = \alpha/L$ with
    $L = \|D\|_2^2$. The learned $D$ is the modulus of `raw_dictionary`, so that it stays nonnegative; $W$ is free.

    Args:
        dictionary: $D$, (m, q), at least 0 everywhere.
        alpha: weight of the l1 norm of the code, positive.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    nonnegative = True

    def __init__(
        self,
        dictionary: Tensor,  # (m, q)
        *,
        alpha: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dictionary, device, dtype)
        self.alpha = _check.real("alpha", alpha, above=0.0, hint="It weighs the l1 norm.")
        # theta = exp(log_theta): positive whatever the optimiser does, and a learning rate is relative to its size.
        self.log_theta = nn.Parameter(self.weight.new_empty(len(self.weight)))
        self.reset_parameters(dictionary)

    @property
    def theta(self) -> Tensor:
        """The thresholds, (q,), positive."""
        return self.log_theta.exp()

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        """Back to the proximal solver on this dictionary."""
        L = lipschitz(dictionary)
        self.reset_factors(dictionary, L)
        self.log_theta.copy_((self.alpha / L).log().expand_as(self.log_theta))

    def prepare(self, x: Tensor) -> _Prepared:
        return _Prepared(x, self.weight.mT, self.matrix.mT, self.theta)

    def init(self, context: _Prepared) -> Tensor:
        return context.x.new_zeros(*context.x.shape[:-1], len(self.weight))

    def forward(self, code: Tensor, context: _Prepared) -> Tensor:
        residual = context.x - code @ context.dictionary
        return positive_soft_threshold(code + residual @ context.weight, context.theta)

    def extra_repr(self) -> str:
        q, m = self.weight.shape
        return f"signal={m}, atoms={q}, alpha={self.alpha:g}"


class NMFEncoder(Unroll):
    r"""$s \leftarrow [s + W_k (x - D_k s) - \theta_k]_+$ with $D_k \ge 0$: sparse NMF codes by `num_iters` layers.

    Maps signals to nonnegative codes, $x \mapsto \arg\min_{s \ge 0} \tfrac12\|x - D s\|^2 + \alpha\|s\|_1$
    approximately. Untrained it is the proximal gradient method, `unrolled.solvers.nonnegative_ista`. As codes are
    nonnegative, the objective is that of `unrolled.losses.Lasso`, which trains it.

    Args:
        dictionary: $D$, (m, q), at least 0 everywhere; scikit-learn's `NMF().components_` are its transpose.
        num_iters: number of layers K.
        alpha: weight of the l1 norm of the code, positive, in the units of x times those of the atoms.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - x: (..., m), the dtype and device of the parameters
        - output: (..., q)

    Raises:
        TypeError: `dictionary` or `x` is no real floating point tensor, or their dtypes differ.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, negative entries in the dictionary,
            `alpha <= 0`, `num_iters < 1`.

    Example:
        >>> net = NMFEncoder(torch.rand(64, 10), 8, alpha=0.1)
        >>> code = net(torch.rand(5, 64))
        >>> code.shape, bool((code >= 0).all())
        (torch.Size([5, 10]), True)

    Reference:
        P. Sprechmann, A. M. Bronstein and G. Sapiro, "Learning Efficient Sparse and Low Rank Models", IEEE Transactions
        on Pattern Analysis and Machine Intelligence 37(9), 2015.
    """

    def __init__(
        self,
        dictionary: Tensor,
        num_iters: int = 16,
        *,
        alpha: float,
        tied: bool | Sequence[str] = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = NMFStep(dictionary, alpha=alpha, device=device, dtype=dtype)
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, x: Tensor, *, state: Tensor | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(x, state=state, num_iters=num_iters)
