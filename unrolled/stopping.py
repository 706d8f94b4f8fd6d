"""When a sample has iterated enough: decided for each sample by itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State, describe, leaves, map_state
from unrolled.step import Step


class Running(NamedTuple):
    """The state of a loop that may stop: a frozen sample keeps its state while its batch mates go on."""

    state: State
    active: Tensor  # (batch,) bool: which samples still iterate


class Tolerance(nn.Module):
    r"""Stop a sample once $\|x_{k+1} - x_k\| \le \mathrm{atol} + \mathrm{rtol}\,\|x_{k+1}\|$.

    $x$ is the readout and the norm is taken over one sample. From then on the sample keeps its state, whatever its
    batch mates do, so an answer never depends on the batch that it came in. Once all samples have stopped, eager mode
    on the CPU leaves the loop; compiled, exported and vmapped forms and accelerators run on with frozen samples, to the
    same answer. `unrolled.Trace` tells how many iterations each sample used.

    Args:
        rtol: relative tolerance, at least 0.
        atol: absolute tolerance in the units of the readout, at least 0. One of the two must be positive.

    Raises:
        ValueError: where both tolerances are 0 or one is negative.
    """

    def __init__(self, rtol: float = 1e-3, atol: float = 0.0) -> None:
        super().__init__()
        self.rtol = _check.real("rtol", rtol, minimum=0.0)
        self.atol = _check.real("atol", atol, minimum=0.0)
        if self.rtol == self.atol == 0:
            raise ValueError("rtol and atol are both 0, so that nothing would ever stop. Make one of them positive.")

    def begin(self, step: Step, state: State) -> Running:
        """All samples active."""
        readout = next(leaves(step.readout(state)))
        if _check.integer("event_dim", step.event_dim, minimum=0) > readout.dim():
            raise ValueError(
                f"event_dim of {type(step).__name__} is {step.event_dim}, its readout {describe(readout)} has fewer "
                "dimensions. It is how many trailing dimensions make up one sample."
            )
        batch = readout.shape[: readout.dim() - step.event_dim]
        for leaf in leaves(state):
            if leaf.dim() > 0 and leaf.shape[: len(batch)] != batch:
                raise ValueError(
                    f"{type(step).__name__} cannot stop sample by sample: its readout has the batch dimensions "
                    f"{tuple(batch)} (event_dim={step.event_dim}), its state is {describe(state)}. Every tensor of the "
                    "state must begin with them or have no dimensions at all; check event_dim."
                )
        return Running(state, torch.ones(batch, dtype=torch.bool, device=readout.device))

    def forward(self, step: Step, running: Running, proposal: State) -> Running:
        """Take the proposed state for the active samples; deactivate those that have settled."""
        before, after = step.readout(running.state), step.readout(proposal)
        change = _norm(map_state(torch.sub, after, before), step.event_dim)
        size = _norm(after, step.event_dim)
        # What has diverged has not settled: NaN compares as False, infinity needs the second condition.
        settled = (change <= self.atol + self.rtol * size) & size.isfinite()

        def take(new: Tensor, old: Tensor) -> Tensor:
            if new.dim() == 0 and running.active.dim() > 0:
                return new  # shared by the batch: frozen samples do not use it any more
            mask = running.active.reshape(running.active.shape + (1,) * (new.dim() - running.active.dim()))
            return torch.where(mask, new, old)

        return Running(map_state(take, proposal, running.state), running.active & ~settled)

    def extra_repr(self) -> str:
        return f"rtol={self.rtol:g}, atol={self.atol:g}"


def all_settled(running: Running) -> bool:
    """Whether the loop may be left early: only where looking at the mask costs nothing."""
    return _check.can_look_at(running.active) and not bool(running.active.any())


def _norm(state: State, event_dim: int) -> Tensor:
    """The l2 norm over the last `event_dim` dimensions of all tensors together."""
    squares = [leaf.detach().abs().square() for leaf in leaves(state)]
    dims = tuple(range(-event_dim, 0))
    return torch.stack([square.sum(dims) if dims else square for square in squares]).sum(0).sqrt()
