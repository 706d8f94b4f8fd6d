"""`Momentum`: Nesterov's extrapolation around any step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled._tree import State
from unrolled.step import Step


class MomentumState(NamedTuple):
    """The iterate, the one before it, and Nesterov's counter."""

    x: Tensor  # (*batch, *event)
    previous: Tensor  # (*batch, *event)
    t: Tensor  # ()


class Momentum(Step):
    r"""$z = x_k + (\tfrac{t_k - 1}{t_{k+1}} + \beta_k)(x_k - x_{k-1}),\quad x_{k+1} = T(z),\quad
    t_{k+1} = \tfrac12\bigl(1 + \sqrt{1 + 4 t_k^2}\bigr)$.

    Turns ISTA into FISTA, and so any proximal gradient step into its accelerated form. $\beta$ (`offset`) is learned
    and starts at 0, where this is Nesterov's schedule exactly. The very first iteration has nothing to extrapolate, so
    the offset of an untied first layer never receives a gradient.

    Args:
        step: a step whose state is one Tensor.

    Reference:
        A. Beck and M. Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems",
        SIAM J. Imaging Sciences 2(1), 2009, equations (4.1) to (4.3).
    """

    offset: nn.Parameter

    def __init__(self, step: Step) -> None:
        super().__init__()
        if not isinstance(step, Step):
            raise TypeError(f"step must be an unrolled.Step instance, got {step!r}.")
        self.step = step
        self.event_dim = step.event_dim
        like = next(step.parameters(), torch.empty(0))
        self.offset = nn.Parameter(torch.empty((), dtype=like.dtype.to_real(), device=like.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The schedule as published: offset 0."""
        nn.init.zeros_(self.offset)

    def check(self, input: Any, *context: Any) -> None:
        self.step.check(input, *context)

    def prepare(self, input: Any, *context: Any) -> Any:
        return self.step.prepare(input, *context)

    def init(self, context: Any) -> MomentumState:
        x = self.step.init(context)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Momentum needs a step whose state is one Tensor, {type(self.step).__name__} has {type(x).__name__}."
            )
        # t = 0 becomes 1 in the first iteration, whose extrapolation is void: x and previous are the same.
        return MomentumState(x, x, torch.zeros((), dtype=self.offset.dtype, device=x.device))

    def forward(self, state: MomentumState, context: Any) -> MomentumState:
        t = (1 + (1 + 4 * state.t.square()).sqrt()) / 2
        z = state.x + ((state.t - 1) / t + self.offset) * (state.x - state.previous)
        return MomentumState(self.step(z, context), state.x, t)

    def readout(self, state: State) -> Any:
        return self.step.readout(state.x)
