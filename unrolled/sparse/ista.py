"""LISTA: the iterative soft-thresholding algorithm with learned matrices and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.functional import soft_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.momentum import Momentum
from unrolled.shrinkage import Shrinkage
from unrolled.solvers import lipschitz
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class _Prepared(NamedTuple):
    drive: Tensor  # W y, (..., n)
    theta: Tensor  # (n,)
    inhibition: Tensor  # S^T, (n, n): looked up and transposed here, once a call, not in every iteration
    zero: Tensor  # the first code, (..., n), without memory of its own


class _PreparedFactors(NamedTuple):
    y: Tensor  # (..., m)
    theta: Tensor  # (n,)
    dictionary: Tensor  # D^T, (n, m)
    weight: Tensor  # W^T, (m, n)
    zero: Tensor  # the first code, (..., n), without memory of its own


class _ISTAStep(Step):
    """What both forms of LISTA share: the weight W, positive thresholds, one vector a signal."""

    def __init__(
        self,
        dictionary: Tensor,  # (m, n), atoms as columns
        *,
        alpha: float,
        shrinkage: Shrinkage | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.dictionary("dictionary", dictionary, allow_complex=True)
        self.alpha = _check.real("alpha", alpha, above=0.0, hint="It weighs the l1 norm.")
        if shrinkage is not None and not isinstance(shrinkage, Shrinkage):
            raise TypeError(
                f"shrinkage must be an unrolled.shrinkage.Shrinkage such as PiecewiseLinear(), got {shrinkage!r}."
            )
        self.shrinkage: Any = shrinkage  # SC2Net takes functions, too
        like = _check.converted("dictionary", dictionary, device, dtype)
        self.weight = nn.Parameter(torch.empty_like(like.T, memory_format=torch.contiguous_format))
        # theta = exp(log_theta): positive whatever the optimiser does, and a learning rate is relative to its size.
        self.log_theta = nn.Parameter(torch.empty_like(like[0].real, memory_format=torch.contiguous_format))

    @property
    def theta(self) -> Tensor:
        """The thresholds, (n,), positive."""
        return self.log_theta.exp()

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        """Back to ISTA on this dictionary: W = D^H / L, theta = alpha / L."""
        if dictionary.shape != self.weight.mT.shape:
            raise ValueError(
                f"dictionary must have shape {tuple(self.weight.mT.shape)} as before, got {tuple(dictionary.shape)}."
            )
        L = lipschitz(dictionary)
        self.weight.copy_(dictionary.mH / L)
        self.log_theta.copy_((self.alpha / L).log().expand(len(self.log_theta)))

    def check(self, y: Tensor) -> None:
        _check.signals("y", y, self.weight, self.weight.shape[1], of="the dictionary")

    def _shrunk(self, x: Tensor, theta: Tensor, *, inplace: bool = False) -> Tensor:
        if self.shrinkage is None:
            return soft_threshold(x, theta, inplace=inplace)
        return self.shrinkage(x, theta)

    def extra_repr(self) -> str:
        n, m = self.weight.shape
        return f"signal={m}, atoms={n}, alpha={self.alpha:g}"


class LISTAStep(_ISTAStep):
    r"""$x_{k+1} = S_\theta(W y + S x_k)$, as published.

    Starts as ISTA: $W = D^H/L$, $S = I - D^H D/L$, $\theta = \alpha/L$ with $L = \|D\|_2^2$. Costs $n^2$
    multiplications a signal and iteration, and $m n$ for $W y$, once a call when tied and once a layer when not.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real or complex.
        alpha: weight of the l1 norm in the Lasso, positive.
        shrinkage: what takes the place of the soft threshold, see `unrolled.shrinkage`.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    def __init__(
        self,
        dictionary: Tensor,
        *,
        alpha: float,
        shrinkage: Shrinkage | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dictionary, alpha=alpha, shrinkage=shrinkage, device=device, dtype=dtype)
        n = len(self.weight)
        self.inhibition = nn.Parameter(self.weight.new_empty(n, n))
        self.reset_parameters(dictionary)

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        super().reset_parameters(dictionary)
        self.inhibition.copy_(_complement(self.weight, dictionary))

    def prepare(self, y: Tensor) -> _Prepared:
        drive = nn.functional.linear(y, self.weight)
        return _Prepared(drive, self.theta, self.inhibition.mT, drive.new_zeros(()).expand_as(drive))

    def init(self, context: _Prepared) -> Tensor:
        return context.zero

    def forward(self, x: Tensor, context: _Prepared) -> Tensor:
        drive, theta, inhibition, zero = context
        if _still(x, zero):
            return self._shrunk(drive, theta)
        return self._shrunk(_affine(x, inhibition, drive), theta, inplace=True)


class FactoredLISTAStep(_ISTAStep):
    r"""$x_{k+1} = S_\theta(x_k + W (y - D x_k))$: LISTA through the residual, $S = I - W D$ in factors.

    Starts as ISTA: $W = D^H/L$, $\theta = \alpha/L$. Costs $2 m n$ multiplications a signal and iteration, less than
    the published form where $2 m < n$, and has $2 m n$ matrix parameters a layer in place of $n^2 + m n$. The
    rank of $I - S$ can't exceed m, as in ISTA itself; the published form is free to leave that set.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real or complex.
        alpha: weight of the l1 norm in the Lasso, positive.
        shrinkage: what takes the place of the soft threshold, see `unrolled.shrinkage`.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    def __init__(
        self,
        dictionary: Tensor,
        *,
        alpha: float,
        shrinkage: Shrinkage | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dictionary, alpha=alpha, shrinkage=shrinkage, device=device, dtype=dtype)
        self.dictionary = nn.Parameter(self.weight.new_empty(dictionary.shape))
        self.reset_parameters(dictionary)

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        super().reset_parameters(dictionary)
        self.dictionary.copy_(dictionary)

    def prepare(self, y: Tensor) -> _PreparedFactors:
        zero = y.new_zeros(()).expand(*y.shape[:-1], len(self.weight))
        return _PreparedFactors(y, self.theta, self.dictionary.mT, self.weight.mT, zero)

    def init(self, context: _PreparedFactors) -> Tensor:
        return context.zero

    def forward(self, x: Tensor, context: _PreparedFactors) -> Tensor:
        y, theta, dictionary, weight, zero = context
        if _still(x, zero):
            return self._shrunk(y @ weight, theta, inplace=True)
        residual = _affine(x, dictionary, y, -1)
        return self._shrunk(_affine(residual, weight, x), theta, inplace=True)


def _complement(weight: Tensor, dictionary: Tensor) -> Tensor:
    """I - W D: what a layer as published multiplies the code by, where it starts as the classical iteration."""
    D = dictionary.to(weight)
    return torch.eye(len(weight)).to(D) - weight @ D


def _affine(x: Tensor, transposed: Tensor, offset: Tensor, sign: int = 1) -> Tensor:
    """offset + sign * x transposed, without a pass over memory of its own for the sum."""
    if x.dim() == 2:
        return torch.addmm(offset, x, transposed, alpha=sign)
    return torch.add(offset, x @ transposed, alpha=sign)


def _still(x: Tensor, zero: Tensor) -> bool:
    """Whether this is the code 0 that the network started from, whose product need not be computed.

    Where a gradient is asked for, the product is: every parameter of the first layer shall get one, if only zeros.
    """
    return x is zero and not torch.is_grad_enabled()


class LISTA(Unroll):
    r"""$x_{k+1} = S_{\theta_k}(W_k y + S_k x_k)$: ISTA unrolled into `num_iters` layers with learned parameters.

    Maps signals to sparse codes, $y \mapsto \arg\min_x \tfrac12\|y - Dx\|^2 + \alpha\|x\|_1$ approximately. Untrained
    it is ISTA with step $1/L$ (with `momentum=True`: FISTA), for a dictionary of any norm. Training, on the objective
    itself (`unrolled.losses.Lasso`) or on known codes (`unrolled.losses.CodeError`), makes each layer worth many
    iterations.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real or complex. scikit-learn's `components_` are its transpose.
        num_iters: number of layers K.
        alpha: weight of the l1 norm, positive, in the units of y times those of the atoms.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        momentum: extrapolate between layers by Nesterov's schedule plus a learned offset, see `unrolled.Momentum`.
        factored: learn $W_k$ and $D_k$ with $S_k = I - W_k D_k$ (`FactoredLISTAStep`) in place of $W_k$ and $S_k$
            (`LISTAStep`). Cheaper where $2 m < n$; the same before training.
        shrinkage: what takes the place of the soft threshold $S_\theta$, such as `PiecewiseLinear()` (starts as the
            same) or `GeneralizedShrinkage(0.5)` (then $\alpha$ weighs $\sum|x_i|^p$). Layers that are not tied get
            copies of it. `None` is the plain soft threshold, without further parameters.
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
        >>> dictionary = torch.nn.functional.normalize(torch.randn(64, 256), dim=0)
        >>> net = LISTA(dictionary, 16, alpha=0.1, factored=True)
        >>> net(torch.randn(8, 64)).shape
        torch.Size([8, 256])

    Reference:
        K. Gregor and Y. LeCun, "Learning Fast Approximations of Sparse Coding", ICML 2010.
    """

    def __init__(
        self,
        dictionary: Tensor,
        num_iters: int = 16,
        *,
        alpha: float,
        tied: bool | Sequence[str] = False,
        momentum: bool = False,
        factored: bool = False,
        shrinkage: Shrinkage | None = None,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        form = FactoredLISTAStep if factored else LISTAStep
        step: Step = form(dictionary, alpha=alpha, shrinkage=shrinkage, device=device, dtype=dtype)
        super().__init__(Momentum(step) if momentum else step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
