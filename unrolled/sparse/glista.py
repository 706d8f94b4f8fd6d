"""GLISTA: LISTA with gates that make up for what thresholds take away, and overshoot for speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.operators import LinearOperator
from unrolled.sparse._steps import ResidualStep, SelectionState, fixed_operator, learned_operator, share
from unrolled.sparse.selection import SupportSelection
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll

Gate = Callable[[Tensor], Tensor]


def exponential_gate(w: Tensor) -> Tensor:
    r"""$f(w) = e^{-w}$ of every magnitude $w$."""
    return torch.exp(-w)


def inverse_gate(w: Tensor) -> Tensor:
    r"""$f(w) = 1 / (1 + w)$ of every magnitude $w$."""
    return 1 / (1 + w)


def linear_gate(w: Tensor) -> Tensor:
    r"""$f(w) = \max(1 - w, 0)$ of every magnitude $w$."""
    return torch.relu(1 - w)


class GLISTAStep(ResidualStep):
    r"""$u = (1 + a\,f(\nu |x_k|))\,x_k,\quad \tilde x = \mathrm{SS}_{\theta, p_k}\bigl(u + W^H (y - A u)\bigr),\quad
    x_{k+1} = \tilde x + o (\tilde x - x_k)$ with the overshoot $o = b\,\theta / (\theta + |\tilde x - x_k|)$.

    Args:
        dictionary: $A$, an operator; fixed, unless it holds parameters.
        weight: $W$, an operator of the same shape; learned where it holds parameters.
        alpha: weight of the l1 norm, positive; $\theta$ starts at $\alpha / \|A\|_2^2$.
        gate: $f$, a decreasing function of magnitudes, elementwise.
        support_selection: which entries pass unshrunk; `None`: none. With it the state counts the layers.
    """

    def __init__(
        self,
        dictionary: LinearOperator,
        weight: LinearOperator,
        *,
        alpha: float,
        gate: Gate = exponential_gate,
        support_selection: SupportSelection | None = None,
    ) -> None:
        super().__init__(dictionary, weight, alpha=alpha, support_selection=support_selection)
        if not callable(gate):
            raise TypeError(f"gate must be a function of a Tensor such as exponential_gate, got {gate!r}.")
        self.gate = gate
        self.gain = nn.Parameter(torch.zeros_like(self.log_theta))
        self.log_slope = nn.Parameter(torch.zeros_like(self.log_theta))
        self.overshoot = nn.Parameter(torch.zeros_like(self.log_theta))

    def forward(self, state: State, y: Tensor) -> State:
        x = self.readout(state)
        theta = self.theta
        u = (1 + self.gain * self.gate(self.log_slope.exp() * x.abs())) * x
        new = self.shrink(state, u + self.weight.adjoint(y - self.dictionary(u)), theta)
        step = self.readout(new) - x
        # theta is the only length at hand; it makes the gate independent of the units of x.
        reached = self.readout(new) + self.overshoot * theta / (theta + step.abs()) * step
        return reached if self.support_selection is None else SelectionState(reached, new.k)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate={getattr(self.gate, '__name__', self.gate)}"


class GLISTA(Unroll):
    r"""$u = (1 + a_k f(\nu_k |x_k|))\,x_k,\quad
    \tilde x = \mathrm{SS}_{\theta_k, p_k}\bigl(u + W_k^H (y - A u)\bigr),\quad
    x_{k+1} = \tilde x + o_k (\tilde x - x_k)$.

    Codes on their way through LISTA are too small, since every threshold shrinks what it keeps. The gain gate enlarges
    small entries more than large ones before each layer; the overshoot gate takes a step $1 + o_k$ times as long, with
    $o_k = b_k \theta_k / (\theta_k + |\tilde x - x_k|)$, more where little moves. Both begin closed, $a_k = b_k = 0$,
    where this is LISTA-CP, and untrained ISTA. A code that overshoots is not exactly sparse.

    Args:
        dictionary: $A$, fixed and shared by all layers: a matrix (m, n), atoms as columns, real or complex, or a
            `LinearOperator`, which is learned where it holds parameters.
        num_iters: number of layers K.
        alpha: weight of the l1 norm, positive, in the units of y times those of the atoms.
        gate: $f$: `exponential_gate`, `inverse_gate`, `linear_gate` or another decreasing function of magnitudes.
            $\nu_k$ starts at 1: for codes whose entries are far from 1, scale them.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        support_selection: which share of the largest entries passes unshrunk; `None`: none.
        weight: where $W_k$ starts, of the shape of the dictionary: a matrix, or an operator, learned where it holds
            parameters; $A / \|A\|_2^2$ where not given.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - y: (..., m), or (..., *out_shape) for an operator, with the dtype and device of the dictionary
        - output: (..., n), or (..., *in_shape)

    Raises:
        TypeError: an argument of the wrong type; `dictionary` or `y` of the wrong dtype.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, `alpha <= 0`, `num_iters < 1`.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(25, 50), dim=0)
        >>> net = GLISTA(dictionary, 16, gate=inverse_gate, support_selection=SupportSelection())
        >>> net(torch.randn(4, 25)).shape
        torch.Size([4, 50])

    Reference:
        K. Wu, Y. Guo, Z. Li and C. Zhang, "Sparse Coding with Gated Learned ISTA", ICLR 2020. The authors' code has
        a constant where $\theta$ stands in the denominator of the overshoot.
    """

    def __init__(
        self,
        dictionary: Tensor | LinearOperator,
        num_iters: int = 16,
        *,
        alpha: float = 0.4,
        gate: Gate = exponential_gate,
        tied: bool | Sequence[str] = False,
        support_selection: SupportSelection | None = None,
        weight: Tensor | LinearOperator | None = None,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        A = fixed_operator("dictionary", dictionary, device, dtype)
        W = learned_operator("weight", weight, A, device, dtype)
        step = GLISTAStep(A, W, alpha=alpha, gate=gate, support_selection=support_selection)
        super().__init__(step, num_iters, tied=share(tied, step, "dictionary"), gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
