"""What happens at a border: an estimate goes one way, what the synthesiser learns from goes the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unrolled.decoupled.synthesisers import Synthesiser

Gradients = Sequence[Tensor | None]


@torch.no_grad()
def estimate(synthesiser: Synthesiser, h: Tensor, condition: Tensor | None) -> Tensor:
    """The synthesiser's estimate at h, checked, of the dtype of h, without a graph."""
    return _checked(synthesiser, h, synthesiser(h.detach(), condition)).to(h.dtype)


def misfit(synthesiser: Synthesiser, h: Tensor, condition: Tensor | None, gradient: Tensor, samples: int) -> Tensor:
    """The squared error of the estimate: summed over features, its mean over the samples."""
    found = _checked(synthesiser, h, synthesiser(h.detach(), condition))
    return (found - gradient.detach().to(found.dtype)).square().sum() / samples


class Ledger:
    """Gradients of some tensors, summed up until they are handed over."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.sums: list[Tensor | None] = [None] * len(self.tensors)
        self._places = {id(tensor): i for i, tensor in enumerate(self.tensors)}

    def copy(self) -> Ledger:
        other = Ledger(self.tensors)
        other.sums = list(self.sums)
        return other

    def add(self, tensors: Sequence[Tensor], gradients: Gradients) -> None:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                i = self._places[id(tensor)]
                known = self.sums[i]
                self.sums[i] = gradient if known is None else known + gradient

    def add_lesson(
        self, synthesiser: Synthesiser, h: Tensor, condition: Tensor | None, gradient: Tensor, samples: int
    ) -> None:
        """What the synthesiser learns from the gradient of one sample's loss that arrived at h."""
        parameters = trainable(synthesiser)
        if parameters:
            with torch.enable_grad():
                loss = misfit(synthesiser, h, condition, gradient, samples)
            if loss.requires_grad:  # a synthesiser of somebody's own may leave its parameters out
                self.add(parameters, torch.autograd.grad(loss, parameters, allow_unused=True))


def trainable(*modules: nn.Module) -> list[Tensor]:
    """The parameters that learn, each once."""
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]


def one_each(synthesiser: Any, borders: int) -> list[Synthesiser]:
    """A copy for each border, or the given ones."""
    if isinstance(synthesiser, Synthesiser):
        return [copy.deepcopy(synthesiser) for _ in range(borders)]
    if not isinstance(synthesiser, Sequence) or not all(isinstance(one, Synthesiser) for one in synthesiser):
        raise TypeError(
            "synthesiser must be a Synthesiser such as LinearSynthesiser(100), or a sequence with one for each "
            f"border, got {synthesiser!r}."
        )
    if len(synthesiser) != borders:
        raise ValueError(
            f"there are {len(synthesiser)} synthesisers for {borders} borders. Give one for each, or one for all."
        )
    return list(synthesiser)


class Deliver(torch.autograd.Function):
    """The tensors of a border as they are; on the way back, gradients for `sources` that no graph leads to.

    `answer(gradients)` gets those that arrived at the border and returns one for each source. As the sources are inputs
    of this function, autograd adds what it returns to what they get from elsewhere, and `zero_grad` before the
    backward pass cannot erase it.
    """

    @staticmethod
    def forward(ctx: Any, answer: Callable[[Gradients], Gradients], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.answer, ctx.count = answer, count
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *(None for _ in range(ctx.count)), *ctx.answer(gradients))


class Send(torch.autograd.Function):
    """`output` as it is; on the way back, `gradients` for the states of a border, whatever arrives at the output."""

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, output: Tensor, *states: Tensor) -> Tensor:
        ctx.gradients = gradients
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, gradient, *ctx.gradients)


def _checked(synthesiser: Synthesiser, h: Tensor, found: Any) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != h.shape:
        came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{type(synthesiser).__name__} must return an estimate of the shape of the activation, {tuple(h.shape)}; "
            f"got {came}. Build it with as many features as the border has."
        )
    return found
