"""Strategies that go back through iterations as they were: all of them, or the last few."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch.utils.checkpoint import checkpoint

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient.contraction import SLOW, Guard
from unrolled.gradient.protocol import Advance, check_differentiable, is_tied, refuse_transforms


@dataclass(frozen=True)
class Backprop:
    """Exact gradients through every iteration: memory O(K), the default."""

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        return advance(state, 0, num_iters)


@dataclass(frozen=True)
class Checkpointed:
    """Exact gradients at memory O(K / every + every), for one more forward pass.

    Only the state at every `every`-th iteration is kept; the backward pass runs the iterations in between once more.
    `every` near the square root of K keeps least. It does not run under the gradients of `torch.func`.

    Args:
        every: iterations between two kept states, at least 1.

    Example:
        >>> Checkpointed(every=8)
        Checkpointed(every=8)
    """

    every: int

    def __post_init__(self) -> None:
        _check.integer("every", self.every)

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        refuse_transforms(self, only_gradients=True)
        for start in range(0, num_iters, self.every):
            stop = min(start + self.every, num_iters)
            # `advance` checks the shapes and dtypes of states; those of every saved tensor would cost 3 % of a step.
            state = checkpoint(advance, state, start, stop, use_reentrant=False, determinism_check="none")
        return state


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
