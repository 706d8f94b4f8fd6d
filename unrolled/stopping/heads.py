"""What halting is decided on: modules called as `head(step, before, after)` that return one logit a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.step import Step
from unrolled.stopping.rule import change_and_size


class Settling(nn.Module):
    r"""$s\,(\log\|x_{k+1} - x_k\| - a \log\|x_{k+1}\| - \log \tau)$: a tolerance with three numbers that learn.

    $x$ is the readout. With $a = 1$, where it starts, $\tau$ is a relative tolerance, and a sample stops where
    `Tolerance(rtol)` would stop it; with $a = 0$ an absolute one. $s > 0$ is how sharp the border is. The head watches
    the iterates and no gradient flows through it to them. Its units are those of the readout, so that it fits any
    system.

    Args:
        rtol: $\tau$ to start with, positive.
        sharpness: $s$ to start with, positive.
        device, dtype: of the three numbers; PyTorch's defaults where not given.

    Raises:
        TypeError, ValueError: a number that is none, or is not positive.

    Example:
        >>> from unrolled.stopping import Halting
        >>> net = LISTA(torch.eye(3), 16, alpha=0.1, stop=Halting(Settling(rtol=1e-2)))
        >>> net(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        rtol: float = 1e-2,
        *,
        sharpness: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rtol = _check.real("rtol", rtol, above=0.0)
        self.sharpness = _check.real("sharpness", sharpness, above=0.0)
        self.log_rtol = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.log_sharpness = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.relative = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the tolerance that was given first."""
        self.log_rtol.fill_(math.log(self.rtol))
        self.log_sharpness.fill_(math.log(self.sharpness))
        self.relative.fill_(1.0)

    def forward(self, step: Step, before: State, after: State) -> Tensor:
        change, size = change_and_size(step, before, after)
        # Zero may come: no change is far below any tolerance, also where the size is zero too.
        tiny = torch.finfo(change.dtype).tiny
        excess = change.clamp_min(tiny).log() - self.relative * size.clamp_min(tiny**0.5).log() - self.log_rtol
        return self.log_sharpness.exp() * excess

    def extra_repr(self) -> str:
        return f"rtol={self.rtol:g}, sharpness={self.sharpness:g} to start with"


class Reading(nn.Module):
    """`module(readout)`: the logit is what a network of your own makes of the readout after the iteration.

    Gradients flow through it to the iterates, unlike in `Settling`.

    Args:
        module: takes the readout, returns one logit a sample, (batch,) or (batch, 1).

    Raises:
        TypeError: `module` is no `torch.nn.Module`.

    Example:
        >>> from unrolled.stopping import Halting
        >>> head = Reading(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)))
        >>> net = LISTA(torch.eye(3), 16, alpha=0.1, stop=Halting(head))
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module object, got {module!r}.")
        self.module = module

    def forward(self, step: Step, before: State, after: State) -> Tensor:
        return self.module(step.readout(after))
