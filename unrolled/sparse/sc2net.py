"""SC2Net: adaptive ISTA whose gates depend on the signal, which is an LSTM without output gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.functional import soft_threshold
from unrolled.gradient import Backprop, Gradient
from unrolled.sparse.adaptive import CellState
from unrolled.sparse.ista import _affine, _complement, _ISTAStep
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll

Shrinkage = Callable[[Tensor, Tensor], Tensor]


class Gates(Protocol):
    """How logits become gates: called as `gates(a, b)`, it returns the input gate and the forget gate.

    Attributes:
        scalar: whether there is one gate of each kind for a signal, in place of one for every atom.
        biases: what the biases of both logits start at.
    """

    @property
    def scalar(self) -> bool: ...
    @property
    def biases(self) -> tuple[float, float]: ...
    def __call__(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class CentredGates:
    r"""$i = 2\sigma(a)$ and $f = 2\sigma(b) - 1$: at logits 0 exactly $i = 1$ and $f = 0$, where both slopes are 1/2.

    The network starts as ISTA to the last digit and in the middle of its gates. They can do more than the published
    ones: $i$ can exceed 1 and $f$ be negative, which together over-relax the step.

    Args:
        scalar: one gate of each kind for a signal, in place of one for every atom.
        relaxation: $\omega$, between 0 and 2: start with $i = \omega$ and $f = 1 - \omega$, which is relaxed ISTA,
            $c_k = c_{k-1} + \omega (W y + S x_{k-1} - c_{k-1})$, with the fixed points of ISTA. At 1 it is ISTA, above
            it goes further each time; up to 1.5 it surely converges.
    """

    scalar: bool = False
    relaxation: float = 1.0

    def __post_init__(self) -> None:
        if _check.real("relaxation", self.relaxation, above=0.0) >= 2:
            raise ValueError(f"relaxation must be less than 2, got {self.relaxation}. The input gate stays below 2.")

    @property
    def biases(self) -> tuple[float, float]:
        logit = math.log(self.relaxation / (2 - self.relaxation))
        return logit, -logit

    def __call__(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * a.sigmoid(), (b / 2).tanh()


@dataclass(frozen=True)
class SigmoidGates:
    r"""$i = \sigma(a)$ and $f = \sigma(b)$, as published, with biases that start at $s$ and $-s$.

    The network starts near ISTA: $i = 1 - \epsilon$ and $f = \epsilon$ with $\epsilon = 1 / (1 + e^s)$. The slope of
    both gates there is about $\epsilon$ too, so that the nearer the start, the slower the gates learn.

    Args:
        saturation: $s$, any real number. Beyond 37 float64 can't tell $i$ from 1, and the gates don't learn.
        scalar: one gate of each kind for a signal, in place of one for every atom.
    """

    saturation: float = 4.0
    scalar: bool = False

    def __post_init__(self) -> None:
        _check.real("saturation", self.saturation)

    @property
    def biases(self) -> tuple[float, float]:
        return self.saturation, -self.saturation

    def __call__(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.sigmoid(), b.sigmoid()


class _Prepared(NamedTuple):
    drive: Tensor  # (W, U_i, U_f) y + (0, b_i, b_f), (..., n + 2 g)
    recurrent: Tensor  # (S, V_i, V_f)^T, (n, n + 2 g)
    theta: Tensor  # (n,)


class SC2NetStep(_ISTAStep):
    r"""$c_k = f_k \odot c_{k-1} + i_k \odot (W y + S x_{k-1}),\quad x_k = S_\theta(c_k)$ with gates
    $i_k = i(U_i y + V_i x_{k-1} + b_i)$ and $f_k = f(U_f y + V_f x_{k-1} + b_f)$.

    Starts as ISTA: $W = D^T/L$, $S = I - D^T D/L$, $\theta = \alpha/L$ with $L = \|D\|_2^2$, and $U = V = 0$ in the
    gates. The number of gates $g$ is $n$, or 1 where they are scalar; `gate_weight` holds $U_i$ over $U_f$,
    `gate_inhibition` $V_i$ over $V_f$. An iteration is one product with $(n + 2 g) \times n$ numbers.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real.
        alpha: weight of the l1 norm in the Lasso, positive.
        gates: how logits become gates, `CentredGates` or `SigmoidGates`.
        shrinkage: makes the code of the cell, called as `shrinkage(cell, theta)`.
        threshold: where $\theta$ starts, positive; $\alpha/L$ where not given.
        device, dtype: of the parameters; those of the dictionary where not given.
    """

    def __init__(
        self,
        dictionary: Tensor,
        *,
        alpha: float,
        gates: Gates = CentredGates(),
        shrinkage: Shrinkage = soft_threshold,
        threshold: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if (dtype is not None and dtype.is_complex) or (isinstance(dictionary, Tensor) and dictionary.is_complex()):
            raise TypeError(
                "dictionary and dtype must be real: a sigmoid gate has no complex form. For complex signals take "
                "AdaptiveISTA, whose gates do not depend on the signal, or LISTA."
            )
        super().__init__(dictionary, alpha=alpha, device=device, dtype=dtype)
        if isinstance(gates, type) or not callable(gates):
            raise TypeError(f"gates must be an object such as CentredGates() or SigmoidGates(), got {gates!r}.")
        if not callable(shrinkage):
            raise TypeError(
                f"shrinkage must be a function of cell and threshold, such as functional.soft_threshold or "
                f"functional.double_tanh, got {shrinkage!r}."
            )
        self.gates = gates
        self.shrinkage = shrinkage
        self.threshold = None if threshold is None else _check.real("threshold", threshold, above=0.0)
        n, m = self.weight.shape
        g = 1 if gates.scalar else n
        self.inhibition = nn.Parameter(self.weight.new_empty(n, n))
        self.gate_weight = nn.Parameter(self.weight.new_empty(2 * g, m))
        self.gate_inhibition = nn.Parameter(self.weight.new_empty(2 * g, n))
        self.gate_bias = nn.Parameter(self.weight.new_empty(2 * g))
        self.reset_parameters(dictionary)

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        """Back to ISTA on this dictionary, as nearly as the gates allow."""
        super().reset_parameters(dictionary)
        self.inhibition.copy_(_complement(self.weight, dictionary))
        if self.threshold is not None:
            self.log_theta.fill_(self.threshold).log_()
        self.gate_weight.zero_()
        self.gate_inhibition.zero_()
        for bias, value in zip(self.gate_bias.chunk(2), self.gates.biases, strict=True):
            bias.fill_(value)

    def prepare(self, y: Tensor) -> _Prepared:
        # The candidate and both gates in one product, here with the signal and in every iteration with the code.
        bias = torch.cat((torch.zeros_like(self.log_theta), self.gate_bias))
        drive = nn.functional.linear(y, torch.cat((self.weight, self.gate_weight)), bias)
        return _Prepared(drive, torch.cat((self.inhibition, self.gate_inhibition)).mT, self.theta)

    def init(self, context: _Prepared) -> CellState:
        zero = torch.zeros_like(context.drive[..., : len(context.theta)])
        return CellState(zero, zero)

    def forward(self, state: CellState, context: _Prepared) -> CellState:
        drive, recurrent, theta = context
        n = len(theta)
        together = _affine(state.code, recurrent, drive)
        i, f = self.gates(*together[..., n:].chunk(2, -1))
        cell = f * state.cell + i * together[..., :n]
        return CellState(cell, self.shrinkage(cell, theta))

    def readout(self, state: CellState) -> Tensor:
        return state.code

    def extra_repr(self) -> str:
        shrinkage = "" if self.shrinkage is soft_threshold else f", shrinkage={_name(self.shrinkage)}"
        return f"{super().extra_repr()}, gates={self.gates}{shrinkage}"


def _name(function: Callable[..., Tensor]) -> str:
    return getattr(function, "__name__", type(function).__name__)


class SC2Net(Unroll):
    r"""$c_k = f_k \odot c_{k-1} + i_k \odot (W y + S x_{k-1}),\quad x_k = S_\theta(c_k)$: a sparse LSTM for codes.

    Adaptive ISTA: every atom has an input gate i and a forget gate f that are computed in each layer from the signal
    and the code so far, $i_k = i(U_i y + V_i x_{k-1} + b_i)$ and likewise $f_k$. In the terms of recurrent networks it
    is an LSTM without output gate, whose candidate has no tanh and whose output nonlinearity is the soft threshold, so
    that codes are exactly sparse. Weights are shared by all layers, as published. Untrained it is ISTA.

    Args:
        dictionary: $D$, (m, n), atoms as columns, real. It serves to start the parameters.
        num_iters: number of layers K.
        alpha: weight of the l1 norm, positive, in the units of y times those of the atoms.
        gates: how logits become gates. `CentredGates()` starts as ISTA exactly; `SigmoidGates()`, as published, starts
            near it. Both can be `scalar`: one gate of each kind for a signal in place of one for every atom.
        shrinkage: makes the code of the cell, called as `shrinkage(cell, theta)`: `functional.soft_threshold`, or
            `functional.double_tanh`, which is smooth and gives no exact zeros. A Module may have parameters of its own.
        threshold: where $\theta$ starts, positive; $\alpha/L$, that of ISTA, where not given. The double tanh shrinks
            only from about 0.9 on.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters; those of the dictionary where not given.

    Shape:
        - y: (..., m), the dtype and device of the parameters
        - output: (..., n)

    Raises:
        TypeError: `dictionary` or `y` is no floating point tensor, or their dtypes differ; `gates` or `shrinkage` can't
            be called.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, `alpha <= 0`, `threshold <= 0`,
            `num_iters < 1`.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(25, 50), dim=0)
        >>> y = torch.randn(4, 25)
        >>> torch.allclose(SC2Net(dictionary, 8, alpha=0.1)(y), ista(dictionary, y, 0.1, num_iters=8), atol=1e-4)
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
        gates: Gates = CentredGates(),
        shrinkage: Shrinkage = soft_threshold,
        threshold: float | None = None,
        tied: bool | Sequence[str] = True,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = SC2NetStep(
            dictionary,
            alpha=alpha,
            gates=gates,
            shrinkage=shrinkage,
            threshold=threshold,
            device=device,
            dtype=dtype,
        )
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
