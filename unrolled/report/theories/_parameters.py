"""Where the sparse coding layers of this library keep their step size and threshold, to be set by theory."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from unrolled.momentum import Momentum
from unrolled.operators import Dense, LinearOperator
from unrolled.sparse._steps import ResidualStep
from unrolled.sparse.alista import ALISTAStep
from unrolled.sparse.coupled import LISTACPStep
from unrolled.sparse.ista import FactoredLISTAStep, LISTAStep
from unrolled.sparse.lfista import LFISTAStep
from unrolled.sparse.steplista import StepLISTAStep
from unrolled.step import Step


@torch.no_grad()
def untrained(step: Step, dictionary: LinearOperator, alpha: float, L: Tensor) -> Step | None:
    """A copy of a layer that is ISTA again, or None for layers that are not known."""
    twin = copy.deepcopy(step)
    if isinstance(twin, Momentum):
        inner = untrained(twin.step, dictionary, alpha, L)
        if inner is None:
            return None
        twin.step = inner
        twin.reset_parameters()
    elif isinstance(twin, LISTAStep | FactoredLISTAStep | LFISTAStep) and isinstance(dictionary, Dense):
        twin.alpha = alpha
        twin.reset_parameters(dictionary.matrix)
    elif isinstance(twin, LISTACPStep) and isinstance(dictionary, Dense) and isinstance(twin.weight, Dense):
        twin.weight.matrix.copy_(dictionary.matrix / L)
        twin.log_theta.fill_(alpha).div_(L).log_()
    elif isinstance(twin, StepLISTAStep):
        twin.log_gamma.copy_(-L.log())
    else:
        return None
    return twin


@torch.no_grad()
def scaled(step: Step, step_size: float, threshold: float) -> Step | None:
    """A copy of a layer with step size and threshold multiplied, or None for layers that are not known."""
    twin = copy.deepcopy(step)
    inner = twin.step if isinstance(twin, Momentum) else twin
    if isinstance(inner, StepLISTAStep):
        if step_size != threshold:
            return None  # one number is both
        inner.log_gamma.add_(math.log(step_size))
        return twin
    if isinstance(inner, ALISTAStep):
        inner.log_gamma.add_(math.log(step_size))
    elif isinstance(inner, LISTACPStep) and all(isinstance(p, nn.Parameter) for p in _numbers(inner)):
        for weight in _numbers(inner):
            weight.mul_(step_size)
    elif isinstance(inner, FactoredLISTAStep):
        inner.weight.mul_(step_size)
    elif isinstance(inner, LISTAStep | LFISTAStep):
        inner.weight.mul_(step_size)
        eye = torch.eye(len(inner.inhibition)).to(inner.inhibition)
        for matrix in (inner.inhibition, *([inner.inertia] if isinstance(inner, LFISTAStep) else [])):
            matrix.copy_(eye - step_size * (eye - matrix))
    else:
        return None
    inner.log_theta.add_(math.log(threshold))
    return twin


def _numbers(step: ResidualStep) -> list[Tensor]:
    return [*step.weight.parameters(), *step.weight.buffers()]
