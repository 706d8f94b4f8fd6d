"""Strategies that go back through iterations as they were: all of them, or the last few."""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass, field

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient.contraction import SLOW, Guard
from unrolled.gradient.protocol import Advance, check_differentiable, is_tied, refuse_transforms
from unrolled.gradient.recompute import recomputing


@dataclass(frozen=True)
class Backprop:
    """Exact gradients through every iteration: memory O(K), the default."""

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        return advance(state, 0, num_iters)


@dataclass(frozen=True)
class Checkpointed:
    r"""Exact gradients at memory $O(\sqrt K)$, for one more forward pass.

    Only the states between windows of iterations are kept; the backward pass runs window after window once more, from
    the last to the first, and lets go of the state before it. So the earlier the window, the longer it may be: without
    `every` the windows have 2, 2, 3, 3, 4, 4, ... iterations, counted from the end, and what is kept and what is run
    once more are together about as little as they can be. It does not run under the gradients of `torch.func`.

    Args:
        every: iterations of all windows, at least 1: memory O(K / every + every). Not given, windows become longer
            towards the start.

    Example:
        >>> Checkpointed(every=8)
        Checkpointed(every=8)
    """

    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None:
            _check.integer("every", self.every)

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        refuse_transforms(self, only_gradients=True)
        recomputed = recomputing(advance, state)
        for start, stop in itertools.pairwise([*self.starts(num_iters), num_iters]):
            if self.every is None and stop == num_iters:
                return advance(state, start, stop)  # short, and the first to go back through: not worth a second run
            state = recomputed(state, start, stop)
        return state

    def starts(self, num_iters: int) -> list[int]:
        """The first iterations of all windows, in order.

        Args:
            num_iters: K.
        """
        if self.every is not None:
            return list(range(0, num_iters, self.every))
        lengths = (2 + i // 2 for i in itertools.count())
        ends = itertools.takewhile(lambda end: end > 0, itertools.accumulate(lengths, operator.sub, initial=num_iters))
        return [0, *sorted(ends)[:-1]]


@dataclass(frozen=True)
class Truncated:
    r"""Gradients through the last `last` iterations only: memory O(last), biased.

    The earlier iterations run without a graph and count as a constant start. With `last >= num_iters` this is
    `Backprop`; `last=1` is known as one-step or Jacobian-free. Of the gradient, about the part $q^{\mathrm{last}}$ is
    missing where the iterations contract by $q$. Where that is slow, the rest can even point the wrong way. In tied
    networks it measures q, and warns once (`GradientWarning`) where $q > 0.98$ and more than half is missing. That it
    does not warn is no proof of the direction: compare a few steps with `Checkpointed`.

    Of an untied network, only the last layers' own parameters learn. With a stopping rule, a sample that stopped before
    the last iterations gets no gradient; take `Implicit` or `Phantom` there.

    Args:
        last: iterations that gradients flow through, at least 1.

    Example:
        >>> Truncated(last=8)
        Truncated(last=8)

    Reference:
        A. Shaban, C.-A. Cheng, N. Hatch and B. Boots, "Truncated Back-propagation for Bilevel Optimization", AISTATS
        2019; for `last=1`, S. W. Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", AAAI 2022.
    """

    last: int
    _guard: Guard = field(default_factory=Guard, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check.integer("last", self.last)

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        first = max(0, num_iters - self.last)
        if first > 0:
            check_differentiable(self, state)
            watched = is_tied(advance) and self._guard.due(state)
            state, meter = self._guard.run(advance, state, first, watched=watched)
            if meter is not None:
                self._judge(meter.slowest, num_iters)
        return advance(state, first, num_iters)

    def _judge(self, factor: float, num_iters: int) -> None:
        missing = factor**self.last
        if factor > SLOW and missing > 0.5:
            more = "" if factor >= 1 else f", or last={math.ceil(math.log(0.1) / math.log(factor))}"
            self._guard.warn(
                f"{self} of {num_iters} iterations that contract by {factor:.4f} only (the slowest sample): about "
                f"{min(missing, 1):.0%} of the gradient is left out, and from {SLOW} on the rest was seen to point the "
                f"wrong way. Take Checkpointed({round(math.sqrt(num_iters))}), which is exact{more}; Implicit, where "
                "the iterations converge; or make them contract faster."
            )
