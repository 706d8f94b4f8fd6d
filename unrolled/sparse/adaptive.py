"""AdaptiveISTA: ISTA with a memory, whose input and forget gates are learned vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled._tree import State
from unrolled.functional import soft_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.sparse.ista import _affine, _complement, _ISTAStep
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class CellState(NamedTuple):
    """The memory cell, and the code, which is the cell after the threshold."""

    cell: Tensor  # (..., n)
    code: Tensor  # (..., n)


class _Prepared(NamedTuple):
    drive: Tensor  # W y, (..., n)
    recurrent: Tensor  # S^T, (n, n)
    gates: tuple[Tensor, Tensor]  # i and f, (n,) or ()
    theta: Tensor  # (n,)


class AdaptiveISTAStep(_ISTAStep):
    r"""$c_k = f \odot c_{k-1} + i \odot (W y + S x_{k-1}),\quad x_k = S_\theta(c_k)$ with learned vectors i and f.

    Starts as ISTA: $i = 1$, $f = 0$, $W = D^H/L$, $S = I - D^H D/L$, $\theta = \alpha/L$ with $L = \|D\|_2^2$. The
    input gate is positive, the forget gate lies between -1 and 1.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real or complex.
        alpha: weight of the l1 norm in the Lasso, positive.
        scalar_gates: one number for each gate in place of one for every atom.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    def __init__(
        self,
        dictionary: Tensor,
        *,
        alpha: float,
        scalar_gates: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dictionary, alpha=alpha, device=device, dtype=dtype)
        n = len(self.weight)
        self.inhibition = nn.Parameter(self.weight.new_empty(n, n))
        shape = () if scalar_gates else (n,)
        # i = exp(log_input) is positive and f = tanh(atanh_forget) within (-1, 1), whatever the optimiser does.
        self.log_input = nn.Parameter(self.log_theta.new_empty(shape))
        self.atanh_forget = nn.Parameter(self.log_theta.new_empty(shape))
        self.reset_parameters(dictionary)

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        """Back to ISTA on this dictionary."""
        super().reset_parameters(dictionary)
        self.inhibition.copy_(_complement(self.weight, dictionary))
        self.log_input.zero_()
        self.atanh_forget.zero_()

    def prepare(self, y: Tensor) -> _Prepared:
        gates = self.log_input.exp(), self.atanh_forget.tanh()
        return _Prepared(nn.functional.linear(y, self.weight), self.inhibition.mT, gates, self.theta)

    def init(self, context: _Prepared) -> CellState:
        zero = torch.zeros_like(context.drive)
        return CellState(zero, zero)

    def forward(self, state: CellState, context: _Prepared) -> CellState:
        drive, recurrent, (i, f), theta = context
        cell = f * state.cell + i * _affine(state.code, recurrent, drive)
        return CellState(cell, soft_threshold(cell, theta))

    def readout(self, state: CellState) -> Tensor:
        return state.code

    def extra_repr(self) -> str:
        return super().extra_repr() + (", scalar_gates=True" if self.log_input.dim() == 0 else "")


class AdaptiveISTA(Unroll):
    r"""$c_k = f_k \odot c_{k-1} + i_k \odot (W y + S x_{k-1}),\quad x_k = S_\theta(c_k)$: ISTA with learned gates.

    ISTA forgets where it came from. This network adds a memory cell, and learns for every layer and atom how much of
    it to keep (the forget gate f) and how far to go along the new step (the input gate i). Where $i = 1 - f$ the fixed
    points are those of ISTA: $f > 0$ damps the step, $f < 0$ over-relaxes it. The gates are the same for all signals;
    in `SC2Net` they depend on the signal. Untrained it is ISTA.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real or complex. It serves to start the parameters.
        num_iters: number of layers K.
        alpha: weight of the l1 norm, positive, in the units of y times those of the atoms.
        scalar_gates: one number a layer for each gate in place of one for every atom.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared. By default
            every layer has its own gates and shares the rest: where W and S are its own too, or the input gate is
            shared, $i$ only scales their rows.
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
        >>> torch.allclose(AdaptiveISTA(dictionary, 8, alpha=0.1)(y), ista(dictionary, y, 0.1, num_iters=8), atol=1e-4)
        True

    Reference:
        J. T. Zhou, K. Di, J. Du, X. Peng, H. Yang, S. J. Pan, I. W. Tsang, Y. Liu, Z. Qin and R. S. M. Goh, "SC2Net:
        Sparse LSTMs for Sparse Coding", AAAI 2018.
    """

    def __init__(
        self,
        dictionary: Tensor,
        num_iters: int = 16,
        *,
        alpha: float,
        scalar_gates: bool = False,
        tied: bool | Sequence[str] = ("weight", "inhibition", "log_theta"),
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = AdaptiveISTAStep(dictionary, alpha=alpha, scalar_gates=scalar_gates, device=device, dtype=dtype)
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
