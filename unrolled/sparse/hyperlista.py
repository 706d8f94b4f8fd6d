"""HyperLISTA: three numbers for the whole network, set by what each sample's residual says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.operators import Dense
from unrolled.sparse._steps import DictionaryStep, fixed_matrix, share
from unrolled.sparse.selection import select_support
from unrolled.sparse.weights import analytic_weight, symmetric_preconditioner
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class HyperLISTAState(NamedTuple):
    """The code and the one before it."""

    x: Tensor  # (..., n)
    previous: Tensor  # (..., n)


class _Prepared(NamedTuple):
    y: Tensor  # (..., m)
    scale: Tensor  # (..., 1), the l1 norm of A^+ y


class HyperLISTAStep(DictionaryStep):
    r"""$x_{k+1} = \mathrm{SS}_{\theta, p}\bigl(x_k + W^H (y - A x_k) + \beta (x_k - x_{k-1})\bigr)$ with, per sample,
    $e = \|A^+ (y - A x_k)\|_1$, $\theta = c_1 e$, $\beta = c_2 \|x_k\|_0$, $p = c_3 \log(\|A^+ y\|_1 / e)$.

    Args:
        dictionary: $A$, (m, n), atoms as columns, real or complex.
        weight: $W$, (m, n); `None`: $A$ itself.
        preconditioner: $G$, (m, m), applied to every y; `dictionary` and `weight` are meant to contain it. `None`: $I$.
        c1, c2, c3: positive. The first two can be learned; no gradient reaches $c_3$, as a share of the entries is a
            count.
    """

    c3: Tensor

    def __init__(
        self,
        dictionary: Tensor,
        weight: Tensor | None = None,
        preconditioner: Tensor | None = None,
        *,
        c1: float,
        c2: float,
        c3: float,
    ) -> None:
        super().__init__(Dense(dictionary))
        self.weight = None if weight is None else Dense(weight)
        self.preconditioner = None if preconditioner is None else Dense(preconditioner)
        self.pseudo_inverse = Dense(torch.linalg.pinv(dictionary))
        real = dictionary.real
        self.log_c1 = nn.Parameter(real.new_tensor(_check.real("c1", c1, above=0.0)).log())
        self.log_c2 = nn.Parameter(real.new_tensor(_check.real("c2", c2, above=0.0)).log())
        self.register_buffer("c3", real.new_tensor(_check.real("c3", c3, above=0.0)))

    def prepare(self, y: Tensor) -> _Prepared:
        y = y if self.preconditioner is None else self.preconditioner(y)
        return _Prepared(y, self._error(y))

    def init(self, context: _Prepared) -> HyperLISTAState:
        x = self.zeros(context.y)
        return HyperLISTAState(x, x)

    def forward(self, state: HyperLISTAState, context: _Prepared) -> HyperLISTAState:
        x, previous = state
        weight = self.dictionary if self.weight is None else self.weight
        residual = context.y - self.dictionary(x)
        error = self._error(residual)
        beta = self.log_c2.exp() * (x != 0).sum(-1, keepdim=True)
        tiny = torch.finfo(error.dtype).tiny  # y = 0 has errors of 0
        progress = context.scale.clamp(min=tiny).log() - error.clamp(min=tiny).log()
        fraction = (self.c3 * progress).clamp(0, 1).squeeze(-1)
        z = x + weight.adjoint(residual) + beta * (x - previous)
        return HyperLISTAState(select_support(z, self.log_c1.exp() * error, fraction), x)

    def readout(self, state: HyperLISTAState) -> Tensor:
        return state.x

    def _error(self, residual: Tensor) -> Tensor:
        """How far the code is off, in the l1 norm, as far as the residual can tell, (..., 1)."""
        return self.pseudo_inverse(residual).abs().sum(-1, keepdim=True)


class HyperLISTA(Unroll):
    r"""$x_{k+1} = \mathrm{SS}_{\theta_k, p_k}\bigl(x_k + W^H (y - A x_k) + \beta_k (x_k - x_{k-1})\bigr)$, where every
    sample has its own $\theta_k = c_1 e_k$, $\beta_k = c_2 \|x_k\|_0$, $p_k = \min(c_3 \log(\|A^+ y\|_1 / e_k), 1)$ and
    $e_k = \|A^+ (y - A x_k)\|_1$.

    Step size and threshold follow the error that the residual shows, so three numbers are left for the whole network.
    The defaults were found for Gaussian dictionaries with n = 2 m unit atoms and codes of 10 % standard normal
    nonzeros. Such codes they recover to below -80 dB in 16 layers, from n of about 500 on, without any training. The
    threshold is proportional to the signal, so the scale of y does not matter. For other problems, search for better
    numbers on a thousand signals, by the median of the errors. $c_1$ and $c_2$ also have gradients.

    Args:
        dictionary: $A$, (m, n), atoms as columns, real or complex; fixed.
        num_iters: number of layers K.
        c1: threshold over error, positive; $7.45 / n$ where not given, which is 0.0149 for n = 500.
        c2: momentum per nonzero, positive; $1.7 / n$ where not given, which is 0.0034 for n = 500.
        c3: share of entries selected per e-fold reduction of the error, positive. It is fixed.
        symmetric: precondition so that the dictionary is its own weight, $G y = G A x$ with
            `G = symmetric_preconditioner(A)`; otherwise $W$ is `analytic_weight(A)`. With the default numbers one
            is as accurate as the other.
        tied: `True`, one $c_1$ and $c_2$ for all layers; `False`, their own for each; or the names of what is shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the network; those of the dictionary where not given.

    Shape:
        - y: (..., m), the dtype and device of the network
        - output: (..., n)

    Raises:
        TypeError: `dictionary` or `y` is no floating point or complex tensor, or their dtypes differ.
        ValueError: a wrong shape or device, NaN or infinity, a zero atom, a c that is not positive, `num_iters < 1`.

    Example:
        >>> A = torch.nn.functional.normalize(torch.randn(250, 500), dim=0)
        >>> x = torch.randn(8, 500) * (torch.rand(8, 500) < 0.1)
        >>> error = HyperLISTA(A)(x @ A.mT) - x
        >>> bool(error.norm() < 1e-3 * x.norm())
        True

    Reference:
        X. Chen, J. Liu, Z. Wang and W. Yin, "Hyperparameter Tuning is All You Need for LISTA", NeurIPS 2021.
    """

    def __init__(
        self,
        dictionary: Tensor,
        num_iters: int = 16,
        *,
        c1: float | None = None,
        c2: float | None = None,
        c3: float = 0.34,
        symmetric: bool = True,
        tied: bool | Sequence[str] = True,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        A = fixed_matrix("dictionary", dictionary, device, dtype)
        G = symmetric_preconditioner(A) if symmetric else None
        W = None if symmetric else analytic_weight(A)
        # Error and count are sums over the entries: as multiples of 1/n the numbers hold for dictionaries of any size.
        n = A.shape[1]
        c1 = 7.45 / n if c1 is None else c1
        c2 = 1.7 / n if c2 is None else c2
        step = HyperLISTAStep(A if G is None else G @ A, W, G, c1=c1, c2=c2, c3=c3)
        fixed = ("dictionary", "weight", "preconditioner", "pseudo_inverse", "c3")
        super().__init__(step, num_iters, tied=share(tied, step, *fixed), gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, state=state, num_iters=num_iters)
