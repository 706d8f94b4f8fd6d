"""What theory says of layers that are iterations of ISTA and FISTA for the Lasso."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled import _check
from unrolled._tree import State, describe
from unrolled.momentum import MomentumState
from unrolled.operators import Dense, LinearOperator
from unrolled.report import measures
from unrolled.report.columns import Column, Kind, share
from unrolled.report.recording import Layer, Run
from unrolled.report.theories import _parameters
from unrolled.report.theories._fit import Fit, double, fit
from unrolled.report.theory import Theory
from unrolled.report.verdicts import Rules
from unrolled.solvers import fista, lasso_objective, lipschitz
from unrolled.sparse._steps import SelectionState, fixed_operator
from unrolled.step import Step

BECK = "A. Beck and M. Teboulle, SIAM J. Imaging Sciences 2(1), 2009"
COMBETTES = "P. L. Combettes and V. R. Wajs, Multiscale Modeling & Simulation 4(4), 2005"
BREDIES = "K. Bredies and D. A. Lorenz, Journal of Fourier Analysis and Applications 14, 2008"
DAUBECHIES = "I. Daubechies, M. Defrise and C. De Mol, Comm. Pure and Applied Mathematics 57(11), 2004"


class ISTATheory(Theory):
    r"""$x_{k+1} = S_{\alpha/L}\bigl(x_k + \tfrac1L A^H (y - A x_k)\bigr)$, $L = \|A\|_2^2$, for
    $F(x) = \tfrac12\|y - Ax\|^2 + \alpha\|x\|_1$.

    | column | measured | predicted |
    |---|---|---|
    | objective | mean $F(x_{k})$ over mean $F^*$ | $\le 1 + L\|x_0 - x^*\|^2 / (2 k F^*)$, a bound |
    | decrease | share of samples with $F(x) - F(x^+) \ge \tfrac L2\|x^+ - x\|^2$ | 1 |
    | gain | $\|x^+ - x^*\| / \|x - x^*\|$ to the Lasso's solution $x^*$ | $\le 1$ |
    | lipschitz | largest norm of the layer's Jacobian $J$ seen | $\le 1$ |
    | on support | norm of $J$ between the nonzeros $S$ of $x^+$ | that of $I - A_S^H A_S / L$ (complex: at most) |
    | step | times $1/L$; from 2 on the iteration may diverge | 1 |
    | threshold | times $\alpha/L$ | 1 |

    Where the truth is known, $S$ are the nonzeros that are true. Step $s$ and threshold $\theta$ are measured from what
    the layer does, whatever its parameters are called: $\theta$ from points far out, where the layer is linear but for
    $-\theta\,\mathrm{sgn}(x^+)$; then $s$ in least squares, on the nonzeros, from
    $x^+ - x + \theta\,\mathrm{sgn}(x^+) = s\,A^H(y - Ax)$ at the states of the data.

    Laws hold for layers that take the step $1/L$ on the Lasso of this `alpha`. A trained layer may leave them on
    purpose: what it is worth stands in the column "removal".

    Args:
        dictionary: $A$, a matrix (m, n), atoms as columns, or a `LinearOperator`; that of the network before training.
        alpha: weight of the l1 norm, positive. Another weight is another Lasso: take the one the network started from.
        solution_iters: iterations of FISTA with restarts for $x^*$, at least 1; it stops earlier where it has settled.

    Raises:
        TypeError, ValueError: as `LISTA`; a network with momentum, for which `FISTATheory` is made, or whose readout is
            no code of the dictionary.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(25, 50), dim=0)
        >>> net, y = LISTA(dictionary, 4, alpha=0.1), torch.randn(64, 25)
        >>> report = LayerReport(net, y, ISTATheory(dictionary, alpha=0.1))
        >>> report.value("step", 0)    # doctest: +SKIP
        1.0

    Reference:
        A. Beck and M. Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems",
        SIAM J. Imaging Sciences 2(1), 2009, lemma 2.3 and theorem 3.1.
    """

    momentum = False

    def __init__(self, dictionary: Tensor | LinearOperator, alpha: float, *, solution_iters: int = 1000) -> None:
        self.alpha = _check.real("alpha", alpha, above=0.0, hint="It weighs the l1 norm.")
        self.solution_iters = _check.integer("solution_iters", solution_iters)
        # A copy: it shall stay what it is while the network learns.
        self.dictionary = copy.deepcopy(fixed_operator("dictionary", dictionary, None, None)).requires_grad_(False)
        self.L = lipschitz(self.dictionary)

    def __str__(self) -> str:
        return f"{'FISTA' if self.momentum else 'ISTA'}, alpha={self.alpha:g}, L={float(self.L):.4g}"

    def check(self, run: Run) -> None:
        readout = run.output
        shape = self.dictionary.in_shape
        if not isinstance(readout, Tensor) or tuple(readout.shape[run.batch_dims :]) != shape:
            raise ValueError(
                f"{type(self).__name__} is about codes {shape} of its dictionary, the network returns "
                f"{describe(readout)}. Pass the network's dictionary, or another theory."
            )
        has = isinstance(run.layers[0].state, MomentumState)
        if has is not self.momentum:
            other, word = ("FISTATheory", "has") if has else ("ISTATheory", "has no")
            raise ValueError(f"the network {word} momentum: take {other} for it, not {type(self).__name__}.")

    def objective(self, run: Run) -> Callable[[Any], Tensor]:
        """F of every sample, in float64: decreases near the optimum drown in rounding otherwise."""
        A, y = _doubled(self.dictionary), double(run.inputs[0])
        return lambda x: lasso_objective(A, y, double(x), self.alpha)

    def solution(self, run: Run) -> Tensor:
        y = run.inputs[0]
        return fista(self.dictionary, y, self.alpha, num_iters=self.solution_iters, restart=True, tol=1e-5)

    def columns(self, run: Run) -> Sequence[Column]:
        columns = [
            Column(
                "objective",
                lambda layer: float(run.objectives[layer.index + 1].mean() / self._least(run)),
                self._bound,
                Kind.BOUND,
                1e-3,
                self._rate[0],
                f"{BECK}, {self._rate[1]}",
                "slower than the bound",
            ),
            Column(
                "decrease",
                self._decrease,
                1.0,
                Kind.AT_LEAST,
                0.0,
                "F(z) - F(x+) ≥ L/2 |x+ - z|²" if self.momentum else "F(x) - F(x+) ≥ L/2 |x+ - x|²",
                f"{BECK}, lemma 2.3; up to 1e-6 of F",
                "no sufficient decrease",
            ),
            Column(
                "lipschitz",
                self._lipschitz,
                1.0,
                Kind.AT_MOST,
                1e-3,
                "|T x - T x'| ≤ |x - x'| for steps up to 2/L",
                f"{COMBETTES}; the largest value seen",
                "expansive",
            ),
            Column(
                "on support",
                self._on_support,
                self._on_support_predicted,
                Kind.AT_MOST if _is_complex(self.dictionary) else Kind.EQUALITY,  # phases are drawn together as well
                1e-2,
                "|J_SS| = |I - A_S' A_S / L|",
                f"{BREDIES}; both by the same power iteration",
            ),
            Column("step", lambda layer: self._value(layer, 0), 1.0, Kind.EQUALITY, 1e-2, "s = 1/L", DAUBECHIES),
            Column(
                "threshold",
                lambda layer: self._value(layer, 1),
                1.0,
                Kind.EQUALITY,
                1e-2,
                "theta = alpha/L",
                DAUBECHIES,
            ),
        ]
        if not self.momentum:
            gain = Column(
                "gain",
                lambda layer: measures.gain(layer, run.solution),
                1.0,
                Kind.AT_MOST,
                1e-3,
                "|x+ - x*| ≤ |x - x*|",
                f"{COMBETTES}; x* is the solution of the Lasso",
                "moving away",
            )
            columns.insert(2, gain)
        return columns if run.power_iters else [c for c in columns if c.name not in ("lipschitz", "on support")]

    def conditions(self, values: Mapping[str, float]) -> list[str]:
        step, threshold = values.get("step", 1.0), values.get("threshold", 1.0)
        found = []
        if step > 1.01:
            found.append(
                f"its step is {step:.3g}/L, the laws need at most {'1/L or, for some, ' if step < 2 else ''}2/L"
            )
        if step <= 0:
            found.append("it does not go down the gradient")
        elif abs(threshold / step - 1) > 0.02:
            found.append(f"threshold and step belong to an l1 weight of {threshold / step:.3g} alpha")
        if not found:
            found.append("its matrices are not those of a gradient step on this dictionary")
        return found

    def judge(self, values: Mapping[str, float], rules: Rules) -> list[tuple[str, str]]:
        step, threshold = values.get("step", math.nan), values.get("threshold", math.nan)
        found = []
        if step >= 2:
            found.append(
                ("step beyond 2/L", f"its step is {step:.3g}/L, with which the classical iteration may diverge")
            )
        ratio = threshold / step if step > 0 else math.nan
        if ratio > rules.over_threshold:
            found.append(("over-thresholding", f"its threshold is {ratio:.3g} times step size times alpha"))
        elif ratio < 1 / rules.over_threshold:
            found.append(("under-thresholding", f"its threshold is {ratio:.3g} times step size times alpha"))
        return found

    def untrained(self, step: Step) -> Step | None:
        return _parameters.untrained(step, self.dictionary, self.alpha, self.L) or super().untrained(step)

    def scaled(self, step: Step, step_size: float, threshold: float) -> Step | None:
        return _parameters.scaled(step, step_size, threshold)

    def longest_step(self, run: Run, index: int) -> float | None:
        """1/L_S over the present step, L_S the largest eigenvalue of A'A on the nonzeros of any sample looked at."""
        layer = run.probe.layers[index]
        fit, largest = self._fit(layer), self._largest_on_support(layer)
        if fit is None or largest is None or not largest > 0 or not fit.step > 0:
            return None
        return float(self.L) / largest / fit.step

    def with_momentum(self) -> Theory:
        return FISTATheory(self.dictionary, self.alpha, solution_iters=self.solution_iters)

    # ---- Columns ----

    @property
    def _rate(self) -> tuple[str, str]:
        return "F(x_k) - F* ≤ L |x_0 - x*|² / (2 k)", "theorem 3.1"

    def _bound(self, layer: Layer) -> float:
        run, k = layer.run, layer.index + 1
        away = float(run.norm(run.layers[0].x - run.solution).square().mean())
        rate = 2 / (k + 1) ** 2 if self.momentum else 1 / (2 * k)
        return 1 + rate * float(self.L) * away / self._least(run)

    def _least(self, run: Run) -> float:
        return float(run.memo("least", lambda: self.objective(run)(run.solution).mean()))

    def _decrease(self, layer: Layer) -> Tensor:
        z = self._point(layer)
        before = self.objective(layer.run)(z) if self.momentum else layer.run.objectives[layer.index]
        needed = self.L.double() / 2 * layer.distance(layer.new_x, z).square()
        return share(before - layer.run.objectives[layer.index + 1] >= needed - 1e-6 * before)

    def _lipschitz(self, layer: Layer) -> float | None:
        layer = layer.probe
        through = self._through(layer)
        seen = layer.lipschitz() if through is None else layer.norm_of(through, self._point(layer))
        return None if seen is None else float(seen.max())

    def _on_support(self, layer: Layer) -> Tensor | None:
        layer = layer.probe
        through = self._through(layer)
        return None if through is None else layer.norm_of(through, self._point(layer), _support(layer))

    def _on_support_predicted(self, layer: Layer) -> Tensor | None:
        layer, A = layer.probe, self.dictionary
        return layer.norm_of(lambda x: x - A.adjoint(A(x)) / self.L, self._point(layer), _support(layer))

    def _largest_on_support(self, layer: Layer) -> float | None:
        A = self.dictionary
        seen = layer.norm_of(lambda x: A.adjoint(A(x)), self._point(layer), layer.new_x != 0)
        return None if seen is None else float(seen.max())

    def _value(self, layer: Layer, which: int) -> float | None:
        fit = self._fit(layer.probe)
        return None if fit is None else fit[which]

    def _fit(self, layer: Layer) -> Fit | None:
        through, z = self._through(layer), self._point(layer)
        if through is None:
            return None

        def fitted() -> Fit | None:
            pulled = self.dictionary.adjoint(layer.inputs[0] - self.dictionary(z))
            found = fit(through, z, layer.new_x, pulled)
            L = float(self.L)
            return None if found is None else Fit(found.step * L, found.threshold * L / self.alpha)

        return layer.run.memo(f"fit {layer.index}", fitted)

    def _point(self, layer: Layer) -> Tensor:
        """Where the layer takes its gradient step."""
        return layer.x

    def _through(self, layer: Layer) -> Callable[[Tensor], Tensor] | None:
        """The layer as a map of the point of its gradient step; `None` for a state that is not known."""
        state: State = layer.state
        if isinstance(state, Tensor):
            return lambda x: layer.run.readout(layer.apply(x))
        if isinstance(state, SelectionState):
            return lambda x: layer.run.readout(layer.apply(SelectionState(x, state.k)))
        return None


def _support(layer: Layer) -> Tensor:
    """The nonzeros of what goes out; of these only the true ones, where they are known."""
    found = layer.new_x != 0
    return found if layer.run.truth is None else found & (layer.run.truth != 0)


class FISTATheory(ISTATheory):
    r"""$x_{k+1} = S_{\alpha/L}\bigl(z + \tfrac1L A^H (y - A z)\bigr)$ from the extrapolated $z$.

    The columns of `ISTATheory`, with these differences. The bound is $F(x_k) - F^* \le 2L\|x_0 - x^*\|^2/(k+1)^2$. The
    decrease, the Lipschitz constant, step and threshold are those of the gradient step itself, from $z$ on. There is
    no law for the distance to the solution, which FISTA may well increase, and none for $F(x_k)$, which may rise.

    For networks with `Momentum` around their steps, and for `LFISTA`.

    Args:
        dictionary, alpha, solution_iters: as for `ISTATheory`.

    Reference:
        A. Beck and M. Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems",
        SIAM J. Imaging Sciences 2(1), 2009, lemma 2.3 and theorem 4.4.
    """

    momentum = True

    @property
    def _rate(self) -> tuple[str, str]:
        return "F(x_k) - F* ≤ 2 L |x_0 - x*|² / (k + 1)²", "theorem 4.4"

    def _point(self, layer: Layer) -> Tensor:
        state: MomentumState = layer.state
        t = (1 + (1 + 4 * state.t.square()).sqrt()) / 2
        offset = getattr(layer.step, "offset", 0.0)
        return state.x + ((state.t - 1) / t + offset) * (state.x - state.previous)

    def _through(self, layer: Layer) -> Callable[[Tensor], Tensor] | None:
        # At rest, x = previous, there is no extrapolation: what remains is the gradient step.
        state: MomentumState = layer.state
        return lambda z: layer.run.readout(layer.apply(MomentumState(z, z, state.t)))

    def with_momentum(self) -> Theory:
        return self


def _is_complex(A: LinearOperator) -> bool:
    numbers = A._numbers()
    return numbers is not None and numbers.is_complex()


def _doubled(A: LinearOperator) -> LinearOperator:
    dtype = torch.complex128 if _is_complex(A) else torch.float64
    return Dense(A.matrix.to(dtype)) if isinstance(A, Dense) else copy.deepcopy(A).to(dtype=dtype)
