"""LAMP: approximate message passing with learned matrices and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.functional import soft_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.sparse._steps import fixed_matrix, share
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class LAMPState(NamedTuple):
    """The code and the residual with its correction."""

    x: Tensor  # (..., n)
    v: Tensor  # (..., m)


class LAMPStep(Step):
    r"""$v_{k+1} = y - A x_k + \tfrac{\|x_k\|_0}{m} v_k,\quad x_{k+1} = S_\theta(x_k + B v_{k+1})$,
    $\theta = \lambda \|v_{k+1}\|_2 / \sqrt m$, with learned $B$ and $\lambda$.

    Args:
        dictionary: $A$, (m, n), real, atoms as columns of norm about 1; fixed.
        threshold: $\lambda$ to start with, positive.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    dictionary: Tensor

    def __init__(
        self,
        dictionary: Tensor,
        *,
        threshold: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        fixed = fixed_matrix("dictionary", dictionary, device, dtype, allow_complex=False)
        self.threshold = _check.real("threshold", threshold, above=0.0)
        self.register_buffer("dictionary", fixed)
        self.weight = nn.Parameter(torch.empty_like(fixed.mT, memory_format=torch.contiguous_format))
        self.log_lambda = nn.Parameter(fixed.new_empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to approximate message passing: B = A^T."""
        self.weight.copy_(self.dictionary.mT)
        self.log_lambda.fill_(self.threshold).log_()

    def check(self, y: Tensor) -> None:
        _check.signals("y", y, self.dictionary, len(self.dictionary), of="the dictionary")

    def init(self, y: Tensor) -> LAMPState:
        return LAMPState(y.new_zeros(*y.shape[:-1], len(self.weight)), torch.zeros_like(y))

    def forward(self, state: LAMPState, y: Tensor) -> LAMPState:
        x, v = state
        m = len(self.dictionary)
        # The mean slope of the threshold that x came out of: it removes from v what x already owes to y.
        slope = (x != 0).sum(-1, keepdim=True).to(y.dtype) / m
        v = y - nn.functional.linear(x, self.dictionary) + slope * v
        theta = self.log_lambda.exp() * torch.linalg.vector_norm(v, dim=-1, keepdim=True) / m**0.5
        return LAMPState(soft_threshold(x + nn.functional.linear(v, self.weight), theta), v)

    def readout(self, state: LAMPState) -> Tensor:
        return state.x

    def extra_repr(self) -> str:
        m, n = self.dictionary.shape
        return f"signal={m}, atoms={n}, threshold={self.threshold:g}"


class LAMP(Unroll):
    r"""$v_{k+1} = y - A x_k + \tfrac{\|x_k\|_0}{m} v_k,\quad
    x_{k+1} = S_{\theta_k}(x_k + B_k v_{k+1}),\quad \theta_k = \lambda_k \|v_{k+1}\|_2 / \sqrt m$.

    Learned approximate message passing. The correction of the residual by the previous one (Onsager's term) makes the
    error of $x_k + B_k v_{k+1}$ look like white Gaussian noise, whose level $\|v\| / \sqrt m$ then sets the threshold.
    Untrained it is `unrolled.solvers.amp`. Made for large dictionaries with independent entries and atoms of norm 1;
    for others the untrained iteration may diverge.

    Args:
        dictionary: $A$, (m, n), real, atoms as columns of norm about 1; fixed and shared by all layers.
        num_iters: number of layers K.
        threshold: where $\lambda_k$ starts, positive, in standard deviations of the noise; 1.1402 suits codes with 10 %
            nonzeros at m / n = 1/2.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - y: (..., m), the dtype and device of the dictionary
        - output: (..., n)

    Raises:
        TypeError: `dictionary` or `y` is no floating point tensor (complex ones need another correction), or their
            dtypes differ.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, `threshold <= 0`, `num_iters < 1`.

    Example:
        >>> net = LAMP(torch.nn.functional.normalize(torch.randn(25, 50), dim=0), 8)
        >>> net(torch.randn(4, 25)).shape
        torch.Size([4, 50])

    Reference:
        M. Borgerding, P. Schniter and S. Rangan, "AMP-Inspired Deep Networks for Sparse Linear Inverse Problems",
        IEEE Transactions on Signal Processing 65(16), 2017.
    """

    def __init__(
        self,
        dictionary: Tensor,
        num_iters: int = 16,
        *,
        threshold: float = 1.1402,
        tied: bool | Sequence[str] = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = LAMPStep(dictionary, threshold=threshold, device=device, dtype=dtype)
        super().__init__(step, num_iters, tied=share(tied, step, "dictionary"), gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
