"""LFISTA: the accelerated algorithm, FISTA, with learned matrices and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled._tree import State
from unrolled.functional import soft_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.momentum import MomentumState
from unrolled.sparse.ista import _complement, _ISTAStep
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class _Prepared(NamedTuple):
    drive: Tensor  # W_e y, (..., n)
    theta: Tensor  # (n,)


class LFISTAStep(_ISTAStep):
    r"""$x_{k+1} = S_\theta\bigl(W_e y + W_g x_k + b_k W_m (x_k - x_{k-1})\bigr)$ with Nesterov's $b_k$.

    Args:
        dictionary: $A$, (m, n), atoms as columns, real or complex.
        alpha: weight of the l1 norm in the Lasso, positive.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    def __init__(
        self,
        dictionary: Tensor,
        *,
        alpha: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dictionary, alpha=alpha, device=device, dtype=dtype)
        n = len(self.weight)
        self.inhibition = nn.Parameter(self.weight.new_empty(n, n))
        self.inertia = nn.Parameter(self.weight.new_empty(n, n))
        self.reset_parameters(dictionary)

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        """Back to FISTA on this dictionary: W_e = A^H / L, W_g = W_m = I - A^H A / L, theta = alpha / L."""
        super().reset_parameters(dictionary)
        self.inhibition.copy_(_complement(self.weight, dictionary))
        self.inertia.copy_(self.inhibition)

    def prepare(self, y: Tensor) -> _Prepared:
        return _Prepared(nn.functional.linear(y, self.weight), self.theta)

    def init(self, context: _Prepared) -> MomentumState:
        x = torch.zeros_like(context.drive)
        # t = 0 becomes 1 in the first iteration, where x - previous is 0.
        return MomentumState(x, x, x.real.new_zeros(()))

    def forward(self, state: MomentumState, context: _Prepared) -> MomentumState:
        x, previous, t = state
        t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
        moved = (t - 1) / t_next * (x - previous)
        z = context.drive + nn.functional.linear(x, self.inhibition) + nn.functional.linear(moved, self.inertia)
        return MomentumState(soft_threshold(z, context.theta), x, t_next)

    def readout(self, state: MomentumState) -> Tensor:
        return state.x


class LFISTA(Unroll):
    r"""$x_{k+1} = S_{\theta_k}\bigl(W^e_k y + W^g_k x_k + b_k W^m_k (x_k - x_{k-1})\bigr)$.

    FISTA with learned matrices. $b_k = (t_{k-1} - 1) / t_k$ is Nesterov's schedule, fixed. With $W^g + b W^m$ as the
    matrix of $x_k$ and $-b W^m$ as that of $x_{k-1}$, this is the general network with one layer of memory; written so,
    all untrained layers are equal, and together they are FISTA. Before the third layer $W^m$ has no effect, before the
    second neither has $W^g$: the codes that they act on are still 0.

    Args:
        dictionary: $A$, (m, n), atoms as columns, real or complex. It serves to start the parameters.
        num_iters: number of layers K.
        alpha: weight of the l1 norm, positive, in the units of y times those of the atoms.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - y: (..., m), the dtype and device of the parameters
        - output: (..., n)

    Raises:
        TypeError: `dictionary` or `y` is no floating point or complex tensor, or their dtypes differ.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, `alpha <= 0`, `num_iters < 1`.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(25, 50), dim=0)
        >>> y = torch.randn(4, 25)
        >>> torch.allclose(LFISTA(dictionary, 8, alpha=0.1)(y), fista(dictionary, y, 0.1, num_iters=8), atol=1e-4)
        True

    Reference:
        T. Moreau and J. Bruna, "Understanding Trainable Sparse Coding via Matrix Factorization", ICLR 2017.
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
        step = LFISTAStep(dictionary, alpha=alpha, device=device, dtype=dtype)
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
