"""LISTA with coupled weights: one matrix a layer, acting on the residual, and support selection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.momentum import Momentum
from unrolled.operators import LinearOperator
from unrolled.sparse._steps import ResidualStep, fixed_operator, learned_operator, share
from unrolled.sparse.selection import SupportSelection
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class LISTACPStep(ResidualStep):
    r"""$x_{k+1} = S_\theta\bigl(x_k + W^H (y - A x_k)\bigr)$ with learned $W$ and $\theta$.

    Args:
        dictionary: $A$, an operator; fixed, unless it holds parameters.
        weight: $W$, an operator of the same shape; learned where it holds parameters.
        alpha: weight of the l1 norm, positive; $\theta$ starts at $\alpha / \|A\|_2^2$.
        support_selection: which entries pass unshrunk; `None`: none. With it the state counts the layers.
    """

    def forward(self, state: State, y: Tensor) -> State:
        x = self.readout(state)
        return self.shrink(state, x + self.weight.adjoint(y - self.dictionary(x)), self.theta)


class LISTACP(Unroll):
    r"""$x_{k+1} = S_{\theta_k}\bigl(x_k + W_k^H (y - A x_k)\bigr)$: LISTA with coupled weights.

    LISTA's two matrices a layer must in the end satisfy $S_k = I - W_k^H A$ for the network to recover codes at all;
    here they do by construction, with half the parameters. Untrained, it is ISTA. With
    `support_selection=SupportSelection()` it is known as LISTA-CPSS; the largest entries then pass unshrunk. To recover
    codes, starting from `weight=analytic_weight(dictionary)` saves most of the training.

    Args:
        dictionary: $A$, fixed and shared by all layers: a matrix (m, n), atoms as columns, real or complex, or a
            `LinearOperator` (say a `Convolution`, for convolutional sparse coding), which is learned where it holds
            parameters.
        num_iters: number of layers K.
        alpha: weight of the l1 norm, positive, in the units of y times those of the atoms.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        support_selection: which share of the largest entries passes unshrunk; `None`: none.
        momentum: extrapolate between layers, see `unrolled.Momentum`; not together with support selection.
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
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, `alpha <= 0`, `num_iters < 1`, momentum
            together with support selection.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(25, 50), dim=0)
        >>> net = LISTACP(dictionary, 16, support_selection=SupportSelection(), weight=analytic_weight(dictionary))
        >>> net(torch.randn(8, 25)).shape
        torch.Size([8, 50])

    Reference:
        X. Chen, J. Liu, Z. Wang and W. Yin, "Theoretical Linear Convergence of Unfolded ISTA and its Practical Weights
        and Thresholds", NeurIPS 2018.
    """

    def __init__(
        self,
        dictionary: Tensor | LinearOperator,
        num_iters: int = 16,
        *,
        alpha: float = 0.4,
        tied: bool | Sequence[str] = False,
        support_selection: SupportSelection | None = None,
        momentum: bool = False,
        weight: Tensor | LinearOperator | None = None,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if momentum and support_selection is not None:
            raise ValueError("momentum and support_selection cannot be combined. HyperLISTA has both.")
        A = fixed_operator("dictionary", dictionary, device, dtype)
        W = learned_operator("weight", weight, A, device, dtype)
        step: Step = LISTACPStep(A, W, alpha=alpha, support_selection=support_selection)
        shared = "dictionary"
        if momentum:
            step, shared = Momentum(step), "step.dictionary"
        super().__init__(step, num_iters, tied=share(tied, step, shared), gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
