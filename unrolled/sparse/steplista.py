"""Step-LISTA: ISTA with learned step sizes, one number a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.functional import soft_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.momentum import Momentum
from unrolled.operators import LinearOperator
from unrolled.solvers import lipschitz
from unrolled.sparse._steps import DictionaryStep, fixed_operator, share
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class StepLISTAStep(DictionaryStep):
    r"""$x_{k+1} = S_{\alpha \gamma}\bigl(x_k + \gamma A^H (y - A x_k)\bigr)$ with learned $\gamma$.

    Args:
        dictionary: $A$, an operator; fixed, unless it holds parameters.
        alpha: weight of the l1 norm in the Lasso, positive, fixed.
    """

    def __init__(self, dictionary: LinearOperator, *, alpha: float) -> None:
        super().__init__(dictionary)
        self.alpha = _check.real("alpha", alpha, above=0.0, hint="It weighs the l1 norm.")
        self.log_gamma = nn.Parameter(-lipschitz(dictionary).detach().log())

    @property
    def gamma(self) -> Tensor:
        """The step size, (), positive; untrained it is 1/L."""
        return self.log_gamma.exp()

    def init(self, y: Tensor) -> Tensor:
        return self.zeros(y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gamma = self.gamma
        return soft_threshold(x + gamma * self.dictionary.adjoint(y - self.dictionary(x)), self.alpha * gamma)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class StepLISTA(Unroll):
    r"""$x_{k+1} = S_{\alpha \gamma_k}\bigl(x_k + \gamma_k A^H (y - A x_k)\bigr)$.

    ISTA with learned step sizes $\gamma_k$. Every layer keeps the solutions of the Lasso where they are, whatever it
    learned, and sparse codes allow longer steps than $1/\|A\|_2^2$. Train it on the objective itself,
    `unrolled.losses.Lasso`. It works with operators of which only the products are known.

    Args:
        dictionary: $A$, fixed and shared by all layers: a matrix (m, n), atoms as columns, real or complex, or a
            `LinearOperator`, which is learned where it holds parameters.
        num_iters: number of layers K, and of parameters.
        alpha: weight of the l1 norm in the Lasso, positive, in the units of y times those of the atoms.
        tied: one step size for all layers (`True`), each its own (`False`), or the names of what is shared.
        momentum: extrapolate between layers, see `unrolled.Momentum`.
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
        >>> net = StepLISTA(Convolution(torch.randn(1, 8, 5, 5), in_shape=(8, 32, 32)), 10, alpha=0.1)
        >>> net(torch.randn(4, 1, 32, 32)).shape
        torch.Size([4, 8, 32, 32])

    Reference:
        P. Ablin, T. Moreau, M. Massias and A. Gramfort, "Learning step sizes for unfolded sparse coding", NeurIPS 2019.
    """

    def __init__(
        self,
        dictionary: Tensor | LinearOperator,
        num_iters: int = 16,
        *,
        alpha: float,
        tied: bool | Sequence[str] = False,
        momentum: bool = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step: Step = StepLISTAStep(fixed_operator("dictionary", dictionary, device, dtype), alpha=alpha)
        shared = "dictionary"
        if momentum:
            step, shared = Momentum(step), "step.dictionary"
        super().__init__(step, num_iters, tied=share(tied, step, shared), gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
