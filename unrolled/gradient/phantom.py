"""`Phantom`: a few damped iterations at the last state carry the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient.contraction import SLOW, Guard
from unrolled.gradient.protocol import Advance, bare, check_differentiable, moving, one_map, put
from unrolled.stopping import Running


@dataclass(frozen=True)
class Phantom:
    r"""Gradients through `steps` damped iterations $z \leftarrow \tau f(z) + (1 - \tau) z$ from the last state: memory
    O(steps), biased.

    All K iterations run without a graph. The damped ones after them only carry the gradient: the value that the network
    returns is that of iteration K. $\tau$ = `damping`; at 1 the gradient is that of `Truncated(steps)` at the fixed
    point. Damping makes wild iterations tamer and slow ones slower: the part
    $(1 - \tau + \tau q)^{\mathrm{steps}}$ of the gradient is missing where they contract by $q$. It measures q, and
    warns once (`GradientWarning`) where $q > 0.98$ and more than half is missing.

    Needs a tied network. With a stopping rule, every sample has its gradient at the state where it stopped. Tensors
    of the state that are integer, boolean or shared by the batch count as constants.

    Args:
        steps: damped iterations, at least 1.
        damping: $\tau$, above 0 and at most 1.

    Example:
        >>> Phantom(steps=5, damping=0.5)
        Phantom(steps=5, damping=0.5)

    Reference:
        Z. Geng, X.-Y. Zhang, S. Bai, Y. Wang and Z. Lin, "On Training Implicit Models", NeurIPS 2021.
    """

    steps: int = 5
    damping: float = 0.5
    needs_tied: ClassVar[bool] = True
    _guard: Guard = field(default_factory=Guard, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check.integer("steps", self.steps)
        if _check.real("damping", self.damping, above=0.0) > 1:
            raise ValueError(f"damping must be at most 1, got {self.damping}. At 1 the iterations are not damped.")

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        once = one_map(advance, self)
        check_differentiable(self, state)
        state, meter = self._guard.run(advance, state, num_iters, watched=self._guard.due(state))
        if meter is not None:
            self._judge(meter.slowest, num_iters)
        if not torch.is_grad_enabled():
            return state
        tau, z = self.damping, bare(state)
        for _ in range(self.steps):
            pairs = zip(moving(once(z)), moving(z), strict=True)
            z = put(z, [tau * new.to(old.dtype) + (1 - tau) * old for new, old in pairs])
        # What is added is zero: the value of the last state, with the gradient of the damped one.
        carried = zip(moving(bare(state)), moving(z), strict=True)
        out = put(bare(state), [value + (carrier - carrier.detach()) for value, carrier in carried])
        return Running(out, state.active) if isinstance(state, Running) else out

    def _judge(self, factor: float, num_iters: int) -> None:
        damped = 1 - self.damping + self.damping * factor
        missing = damped**self.steps
        if factor > SLOW and missing > 0.5:
            more = "" if factor >= 1 else f", or steps={math.ceil(math.log(0.1) / math.log(damped))}"
            self._guard.warn(
                f"{self} after {num_iters} iterations that contract by {factor:.4f} only (the slowest sample): about "
                f"{min(missing, 1):.0%} of the gradient is left out, and from {SLOW} on the rest was seen to point the "
                f"wrong way. Take Implicit, where the iterations converge{more}; "
                f"Checkpointed({round(math.sqrt(num_iters))}), which is exact; or make them contract faster."
            )
