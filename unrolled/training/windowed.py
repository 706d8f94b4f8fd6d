"""`WindowedLoss`: an unrolled network trained in windows, each by a loss of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unrolled import _check
from unrolled._tree import State, detach
from unrolled.gradient import Advance, Backprop
from unrolled.training.run import Loss, Objective
from unrolled.unroll import Unroll


class WindowedLoss(nn.Module):
    r"""$\sum_w \ell\bigl(x_{b_w}\bigr)$ over windows of `every` iterations, with no gradient across their borders.

    Learned deep supervision: after each window the loss looks at the readout, and the gradient flows through that
    window alone, which starts from where the last one ended as from a constant. So memory is that of one window,
    however many there are, and no parameter is added. It asks every window to come as near to the target as it can,
    and serves where the iterates themselves can be compared with a target. Use it with `fit` like any other loss:
    `fit(net, batches, WindowedLoss(CodeError(), every=8), num_steps=1000)`.

    The gradients of a window are worked out while the loss is, so that its graph can go before the next one begins;
    `backward()` hands over their sum. Whatever called `zero_grad()` in between erases nothing.

    Args:
        loss: `loss(net, batch)`, a scalar Tensor, as for `fit`. It is called once for each window, with a stand-in for
            the network that it must call exactly once: calling it with the input returns the readout after the window.
            `net.parameters()` are those of the whole network.
        every: iterations in a window, at least 1 and at most those of the network. If it does not divide their number,
            the first window is shorter.

    Raises:
        TypeError: the network is no `Unroll`, or the loss no function or no scalar.
        ValueError: the window is longer than the network, the network has a stopping rule or another strategy than
            `Backprop`, a tensor of the batch requires a gradient (none would reach it), or the loss does not call the
            network exactly once.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(10, 20), dim=0)
        >>> net, y = LISTA(dictionary, num_iters=32, alpha=0.1), torch.randn(4, 10)
        >>> loss = WindowedLoss(Lasso(dictionary, alpha=0.1), every=8)
        >>> loss(net, y).backward()
        >>> all(p.grad is not None for p in net[31].parameters())
        True
    """

    def __init__(self, loss: Loss, every: int) -> None:
        super().__init__()
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(f"loss must be a function loss(net, batch) or an object called like one, got {loss!r}.")
        self.loss = loss
        self.every = _check.integer("every", every)

    def forward(self, net: nn.Module, batch: Any) -> Tensor:
        self._check(net, batch)
        assert isinstance(net, Unroll)
        windows = _Windows(net, self.every)
        objective = Objective(windows, self.loss)
        if not torch.is_grad_enabled():
            values = [self.loss(windows, batch) for _ in windows]
            return torch.stack(values).sum()
        parameters = [p for p in objective.parameters() if p.requires_grad]
        total: Tensor | None = None
        gradients: list[Tensor | None] = [None for _ in parameters]
        for _ in windows:
            value = objective(batch)
            # What `prepare` computed is shared by the windows of a tied network, and so is its graph.
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            for i, gradient in enumerate(found):
                if gradient is not None:
                    known = gradients[i]
                    gradients[i] = gradient if known is None else known + gradient
            total = value.detach() if total is None else total + value.detach()
            del value, found
        assert total is not None
        return _HandOver.apply(total, gradients, *parameters)

    def _check(self, net: Any, batch: Any) -> None:
        if not isinstance(net, Unroll):
            raise TypeError(
                f"net must be an Unroll, got {type(net).__name__}. Of a larger model or a compiled or distributed one, "
                "windows are not known; pass the Unroll itself."
            )
        if self.every > len(net):
            raise ValueError(f"every is {self.every}, the network has {len(net)} iterations. Take at most {len(net)}.")
        if not isinstance(net.gradient, Backprop):
            raise ValueError(
                f"net has gradient={net.gradient!r}, but here windows decide how gradients flow. Set "
                "net.gradient = Backprop()."
            )
        if net.stop is not None:
            raise ValueError(
                f"net has stop={net.stop!r}: samples that have stopped would learn nothing in later windows. Train "
                "with net.stop = None and set it afterwards."
            )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(batch)):
            raise ValueError(
                "a tensor of the batch requires a gradient, which would not reach it: windows hand over gradients of "
                "the network's and the loss's parameters only. Detach it, or train what computes it by fit with "
                "Checkpointed."
            )

    def extra_repr(self) -> str:
        own = "" if isinstance(self.loss, nn.Module) else f"{getattr(self.loss, '__name__', self.loss)!s}, "
        return f"{own}every={self.every}"


class _Windows(nn.Module):
    """Stands in for the network: each call runs the next window and returns its readout. Iterate, and call inside."""

    def __init__(self, net: Unroll, every: int) -> None:
        super().__init__()
        self.net = net
        first = len(net) % every or every
        self._borders = [0, *range(first, len(net) + 1, every)]
        self._advance: Advance | None = None
        self._state: State = None
        self._span = (0, 0)
        self._called = False

    def __iter__(self) -> Iterator[None]:
        for span in itertools.pairwise(self._borders):
            self._span, self._called = span, False
            yield
            if not self._called:
                raise ValueError("loss did not call the network, so that no window ran. It must call net(input) once.")
            self._state = detach(self._state)

    def forward(self, *inputs: Any) -> Any:
        if self._called:
            raise ValueError(
                "loss called the network twice for one window. Windows go on from the state of the last call: call it "
                "once, on all inputs together."
            )
        self._called = True
        if self._advance is None:
            self._advance, self._state, _ = self.net.start(*inputs)
        self._state = self._advance(self._state, *self._span)
        return self.net[0].readout(self._state)


class _HandOver(torch.autograd.Function):
    """A value, with gradients for the parameters that are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(None if g is None else weight.to(g.device, g.dtype) * g for g in ctx.gradients))


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, however nested."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, tuple | list):
        for part in batch:
            yield from _tensors(part)
