"""What a stopping rule is: it freezes samples one by one, whatever their batch mates do."""

from __future__ import annotations

import abc
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


class Stopping(nn.Module, abc.ABC):
    """A rule for `Unroll(stop=...)`: `settled` says which samples have iterated enough, and those are frozen.

    From then on a sample keeps its state, whatever its batch mates do, so an answer never depends on the batch that it
    came in. Once all samples have stopped, eager mode on the CPU leaves the loop; compiled, exported and vmapped forms
    and accelerators run on with frozen samples, to the same answer. `unrolled.Trace` tells how many iterations each
    sample used.
    """

    @abc.abstractmethod
    def settled(self, step: Step, before: State, after: State) -> Tensor:
        """Which samples stop with the state `after` this iteration, (batch,) bool; `step.readout` reads a state."""

    def begin(self, step: Step, state: State) -> Running:
        """All samples active."""
        batch, device = batch_of(step, state)
        for leaf in leaves(state):
            if leaf.dim() > 0 and leaf.shape[: len(batch)] != batch:
                raise ValueError(
                    f"{type(step).__name__} cannot stop sample by sample: its readout has the batch dimensions "
                    f"{tuple(batch)} (event_dim={step.event_dim}), its state is {describe(state)}. Every tensor of the "
                    "state must begin with them or have no dimensions at all; check event_dim."
                )
        return Running(state, torch.ones(batch, dtype=torch.bool, device=device))

    def forward(self, step: Step, running: Running, proposal: State) -> Running:
        """Take the proposed state for the active samples; deactivate those that have settled."""
        settled = self.settled(step, running.state, proposal)

        def take(new: Tensor, old: Tensor) -> Tensor:
            if new.dim() == 0 and running.active.dim() > 0:
                return new  # shared by the batch: frozen samples do not use it any more
            mask = running.active.reshape(running.active.shape + (1,) * (new.dim() - running.active.dim()))
            return torch.where(mask, new, old)

        return Running(map_state(take, proposal, running.state), running.active & ~settled)


def batch_of(step: Step, state: State) -> tuple[torch.Size, torch.device]:
    """The batch dimensions of a state, by the step's `event_dim`, and where it is."""
    readout = next(leaves(step.readout(state)))
    if _check.integer("event_dim", step.event_dim, minimum=0) > readout.dim():
        raise ValueError(
            f"event_dim of {type(step).__name__} is {step.event_dim}, its readout {describe(readout)} has fewer "
            "dimensions. It is how many trailing dimensions make up one sample."
        )
    return readout.shape[: readout.dim() - step.event_dim], readout.device


def all_settled(running: Running) -> bool:
    """Whether the loop of this `running` state may be left early: only where looking at the mask costs nothing."""
    return _check.can_look_at(running.active) and not bool(running.active.any())


def change_and_size(step: Step, before: State, after: State) -> tuple[Tensor, Tensor]:
    r"""$\|x_{k+1} - x_k\|$ and $\|x_{k+1}\|$ of the readouts, (batch,) each and without their past."""
    old, new = step.readout(before), step.readout(after)
    return _norm(map_state(torch.sub, new, old), step.event_dim), _norm(new, step.event_dim)


def _norm(state: State, event_dim: int) -> Tensor:
    """The l2 norm over the last `event_dim` dimensions of all tensors together."""
    squares = [leaf.detach().abs().square() for leaf in leaves(state)]
    dims = tuple(range(-event_dim, 0))
    return torch.stack([square.sum(dims) if dims else square for square in squares]).sum(0).sqrt()
