"""Deep l0 encoders: iterative hard thresholding with learned matrices, by price of a nonzero or by their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.functional import helu, top_k_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.solvers import lipschitz
from unrolled.sparse.ista import _affine, _complement, _still
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class _Prepared(NamedTuple):
    drive: Tensor  # W y, (..., n)
    inhibition: Tensor  # S^T, (n, n): looked up and transposed here, once a call, not in every iteration
    zero: Tensor  # the first code, (..., n), without memory of its own


class _PreparedThreshold(NamedTuple):
    linear: _Prepared
    theta: Tensor  # (n,)


class _IHTStep(Step):
    """What both encoders share: W y + S x, which starts as a gradient step of length eta."""

    def __init__(
        self,
        dictionary: Tensor,  # (m, n), atoms as columns
        *,
        step_size: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.dictionary("dictionary", dictionary, allow_complex=True)
        self.step_size = None if step_size is None else _check.real("step_size", step_size, above=0.0)
        like = _check.converted("dictionary", dictionary, device, dtype)
        n = like.shape[1]
        self.weight = nn.Parameter(torch.empty_like(like.T, memory_format=torch.contiguous_format))
        self.inhibition = nn.Parameter(self.weight.new_empty(n, n))

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        """Back to hard thresholding on this dictionary: W = eta D^H, S = I - eta D^H D."""
        if dictionary.shape != self.weight.mT.shape:
            raise ValueError(
                f"dictionary must have shape {tuple(self.weight.mT.shape)} as before, got {tuple(dictionary.shape)}."
            )
        self.weight.copy_(dictionary.mH * self._step(dictionary))
        self.inhibition.copy_(_complement(self.weight, dictionary))

    def _step(self, dictionary: Tensor) -> Tensor:
        """The step size eta, ()."""
        if self.step_size is None:
            return 1 / lipschitz(dictionary)
        return dictionary.real.new_tensor(self.step_size)

    def check(self, y: Tensor) -> None:
        _check.signals("y", y, self.weight, self.weight.shape[1], of="the dictionary")

    def linear(self, y: Tensor) -> _Prepared:
        drive = nn.functional.linear(y, self.weight)
        return _Prepared(drive, self.inhibition.mT, drive.new_zeros(()).expand_as(drive))

    def extra_repr(self) -> str:
        n, m = self.weight.shape
        return f"signal={m}, atoms={n}"


def _moved(x: Tensor, context: _Prepared) -> Tensor:
    """W y + S x."""
    drive, inhibition, zero = context
    return drive if _still(x, zero) else _affine(x, inhibition, drive)


class L0EncoderStep(_IHTStep):
    r"""$x_{k+1} = h_{\theta, s}(W y + S x_k)$ with the HELU $h$, a hard threshold $\theta$ with a ramp of slope $s$.

    Starts as `solvers.iht_penalized`: $W = \eta D^H$, $S = I - \eta D^H D$, $\theta = \sqrt{2\alpha\eta}$ with the
    step size $\eta$; exactly so where the slope is 0. With $T_\theta = \mathrm{diag}(\theta)$, $h_{\theta, s}$ is
    $T_\theta \circ \mathrm{HELU}_s \circ T_\theta^{-1}$.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real or complex.
        alpha: the price of one nonzero, positive, in the units of $\|y\|^2$.
        slope: $s$, from 0 to 1; a buffer, no parameter.
        step_size: $\eta$ to start with; $1/\|D\|_2^2$ where not given.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    slope: Tensor

    def __init__(
        self,
        dictionary: Tensor,
        *,
        alpha: float,
        slope: float = 0.2,
        step_size: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dictionary, step_size=step_size, device=device, dtype=dtype)
        self.alpha = _check.real("alpha", alpha, above=0.0, hint="It is the price of one nonzero.")
        self.first_slope = _fraction("slope", slope)
        # theta = exp(log_theta): positive whatever the optimiser does, and a learning rate is relative to its size.
        self.log_theta = nn.Parameter(torch.empty_like(self.weight[:, 0].real, memory_format=torch.contiguous_format))
        # A buffer, so that it is saved, loaded and moved, and a compiled network need not be compiled again.
        self.register_buffer("slope", torch.empty_like(self.log_theta[0].detach()))
        self.reset_parameters(dictionary)

    @property
    def theta(self) -> Tensor:
        """The thresholds, (n,), positive."""
        return self.log_theta.exp()

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        """Back to hard thresholding on this dictionary, and to the slope that was given first."""
        super().reset_parameters(dictionary)
        log_theta = (2 * self.alpha * self._step(dictionary)).log() / 2
        self.log_theta.copy_(log_theta.expand(len(self.log_theta)))
        self.slope.fill_(self.first_slope)

    def prepare(self, y: Tensor) -> _PreparedThreshold:
        return _PreparedThreshold(self.linear(y), self.theta)

    def init(self, context: _PreparedThreshold) -> Tensor:
        return context.linear.zero

    def forward(self, x: Tensor, context: _PreparedThreshold) -> Tensor:
        return helu(_moved(x, context.linear), context.theta, self.slope)

    def extra_repr(self) -> str:
        slope = "" if self.slope.is_meta else f", slope={float(self.slope):g}"
        return f"{super().extra_repr()}, alpha={self.alpha:g}{slope}"


class MSparseEncoderStep(_IHTStep):
    r"""$x_{k+1} = \mathrm{max}_M(W y + S x_k)$: the M entries of largest modulus stay, the others become 0.

    Starts as `solvers.iht`: $W = \eta D^H$, $S = I - \eta D^H D$ with the step size $\eta$.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real or complex.
        sparsity: $M$, from 1 to n.
        step_size: $\eta$ to start with; $1/\|D\|_2^2$ where not given.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    def __init__(
        self,
        dictionary: Tensor,
        *,
        sparsity: int,
        step_size: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dictionary, step_size=step_size, device=device, dtype=dtype)
        self.sparsity = _check.integer("sparsity", sparsity)
        if self.sparsity > len(self.weight):
            raise ValueError(f"sparsity must be at most {len(self.weight)}, the number of atoms, got {sparsity}.")
        self.reset_parameters(dictionary)

    def prepare(self, y: Tensor) -> _Prepared:
        return self.linear(y)

    def init(self, context: _Prepared) -> Tensor:
        return context.zero

    def forward(self, x: Tensor, context: _Prepared) -> Tensor:
        return top_k_threshold(_moved(x, context), self.sparsity)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity}"


class L0Encoder(Unroll):
    r"""$x_{k+1} = h_{\theta_k, s}(W_k y + S_k x_k)$: iterative hard thresholding unrolled, with thresholds that learn.

    Maps signals to sparse codes, $y \mapsto \arg\min_x \tfrac12\|y - Dx\|^2 + \alpha\|x\|_0$ approximately. The hard
    threshold keeps what exceeds $\theta$ as it is, where LISTA's soft one takes $\theta$ from it. But no gradient
    reaches a hard threshold. So its jump is a ramp, of width $s\theta$ (`functional.helu`), whose slope $s$ training
    takes from 0.2 to 0: give `AnnealSlope` to `fit`. Untrained and with `slope=0` the network is
    `solvers.iht_penalized`, for a dictionary of any norm; with the default slope it is close to that.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real or complex. It serves to start the parameters.
        num_iters: number of layers K.
        alpha: the price of one nonzero, positive, in the units of $\|y\|^2$: it starts all thresholds at
            $\sqrt{2\alpha\eta}$ with the step size $\eta$.
        slope: $s$ to begin with, from 0 to 1. At 0 the thresholds do not learn.
        step_size: $\eta$ of the gradient steps that the layers start as; $1/\|D\|_2^2$ where not given, as in the
            solver. A longer one, such as the published 1 for atoms of norm 1, often comes further in few layers, but
            may diverge before it is trained.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - y: (..., m), the dtype and device of the parameters
        - output: (..., n)

    Raises:
        TypeError: `dictionary` or `y` is no floating point or complex tensor, or their dtypes differ.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, `alpha <= 0`, a slope that is not from 0 to
            1, `step_size <= 0`, `num_iters < 1`.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(25, 50), dim=0)
        >>> y = torch.randn(4, 25)
        >>> net = L0Encoder(dictionary, 3, alpha=0.1, slope=0.0)
        >>> torch.allclose(net(y), iht_penalized(dictionary, y, 0.1, num_iters=3), atol=1e-5)
        True

    Reference:
        Z. Wang, Q. Ling and T. S. Huang, "Learning Deep l0 Encoders", AAAI 2016.
    """

    def __init__(
        self,
        dictionary: Tensor,
        num_iters: int = 2,
        *,
        alpha: float,
        slope: float = 0.2,
        step_size: float | None = None,
        tied: bool | Sequence[str] = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = L0EncoderStep(dictionary, alpha=alpha, slope=slope, step_size=step_size, device=device, dtype=dtype)
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    @property
    def slope(self) -> Tensor:
        """The slope of the ramp, (); set it, `net.slope = 0.0`, and all layers have it."""
        return cast(L0EncoderStep, self.steps[0]).slope

    @slope.setter
    def slope(self, slope: float) -> None:
        slope = _fraction("slope", slope)
        for step in self.steps:
            cast(L0EncoderStep, step).slope.fill_(slope)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)


class MSparseEncoder(Unroll):
    r"""$x_{k+1} = \mathrm{max}_M(W_k y + S_k x_k)$: iterative hard thresholding with exactly M nonzeros, unrolled.

    Maps signals to codes, $y \mapsto \arg\min_x \|y - Dx\|^2$ over $\|x\|_0 \le M$ approximately. The nonlinearity
    pools the M entries of largest modulus and puts them back in their places; it has nothing to learn and no slope.
    Untrained the network is `solvers.iht`, for a dictionary of any norm.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real or complex. It serves to start the parameters.
        num_iters: number of layers K.
        sparsity: $M$, from 1 to n: the nonzeros of every code.
        step_size: of the gradient steps that the layers start as; $1/\|D\|_2^2$ where not given, as in the solver. A
            longer one, such as the published 1 for atoms of norm 1, often comes further in few layers, but may diverge
            before it is trained.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - y: (..., m), the dtype and device of the parameters
        - output: (..., n)

    Raises:
        TypeError: `dictionary` or `y` is no floating point or complex tensor, or their dtypes differ.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, a sparsity that is not from 1 to n,
            `step_size <= 0`, `num_iters < 1`.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(25, 50), dim=0)
        >>> codes = MSparseEncoder(dictionary, 3, sparsity=5)(torch.randn(4, 25))
        >>> (codes != 0).sum(1)
        tensor([5, 5, 5, 5])

    Reference:
        Z. Wang, Q. Ling and T. S. Huang, "Learning Deep l0 Encoders", AAAI 2016.
    """

    def __init__(
        self,
        dictionary: Tensor,
        num_iters: int = 2,
        *,
        sparsity: int,
        step_size: float | None = None,
        tied: bool | Sequence[str] = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = MSparseEncoderStep(dictionary, sparsity=sparsity, step_size=step_size, device=device, dtype=dtype)
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)


@dataclass(frozen=True)
class AnnealSlope:
    r"""$s = s_0 + (s_1 - s_0) \min(k / K, 1)$ after update k: a callback for `fit` that hardens every `L0Encoder`.

    It finds the encoders wherever they are in the network that is trained. The first update is made with the slope that
    the encoder has. Choose fewer updates than `fit` makes, so that the last of them train the network as it will be
    used.

    Args:
        num_steps: K, after how many updates the slope has reached its end, at least 1.
        start: $s_0$, from 0 to 1.
        end: $s_1$, from 0 to 1.

    Raises:
        TypeError: a number of the wrong type.
        ValueError: a number out of its range, or (when called) a network without an `L0Encoder`.

    Example:
        >>> net = L0Encoder(torch.eye(3), alpha=0.1)
        >>> pairs = [(torch.randn(8, 3), torch.randn(8, 3))]
        >>> history = fit(net, pairs, CodeError(), num_steps=10, callbacks=[AnnealSlope(8)])
        >>> net.slope
        tensor(0.)
    """

    num_steps: int
    start: float = 0.2
    end: float = 0.0

    def __post_init__(self) -> None:
        _check.integer("num_steps", self.num_steps)
        _fraction("start", self.start)
        _fraction("end", self.end)

    def __call__(self, step: int, loss: float, net: nn.Module) -> None:
        """Set the slope that follows update number `step`."""
        slope = self.start + (self.end - self.start) * min(step / self.num_steps, 1.0)
        found = [module for module in net.modules() if isinstance(module, L0EncoderStep)]
        if not found:
            raise ValueError(f"net is a {type(net).__name__} without an L0Encoder: there is no slope to anneal.")
        for module in found:
            module.slope.fill_(slope)


def _fraction(name: str, value: float) -> float:
    if _check.real(name, value, minimum=0.0) > 1:
        raise ValueError(f"{name} must be at most 1, got {value}. It is a fraction of the threshold.")
    return float(value)
