"""`greedy`: the layers of a sparse coding network set one after another by search, without gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.metrics import nmse_db
from unrolled.operators import Dense
from unrolled.sparse.alista import ALISTA, ALISTAStep, TiLISTA
from unrolled.sparse.coupled import LISTACP, LISTACPStep
from unrolled.sparse.glista import GLISTA, GLISTAStep
from unrolled.sparse.ista import LISTA, FactoredLISTAStep, LISTAStep
from unrolled.sparse.lamp import LAMP, LAMPStep
from unrolled.sparse.lfista import LFISTA, LFISTAStep
from unrolled.sparse.selection import SupportSelection
from unrolled.sparse.weights import analytic_weight
from unrolled.unroll import Unroll

# Multiples of the step size and of the threshold that are tried, from the layer before to ever closer by.
COARSE = (0.7, 0.85, 1.0, 1.15, 1.3), (0.15, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2)
MIDDLE = (0.8, 0.9, 1.0, 1.1), (0.7, 0.85, 1.0, 1.15)
FINE = (0.94, 0.97, 1.0, 1.03, 1.06), (0.85, 0.93, 1.0, 1.08, 1.17)
DAMPINGS = 0.0, 0.015, 0.05, 0.15, 0.5, 1.5, 15.0  # in mean eigenvalues of A A^T


class Problem(Protocol):
    """Signals with known codes, such as an `unrolled.problems.SparseRecovery`."""

    @property
    def dictionary(self) -> Tensor:
        """(m, n), atoms as columns."""

    def batches(self, batch_size: int, /) -> Iterator[tuple[Tensor, Tensor]]:
        """Signals (batch_size, m) and their codes (batch_size, n), without end."""

    def validation(self, count: int, /) -> tuple[Tensor, Tensor]:
        """So many other signals and codes, the same at every call."""


@functools.singledispatch
def greedy(net: Unroll, problem: Problem, *, num_signals: int = 1000) -> list[float]:
    r"""$(\gamma_k, \theta_k) = \arg\min \sum_i \|x_{i,k+1} - x_i\|^2$ layer after layer, by search.

    Every layer tries a grid of step sizes and thresholds around those of the layer before, and a finer one around the
    best of them: a few seconds for 16 layers of (250, 500). Where each layer has a matrix of its own, it is set to
    $\gamma_k W_k$, and $W_k$ is chosen, too, among `analytic_weight`s of several dampings: in the last layers against
    noise, the matched filter beats the decorrelating one.

    Args:
        net: `ALISTA`, `TiLISTA`, `LISTACP`, `GLISTA`, `LISTA`, `LFISTA` or `LAMP`, each layer with numbers of its own.
            What its parameters were before does not matter; the fixed weight of an `ALISTA` stays.
        problem: where signals and codes come from, such as an `unrolled.problems.SparseRecovery`.
        num_signals: how many signals to search on.

    Returns:
        The NMSE in dB after each layer on these very signals; on others it will be somewhat higher.

    Raises:
        TypeError: another network, or one with momentum, or one whose dictionary is no matrix (but for `ALISTA`).
        ValueError: the problem's codes do not fit the network; its layers are tied.

    Example:
        >>> problem = SparseRecovery(50, 100, sparsity=0.05)
        >>> net = ALISTA(problem.dictionary, 8)
        >>> reached = greedy(net, problem)
        >>> reached[-1] < -20
        True
    """
    raise TypeError(f"greedy can't set a {type(net).__name__}. It sets {names(greedy)}.")


@greedy.register
def _(net: ALISTA, problem: Problem, *, num_signals: int = 1000) -> list[float]:
    return _search(net, problem, num_signals, [])


@greedy.register
def _(net: TiLISTA, problem: Problem, *, num_signals: int = 1000) -> list[float]:
    step = cast(ALISTAStep, net[0])
    with torch.no_grad():
        _matrix(step.weight, net).copy_(analytic_weight(_matrix(step.dictionary, net)))
    return _search(net, problem, num_signals, [])


@greedy.register(LISTACP)
@greedy.register(GLISTA)
@greedy.register(LISTA)
@greedy.register(LFISTA)
def _(net: Unroll, problem: Problem, *, num_signals: int = 1000) -> list[float]:
    schedule = Schedule(net, problem)
    reached = schedule.search(problem, num_signals)
    schedule.copy_to(net)
    return reached


@greedy.register
def _(net: LAMP, problem: Problem, *, num_signals: int = 1000) -> list[float]:
    weights = _weights(cast(LAMPStep, net[0]).dictionary)
    return _search(net, problem, num_signals, weights, _Choice(math.inf, 0, 1.0, 1.6))


class Schedule(Unroll):
    """What the networks with matrices start from: ALISTA with a weight for every layer, to be chosen.

    Args:
        net: the network that is to start from it.
        problem: says the dictionary where the network's layers do not.
    """

    def __init__(self, net: Unroll, problem: Problem) -> None:
        check_untied(net)
        step = net[0]
        if type(step) not in _take.registry:
            raise TypeError(
                f"greedy can't set layers of type {type(step).__name__}. Build the network without momentum."
            )
        coupled = isinstance(step, LISTACPStep | GLISTAStep)  # the layers of others know no dictionary, or learn it
        A = (_matrix(step.dictionary, net) if coupled else problem.dictionary).detach()
        selection = getattr(step, "support_selection", None)
        layer = ALISTAStep(Dense(A), Dense(A.clone()), alpha=1.0, support_selection=selection)
        super().__init__(layer, len(net), tied=("dictionary",))
        self.candidates = _weights(A)

    def search(self, problem: Problem, num_signals: int) -> list[float]:
        return _search(self, problem, num_signals, self.candidates)

    @torch.no_grad()
    def copy_to(self, net: Unroll) -> None:
        """Make the network the same function of y as this one."""
        A = cast(Dense, cast(ALISTAStep, self[0]).dictionary).matrix
        for mine, step in zip(cast("Iterator[ALISTAStep]", self), net, strict=True):
            _take(step, A, mine.gamma * cast(Dense, mine.weight).matrix, mine.log_theta)


@functools.singledispatch
def _take(step: nn.Module, A: Tensor, weight: Tensor, log_theta: Tensor) -> None:
    """Make a layer of a network x+ = S_theta(x + weight^T (y - A x))."""
    raise NotImplementedError


@_take.register(LISTACPStep)
@_take.register(GLISTAStep)
def _(step: LISTACPStep | GLISTAStep, A: Tensor, weight: Tensor, log_theta: Tensor) -> None:
    cast(Dense, step.weight).matrix.copy_(weight)
    step.log_theta.copy_(log_theta)
    if isinstance(step, GLISTAStep):  # gates closed
        for gate in (step.gain, step.log_slope, step.overshoot):
            gate.zero_()


@_take.register
def _(step: FactoredLISTAStep, A: Tensor, weight: Tensor, log_theta: Tensor) -> None:
    step.weight.copy_(weight.mT)
    step.dictionary.copy_(A)
    step.log_theta.copy_(log_theta)


@_take.register(LISTAStep)
@_take.register(LFISTAStep)
def _(step: LISTAStep | LFISTAStep, A: Tensor, weight: Tensor, log_theta: Tensor) -> None:
    step.weight.copy_(weight.mT)
    step.inhibition.copy_(torch.eye(A.shape[1]).to(A) - weight.mT @ A)
    step.log_theta.copy_(log_theta)
    if isinstance(step, LFISTAStep):
        step.inertia.zero_()


# ---- The search ------------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    error: float
    weight: int
    gamma: float
    theta: float


FIRST = _Choice(math.inf, 0, 1.0, 0.3)


@torch.no_grad()
def _search(
    net: Unroll, problem: Problem, num_signals: int, weights: Sequence[Tensor], first: _Choice = FIRST
) -> list[float]:
    """Set layer after layer to the best step size and threshold, and weight where there are some to choose from."""
    check_untied(net)
    y, x = signals(net, problem, num_signals)
    state, best, reached = net[0].init(y), first, []
    for k, step in enumerate(net):
        layer = _view(step, state, y, k)
        candidates: Sequence[Any] = [Dense(weight) for weight in weights] or [cast(ALISTAStep, step).weight]
        best = layer.around(best._replace(error=math.inf), *COARSE, candidates, x)
        for other in (best.weight - 1, best.weight + 1, best.weight + 2):
            if 0 <= other < len(weights):
                best = layer.around(best._replace(weight=other), *MIDDLE, candidates, x, unless=best)
        best = layer.around(best, *FINE, candidates, x)
        _put(step, best, weights)
        state = step(state, y)
        reached.append(nmse_db(step.readout(state), x))
    return reached


class _Layer(NamedTuple):
    """A layer as a function of its numbers: x+ = SS(start + gamma W^T residual, theta scale)."""

    start: Tensor  # (count, *event)
    residual: Tensor
    scale: float | Tensor
    share: float  # of the entries, that support selection may let pass
    event_dim: int = 1

    def around(
        self,
        center: _Choice,
        gammas: Sequence[float],
        thetas: Sequence[float],
        weights: Sequence[Any],
        x: Tensor,
        *,
        unless: _Choice | None = None,
    ) -> _Choice:
        """The best of a grid of multiples of `center`, or `unless` (otherwise `center`) if that is better."""
        best = center if unless is None else unless
        direction = weights[center.weight].adjoint(self.residual)
        for gamma in (center.gamma * factor for factor in gammas):
            z = self.start + gamma * direction
            size = z.abs()
            trusted = self._trusted(size)
            for theta in (center.theta * factor for factor in thetas):
                shrunk = z * (1 - theta * self.scale / size).clamp(min=0)
                found = torch.where(trusted & (size >= theta * self.scale), z, shrunk)
                error = (found - x).abs().square().sum().item()
                if error < best.error:
                    best = _Choice(error, center.weight, gamma, theta)
        return best

    def _trusted(self, size: Tensor) -> Tensor:
        """The entries that support selection may let pass, found once for all thresholds."""
        flat = size.flatten(-self.event_dim)
        none = torch.zeros_like(flat, dtype=torch.bool)
        return none.scatter(-1, flat.topk(round(self.share * flat.shape[-1])).indices, True).view_as(size)


def _view(step: nn.Module, state: State, y: Tensor, k: int) -> _Layer:
    if isinstance(step, LAMPStep):
        v = step(state, y).v
        return _Layer(state.x, v, torch.linalg.vector_norm(v, dim=-1, keepdim=True) / v.shape[-1] ** 0.5, 0.0)
    assert isinstance(step, ALISTAStep)
    x = step.readout(state)
    selection = step.support_selection or SupportSelection(0.0, 0.0)
    share = min(selection.rate * (k + 1), selection.maximum) / 100
    return _Layer(x, y - step.dictionary(x), 1.0, share, step.event_dim)


def _put(step: nn.Module, choice: _Choice, weights: Sequence[Tensor]) -> None:
    if isinstance(step, LAMPStep):
        step.weight.copy_(choice.gamma * weights[choice.weight].mT)
        step.log_lambda.fill_(math.log(choice.theta))
        return
    assert isinstance(step, ALISTAStep)
    step.log_gamma.fill_(math.log(choice.gamma))
    step.log_theta.fill_(math.log(choice.theta))
    if weights:
        cast(Dense, step.weight).matrix.copy_(weights[choice.weight])


def _weights(dictionary: Tensor) -> list[Tensor]:
    """Analytic weights from none to full damping, where they are the atoms themselves."""
    mean = dictionary.square().sum().item() / len(dictionary)
    return [analytic_weight(dictionary, damping=share * mean) for share in DAMPINGS]


# ---- What is asked of network and problem ----------------------------------------------------------------------------


@torch.no_grad()
def signals(net: Unroll, problem: Problem, count: int) -> tuple[Tensor, Tensor]:
    """Training signals and codes, if these are what the network returns."""
    y, x = next(problem.batches(_check.integer("num_signals", count)))
    found = net(y[:1])
    if found.shape != x[:1].shape or found.dtype != x.dtype:
        raise ValueError(
            f"problem has codes {x.dtype} {tuple(x.shape[1:])}, the network returns {found.dtype} "
            f"{tuple(found.shape[1:])}. Build the network with problem.dictionary."
        )
    return y, x


def check_untied(net: Unroll) -> None:
    """Refuse networks whose layers share what is to be set for each."""
    if len(net) == 1:
        return
    free = ("dictionary", "weight") if isinstance(net, ALISTA | TiLISTA) else ("dictionary",)
    second = dict(net[1].named_parameters())
    shared = [name for name, p in net[0].named_parameters() if p is second[name] and not name.startswith(free)]
    if shared:
        raise ValueError(
            f"net has tied={net.tied}, but {', '.join(shared)} must be set for every layer. Build it with tied=False."
        )


def _matrix(operator: Any, net: Unroll) -> Tensor:
    if type(operator) is not Dense:
        raise TypeError(
            f"greedy needs a matrix as the dictionary and weight of a {type(net).__name__}, got a "
            f"{type(operator).__name__}. ALISTA with a weight takes any operator."
        )
    return operator.matrix


def names(dispatch: Any) -> str:
    return ", ".join(kind.__name__ for kind in dispatch.registry if kind is not object)
