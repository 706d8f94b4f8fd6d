r"""How fast iterations contract, measured while they run, and the guard of strategies that need them to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from unrolled import _check
from unrolled._tree import State, detach
from unrolled.gradient.protocol import Advance, bare, batch_dims, can_look, moving

SLOW = 0.98  # measured (docs/gradients.md): one-step gradients kept their direction at 0.95 to 0.97, not from 0.982 on
WINDOW = 5


class GradientWarning(UserWarning):
    """A gradient that theory does not support here, with the number that says so and what to do.

    Each strategy object warns once. `warnings.filterwarnings("ignore", category=GradientWarning)` silences all of them.
    """


class ContractionMeter:
    r"""$r_k = \|x_{k+1} - x_k\| / \|x_k - x_{k-1}\|$ of every sample, the largest of the last few: fed state by state.

    It keeps two states and a few numbers for each sample. Differences that are mere rounding (below 300 units in the
    last place of x) do not count, so that the ratios of a run that has converged are those before it came to rest.

    Args:
        batch_dims: how many leading dimensions of the states count samples.
        window: how many ratios to take the largest of, at least 1.

    Attributes:
        factor: (batch), the contraction factor of each sample; NaN where it did not move often enough to tell.
        distance: (batch), how far from its fixed point the last state is, relative to its norm: the way that is left at
            this factor, $\|x_{k+1} - x_k\|\, r / (1 - r)$. Infinite where it does not contract; the last difference
            itself where that is mere rounding.

    Example:
        >>> meter = ContractionMeter(batch_dims=0)
        >>> for k in range(6):
        ...     meter.update(torch.tensor([1.0, 2.0]) + 0.5**k)
        >>> meter.factor
        tensor(0.5000)
    """

    def __init__(self, batch_dims: int, window: int = WINDOW) -> None:
        self.batch_dims = _check.integer("batch_dims", batch_dims, minimum=0)
        self.window = _check.integer("window", window)
        self._before: list[Tensor] | None = None
        self._change: Tensor | None = None
        self._ratios: Tensor | None = None

    @torch.no_grad()
    def update(self, state: State) -> None:
        """The next state of the iteration."""
        tensors = [leaf.detach() for leaf in moving(bare(state))]
        before, self._before = self._before, tensors
        if before is None:
            return
        change = self._norm([new - old for new, old in zip(tensors, before, strict=True)])
        self._size = self._norm(tensors)
        self._rounding = 300 * max(torch.finfo(tensor.dtype).eps for tensor in tensors) * self._size
        last, self._change = self._change, change
        if last is None:
            return
        if self._ratios is None:
            self._ratios = change.new_full((*change.shape, self.window), -math.inf)
        tells = ~(last <= self._rounding)  # NaN tells, too
        ratio = torch.where(change.isfinite(), change / last, math.inf)
        self._ratios = torch.where(
            tells.unsqueeze(-1), torch.cat([self._ratios[..., 1:], ratio.unsqueeze(-1)], -1), self._ratios
        )

    @property
    def factor(self) -> Tensor:
        if self._ratios is None:
            raise RuntimeError("a contraction factor needs at least three states: there are two differences in them.")
        largest = self._ratios.amax(-1)
        return torch.where(largest == -math.inf, math.nan, largest)

    @property
    def distance(self) -> Tensor:
        if self._change is None:
            raise RuntimeError("a distance needs at least two states.")
        nothing = torch.zeros_like(self._change)
        factor = nothing if self._ratios is None else self.factor.nan_to_num(0.0, posinf=math.inf)
        left = torch.where(factor < 1, self._change * factor / (1 - factor), math.inf)
        # What rests up to rounding is there, whatever its last ratios were.
        left = torch.where(self._change <= self._rounding, self._change, left)
        return torch.where(self._change == 0, nothing, left / self._size)

    @property
    def slowest(self) -> float:
        """The largest factor of all samples, 0 where none can be told."""
        return 0.0 if self._ratios is None else float(self.factor.nan_to_num(0.0, posinf=math.inf).max())

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        """Over all tensors of a sample together."""
        dims = self.batch_dims
        # Tensors that do not begin with the batch, against the rule, are taken for one sample.
        if len({tensor.shape[:dims] for tensor in tensors}) > 1:
            dims = 0
        parts = [tensor.abs().reshape(*tensor.shape[:dims], -1) for tensor in tensors]
        parts = [part.float() if part.itemsize < 4 else part for part in parts]
        return torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in parts]).square().sum(0).sqrt()


def contraction_factor(iterates: Iterable[State], *, event_dim: int = 1, window: int = WINDOW) -> Tensor:
    r"""$\max_k \|x_{k+1} - x_k\| / \|x_k - x_{k-1}\|$ over the last iterations, for every sample.

    Below 1 the iteration contracts; the nearer to 1, the longer the memory of early iterations, and the further off a
    gradient through the last few. Strategies that need contraction warn from 0.98 on.

    Args:
        iterates: at least three states or readouts, in order, such as `net.iterates(y)` or the states of a `Trace`.
        event_dim: how many trailing dimensions make up one sample, as in `Step`.
        window: how many of the last ratios to take the largest of, at least 1.

    Returns:
        The factors, of the shape of the batch; NaN for a sample that did not move often enough to tell.

    Raises:
        ValueError: fewer than three iterates.
        TypeError: they hold no floating point tensors.

    Example:
        >>> x = torch.randn(3, 4)
        >>> contraction_factor([x, 0.9 * x, 0.81 * x])
        tensor([0.9000, 0.9000, 0.9000])
    """
    _check.integer("event_dim", event_dim, minimum=0)
    states = list(iterates)
    if len(states) < 3:
        raise ValueError(f"iterates must hold at least 3 states, got {len(states)}: a ratio needs two differences.")
    tensors = moving(bare(states[0]))
    if not tensors:
        raise TypeError(
            "iterates must hold floating point tensors: integers and booleans have no distance to contract."
        )
    meter = ContractionMeter(max(0, tensors[0].dim() - event_dim), window)
    for state in states:
        meter.update(state)
    return meter.factor


class Guard:
    """Watches some of the calls of a strategy, and warns once.

    Watching takes a norm for every iteration. So it is done in the calls 1, 2, 4, 8 and so on, in which gradients are
    wanted, until there was something to warn of: next to nothing in a training, and a network that learns to contract
    slowly is still found out.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.warned = False

    def due(self, state: State) -> bool:
        """Whether to watch this call."""
        if not torch.is_grad_enabled() or not can_look(state):
            return False
        self.calls += 1
        return not self.warned and self.calls & (self.calls - 1) == 0

    @torch.no_grad()
    def run(
        self, advance: Advance, state: State, num_iters: int, *, watched: bool
    ) -> tuple[State, ContractionMeter | None]:
        """The first iterations without a graph; `watched`, one by one, and how they contract."""
        if not watched:
            return detach(advance(state, 0, num_iters)), None
        meter = ContractionMeter(batch_dims(advance, state))
        meter.update(state)
        for k in range(num_iters):
            state = advance(state, k, k + 1)
            meter.update(state)
        return detach(state), meter

    def warn(self, message: str) -> None:
        self.warned = True
        warnings.warn(message, GradientWarning, stacklevel=2)
