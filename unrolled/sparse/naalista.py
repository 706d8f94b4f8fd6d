"""NA-ALISTA: ALISTA whose step sizes and thresholds a small recurrent network sets for every sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.operators import LinearOperator
from unrolled.solvers import lipschitz
from unrolled.sparse._steps import (
    DictionaryStep,
    analytic_operator,
    check_selection,
    check_weight,
    fixed_operator,
    share,
)
from unrolled.sparse.selection import SupportSelection
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class NAALISTAState(NamedTuple):
    """The code, the memory and the output of the recurrent network, and how many layers the code has seen."""

    x: Tensor  # (*batch, *event)
    c: Tensor  # (*batch, hidden)
    h: Tensor  # (*batch, hidden)
    k: Tensor  # ()


class NAALISTAStep(DictionaryStep):
    r"""$x_{k+1} = \mathrm{SS}_{\theta, p_k}(x_k + \gamma W^H r)$ with $r = y - A x_k$ and
    $(\gamma, \theta) = \exp(V h + v)$, $(h, c) = \mathrm{LSTM}\bigl((\|r\|_1 / m, \|W^H r\|_1 / n), h, c\bigr)$.

    Args:
        dictionary: $A$, an operator; fixed, unless it holds parameters.
        weight: $W$, an operator of the same shape; fixed, unless it holds parameters.
        alpha: weight of the l1 norm, positive; $\theta$ starts at $\alpha / \|A\|_2^2$, $\gamma$ at 1.
        hidden: width of the LSTM.
        support_selection: which entries pass unshrunk; `None`: none.
    """

    def __init__(
        self,
        dictionary: LinearOperator,
        weight: LinearOperator,
        *,
        alpha: float,
        hidden: int,
        support_selection: SupportSelection | None,
    ) -> None:
        super().__init__(dictionary)
        self.weight = check_weight(weight, dictionary)
        self.support_selection = check_selection(support_selection) or SupportSelection(0.0, 0.0)
        self.alpha = _check.real("alpha", alpha, above=0.0, hint="It weighs the l1 norm.")
        self.hidden = _check.integer("hidden", hidden)
        L = lipschitz(dictionary).detach()
        # All four gates of the LSTM in one matrix, in torch.nn.LSTMCell's order: input, forget, cell, output.
        self.gates = nn.Linear(2 + hidden, 4 * hidden, device=L.device, dtype=L.dtype)
        self.head = nn.Linear(hidden, 2, device=L.device, dtype=L.dtype)
        with torch.no_grad():  # untrained, the LSTM has no say: gamma = 1 and theta = alpha / L
            self.head.weight.zero_()
            self.head.bias.copy_(torch.stack((torch.zeros_like(L), (self.alpha / L).log())))

    def init(self, y: Tensor) -> NAALISTAState:
        x = self.zeros(y)
        memory = x.real.new_zeros(*x.shape[: x.dim() - self.event_dim], self.hidden)
        return NAALISTAState(x, memory, memory, x.real.new_zeros(()))

    def forward(self, state: NAALISTAState, y: Tensor) -> NAALISTAState:
        x, c, h, k = state
        r = y - self.dictionary(x)
        d = self.weight.adjoint(r)
        # Means, not sums: the norms of a few hundred entries would saturate the gates.
        size = torch.stack(
            (_mean_modulus(r, self.dictionary.out_shape), _mean_modulus(d, self.dictionary.in_shape)), -1
        )
        i, f, g, o = self.gates(torch.cat((size, h), -1)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        gamma, theta = (value.reshape(value.shape + (1,) * self.event_dim) for value in self.head(h).exp().unbind(-1))
        z = x + gamma * d
        return NAALISTAState(self.support_selection(z, theta, k + 1, event_dim=self.event_dim), c, h, k + 1)

    def readout(self, state: NAALISTAState) -> Tensor:
        return state.x

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, hidden={self.hidden}, support_selection={self.support_selection}"


def _mean_modulus(value: Tensor, event: tuple[int, ...]) -> Tensor:
    return value.abs().mean(tuple(range(-len(event), 0)))


class NAALISTA(Unroll):
    r"""$x_{k+1} = \mathrm{SS}_{\theta_k, p_k}\bigl(x_k + \gamma_k W^H (y - A x_k)\bigr)$: neurally augmented ALISTA.

    $\gamma_k$ and $\theta_k$ are not numbers learned once but come, for every sample, from an LSTM that watches the l1
    norms of the residual and of its correlation with the weight. Untrained it is ALISTA before training.

    Args:
        dictionary: $A$, fixed: a matrix (m, n), atoms as columns, real or complex, or a `LinearOperator`, which is
            learned where it holds parameters.
        num_iters: number of layers K.
        alpha: weight of the l1 norm, positive; $\theta_k$ starts at $\alpha / \|A\|_2^2$, $\gamma_k$ at 1.
        hidden: width of the LSTM.
        tied: `True`, one LSTM for all layers (as published); `False`, each layer has its own; or the names of what is
            shared.
        support_selection: which share of the largest entries passes unshrunk; `None`: none.
        weight: $W$, fixed, of the shape of the dictionary: a matrix, or an operator; `analytic_weight(dictionary)`
            where not given.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - y: (..., m), or (..., *out_shape) for an operator, with the dtype and device of the dictionary
        - output: (..., n), or (..., *in_shape)

    Raises:
        TypeError: an argument of the wrong type; `dictionary` or `y` of the wrong dtype; an operator without `weight`.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, `alpha <= 0`, `num_iters < 1`, `hidden < 1`.

    Example:
        >>> net = NAALISTA(torch.nn.functional.normalize(torch.randn(25, 50), dim=0), 16, hidden=32)
        >>> net(torch.randn(4, 25)).shape
        torch.Size([4, 50])

    Reference:
        F. Behrens, J. Sauder and P. Jung, "Neurally Augmented ALISTA", ICLR 2021.
    """

    def __init__(
        self,
        dictionary: Tensor | LinearOperator,
        num_iters: int = 16,
        *,
        alpha: float = 0.4,
        hidden: int = 128,
        tied: bool | Sequence[str] = True,
        support_selection: SupportSelection | None = SupportSelection(),
        weight: Tensor | LinearOperator | None = None,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        A = fixed_operator("dictionary", dictionary, device, dtype)
        W = analytic_operator(A) if weight is None else fixed_operator("weight", weight, device, dtype)
        step = NAALISTAStep(A, W, alpha=alpha, hidden=hidden, support_selection=support_selection)
        super().__init__(step, num_iters, tied=share(tied, step, "dictionary", "weight"), gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
