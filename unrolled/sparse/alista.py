"""TiLISTA and ALISTA: one weight for all layers, learned or in closed form, and two numbers a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.operators import LinearOperator
from unrolled.sparse._steps import ResidualStep, analytic_operator, fixed_operator, learned_operator, share
from unrolled.sparse.selection import SupportSelection
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class ALISTAStep(ResidualStep):
    r"""$x_{k+1} = \mathrm{SS}_{\theta, p_k}\bigl(x_k + \gamma\, W^H (y - A x_k)\bigr)$ with learned $\gamma$, $\theta$.

    Args:
        dictionary: $A$, an operator; fixed, unless it holds parameters.
        weight: $W$, an operator of the same shape; learned where it holds parameters.
        alpha: weight of the l1 norm, positive; $\theta$ starts at $\alpha / \|A\|_2^2$, $\gamma$ at 1.
        support_selection: which entries pass unshrunk; `None`: none. With it the state counts the layers.
    """

    def __init__(
        self,
        dictionary: LinearOperator,
        weight: LinearOperator,
        *,
        alpha: float,
        support_selection: SupportSelection | None,
    ) -> None:
        super().__init__(dictionary, weight, alpha=alpha, support_selection=support_selection)
        self.log_gamma = nn.Parameter(torch.zeros_like(self.log_theta))

    @property
    def gamma(self) -> Tensor:
        """The step size, (), positive."""
        return self.log_gamma.exp()

    def forward(self, state: State, y: Tensor) -> State:
        x = self.readout(state)
        return self.shrink(state, x + self.gamma * self.weight.adjoint(y - self.dictionary(x)), self.theta)


class TiLISTA(Unroll):
    r"""$x_{k+1} = \mathrm{SS}_{\theta_k, p_k}\bigl(x_k + \gamma_k W^H (y - A x_k)\bigr)$: one learned weight.

    Between LISTA-CP, which learns a weight for every layer, and ALISTA, which learns none. Untrained and without
    support selection it is ISTA.

    Args:
        dictionary: $A$, fixed and shared by all layers: a matrix (m, n), atoms as columns, real or complex, or a
            `LinearOperator`, which is learned where it holds parameters.
        num_iters: number of layers K.
        alpha: weight of the l1 norm, positive, in the units of y times those of the atoms.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared. The weight
            is shared in any case.
        support_selection: which share of the largest entries passes unshrunk; `None`: none.
        weight: where $W$ starts, of the shape of the dictionary: a matrix, or an operator, learned where it holds
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
        >>> net = TiLISTA(torch.nn.functional.normalize(torch.randn(25, 50), dim=0), 16)
        >>> sum(parameter.numel() for parameter in net.parameters())   # 25 * 50 + 2 * 16
        1282

    Reference:
        J. Liu, X. Chen, Z. Wang and W. Yin, "ALISTA: Analytic Weights Are As Good As Learned Weights in LISTA",
        ICLR 2019.
    """

    def __init__(
        self,
        dictionary: Tensor | LinearOperator,
        num_iters: int = 16,
        *,
        alpha: float = 0.4,
        tied: bool | Sequence[str] = False,
        support_selection: SupportSelection | None = SupportSelection(),
        weight: Tensor | LinearOperator | None = None,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        A = fixed_operator("dictionary", dictionary, device, dtype)
        W = learned_operator("weight", weight, A, device, dtype)
        step = ALISTAStep(A, W, alpha=alpha, support_selection=support_selection)
        super().__init__(step, num_iters, tied=share(tied, step, "dictionary", "weight"), gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)


class ALISTA(Unroll):
    r"""$x_{k+1} = \mathrm{SS}_{\theta_k, p_k}\bigl(x_k + \gamma_k W^H (y - A x_k)\bigr)$ with the analytic weight $W$.

    What is left to learn are two numbers a layer, the step size $\gamma_k$ and the threshold $\theta_k$: a few hundred
    signals are enough. For ill-conditioned dictionaries and noisy signals pass
    `weight=analytic_weight(dictionary, damping=...)`.

    Args:
        dictionary: $A$, fixed and shared by all layers: a matrix (m, n), atoms as columns, real or complex, or a
            `LinearOperator`, which is learned where it holds parameters.
        num_iters: number of layers K.
        alpha: weight of the l1 norm, positive; $\theta_k$ starts at $\alpha / \|A\|_2^2$, $\gamma_k$ at 1.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        support_selection: which share of the largest entries passes unshrunk; `None`: none.
        weight: $W$, fixed, of the shape of the dictionary: a matrix, or an operator; `analytic_weight(dictionary)`
            where not given. Its columns should meet their atoms with $w_i^H a_i = 1$, as $\gamma_k$ starts at 1.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - y: (..., m), or (..., *out_shape) for an operator, with the dtype and device of the dictionary
        - output: (..., n), or (..., *in_shape)

    Raises:
        TypeError: an argument of the wrong type; `dictionary` or `y` of the wrong dtype; an operator without `weight`.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, `alpha <= 0`, `num_iters < 1`.

    Example:
        >>> net = ALISTA(torch.nn.functional.normalize(torch.randn(25, 50), dim=0), 16)
        >>> sum(parameter.numel() for parameter in net.parameters())
        32

    Reference:
        J. Liu, X. Chen, Z. Wang and W. Yin, "ALISTA: Analytic Weights Are As Good As Learned Weights in LISTA",
        ICLR 2019.
    """

    def __init__(
        self,
        dictionary: Tensor | LinearOperator,
        num_iters: int = 16,
        *,
        alpha: float = 0.4,
        tied: bool | Sequence[str] = False,
        support_selection: SupportSelection | None = SupportSelection(),
        weight: Tensor | LinearOperator | None = None,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        A = fixed_operator("dictionary", dictionary, device, dtype)
        W = analytic_operator(A) if weight is None else fixed_operator("weight", weight, device, dtype)
        step = ALISTAStep(A, W, alpha=alpha, support_selection=support_selection)
        super().__init__(step, num_iters, tied=share(tied, step, "dictionary", "weight"), gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
