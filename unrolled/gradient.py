"""How gradients flow through an unrolled loop.

A strategy is an object over one function: `gradient(advance, state, num_iters) -> state`, where
`advance(state, start, stop)` runs the iterations `start .. stop - 1`. Anything callable like that can be passed to
`Unroll(gradient=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint

from unrolled import _check
from unrolled._tree import State, detach

Advance = Callable[[State, int, int], State]


class Gradient(Protocol):
    """Runs `num_iters` iterations by calls of `advance(state, start, stop)` and decides what autograd sees of them."""

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State: ...


@dataclass(frozen=True)
class Backprop:
    """Exact gradients through every iteration: memory O(K), the default."""

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        return advance(state, 0, num_iters)


@dataclass(frozen=True)
class Checkpointed:
    """Exact gradients at memory O(K / every + every), for one more forward pass.

    Only the state at every `every`-th iteration is kept; the backward pass runs the iterations in between once more.
    `every` near the square root of K keeps least. It does not run under `torch.func` transforms.

    Args:
        every: iterations between two kept states, at least 1.
    """

    every: int

    def __post_init__(self) -> None:
        _check.integer("every", self.every)

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        for start in range(0, num_iters, self.every):
            stop = min(start + self.every, num_iters)
            state = checkpoint(advance, state, start, stop, use_reentrant=False)
        return state


@dataclass(frozen=True)
class Truncated:
    """Gradients through the last `last` iterations only: memory O(last), biased.

    The earlier iterations run without a graph and count as a constant start. With `last >= num_iters` this is
    `Backprop`. The bias decays with the contraction of the iteration; where that is slow, the gradient of a few last
    iterations can even point the wrong way. Of an untied network, only the last layers' own parameters learn.

    Args:
        last: iterations that gradients flow through, at least 1.
    """

    last: int

    def __post_init__(self) -> None:
        _check.integer("last", self.last)

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        first = max(0, num_iters - self.last)
        if first > 0:
            with torch.no_grad():
                state = advance(state, 0, first)
            state = detach(state)
        return advance(state, first, num_iters)
