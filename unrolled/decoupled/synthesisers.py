r"""Synthesisers: small models $\hat\delta = M(h, c)$ of the gradient that a loss will send to an activation h.

Each begins with an estimate of zero: before it has learned, what it stands for is truncated backpropagation.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from unrolled import _check


class Synthesiser(nn.Module, abc.ABC):
    r"""$\hat\delta = M(h)$ or $M(h, c)$: from an activation, and where conditioned a target, the gradient to come.

    A subclass writes `forward(h, condition)`, which returns an estimate of the shape of h, and sets `condition`. It
    must start at an estimate of zero (by a last layer of zeros) if training is to start as with truncated gradients.

    What it estimates is the gradient of *one sample's* loss: where the loss is a mean over the batch, its gradient
    times the batch size. So its targets do not shrink as the batch grows.

    Attributes:
        condition: how many numbers the condition of a sample has (or, for integer labels, how many classes there are);
            0 for a synthesiser that looks at h alone.

    Example:
        >>> class OwnScale(Synthesiser):     # a factor for each feature
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.factor = torch.nn.Parameter(torch.zeros(features))
        ...     def forward(self, h, condition=None):
        ...         return self.factor * h
        >>> OwnScale(3)(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    condition: int = 0

    @abc.abstractmethod
    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        """The estimate of the gradient at `h`, of its shape; `condition` is given where the class asks for one."""


class ZeroSynthesiser(Synthesiser):
    r"""$\hat\delta = 0$: nothing to learn. With it, gradients end at the border, as in truncated backpropagation.

    Example:
        >>> ZeroSynthesiser()(torch.ones(2, 3))
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.zeros_like(h)


class _FeatureSynthesiser(Synthesiser):
    """What the learned synthesisers share: their input, made of h and the condition, and a last layer of zeros."""

    axis: int = -1  # where the features of h are
    body: nn.Sequential  # hidden layers
    last: nn.Linear | nn.Conv2d

    def __init__(self, features: int, condition: int, difference: bool) -> None:
        super().__init__()
        self.features = _check.integer("features", features)
        self.condition = _check.integer("condition", condition, minimum=0)
        if not isinstance(difference, bool):
            raise TypeError(f"difference must be True or False, got {difference!r}.")
        if difference and self.condition != self.features:
            raise ValueError(
                f"difference=True subtracts the condition from h, so both need {self.features} features; condition is "
                f"{self.condition}. Set condition={self.features}, or leave difference out."
            )
        self.difference = difference

    def _build(self, hidden: Sequence[int], layer: Callable[[int, int], nn.Linear | nn.Conv2d]) -> None:
        """Layers of these widths, from the joined input to an estimate, with ReLU between them."""
        self.hidden = tuple(hidden)
        widths = [self.features if self.difference else self.features + self.condition, *hidden]
        pairs = itertools.pairwise(widths)
        self.body = nn.Sequential(*(part for pair in pairs for part in (layer(*pair), nn.ReLU())))
        self.last = layer(widths[-1], self.features)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to an estimate of zero, the hidden layers drawn anew."""
        for layer in self.body:
            if not isinstance(layer, nn.ReLU):
                cast(nn.Linear, layer).reset_parameters()
        for parameter in self.last.parameters():
            parameter.zero_()

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.last(self.body(self._joined(h, condition)))

    def _joined(self, h: Tensor, condition: Tensor | None) -> Tensor:
        """[h, c], or h - c, along the features."""
        weight = self.last.weight
        if h.dim() < -self.axis or h.shape[self.axis] != self.features:
            raise ValueError(
                f"{type(self).__name__} was made for {self.features} features (dimension {self.axis}), got an "
                f"activation of shape {tuple(h.shape)}. Build it with the features that the border has."
            )
        if h.dtype != weight.dtype and not _check.autocast(h.device):
            raise TypeError(
                f"the activation is {h.dtype} but {type(self).__name__} is {weight.dtype}. Convert the synthesiser, "
                f"e.g. synthesiser.to({h.dtype})."
            )
        if self.condition == 0:
            return h
        if condition is None:
            raise ValueError(
                f"{type(self).__name__} is conditioned on {self.condition} numbers but no target came. Pass the target "
                "of the batch, or build the synthesiser with condition=0."
            )
        c = self._encoded(condition, h)
        return h - c if self.difference else torch.cat([h, c], self.axis)

    def _encoded(self, condition: Tensor, h: Tensor) -> Tensor:
        """The condition with the shape of h but for the number of features: labels one-hot, vectors spread out."""
        if not isinstance(condition, Tensor):
            raise TypeError(f"the target must be a Tensor, got {type(condition).__name__}.")
        batch, event = h.shape[: self.axis], h.shape[self.axis + 1 :] if self.axis != -1 else h.shape[:0]
        whole = torch.Size([*batch, self.condition, *event])
        c = condition.detach()
        if not c.is_floating_point() and c.shape == batch:
            c = nn.functional.one_hot(c.long(), self.condition)
        if c.shape == torch.Size([*batch, self.condition]):
            c = c.reshape(*c.shape, *(1 for _ in event))
        elif c.shape != whole:
            raise ValueError(
                f"the target must have shape {(*batch, self.condition)}"
                + (f" or {tuple(whole)}" if event else "")
                + f", or be integer labels of shape {tuple(batch)}, to condition {type(self).__name__} at an "
                f"activation of shape {tuple(h.shape)}; got {tuple(condition.shape)}."
            )
        return c.to(h).expand(whole)

    def extra_repr(self) -> str:
        hidden = f", hidden={self.hidden}" if self.hidden else ""
        return f"features={self.features}, condition={self.condition}, difference={self.difference}{hidden}"


class LinearSynthesiser(_FeatureSynthesiser):
    r"""$\hat\delta = A\,[h, c] + b$, or $A\,(h - c) + b$: one affine map, which starts at zero.

    Args:
        features: of h, its last dimension.
        condition: numbers in a sample's condition c; for integer labels, the number of classes; 0 for none.
        difference: whether it sees $h - c$ in place of both: for a target of the same kind as h, as in regression.
        device, dtype: of the parameters.

    Shape:
        - h: (..., features)
        - condition: (..., condition), or integer labels (...)
        - output: (..., features)

    Raises:
        TypeError, ValueError: when built, a number out of its range, or `difference` with a condition of another width
            than h; when called, h or the condition of a wrong shape or dtype, or no condition where one is needed.

    Example:
        >>> synthesiser = LinearSynthesiser(16, condition=10)   # cDNI: it sees the labels
        >>> synthesiser(torch.randn(4, 16), torch.tensor([3, 1, 4, 1])).abs().max()
        tensor(0., grad_fn=<MaxBackward1>)

    Reference:
        M. Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017.
    """

    def __init__(
        self,
        features: int,
        condition: int = 0,
        *,
        difference: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, condition, difference)
        self._build((), lambda before, after: nn.Linear(before, after, device=device, dtype=dtype))


class MLPSynthesiser(_FeatureSynthesiser):
    r"""$\hat\delta = A\,\phi(\dots \phi(B\,[h, c]))$: hidden layers with ReLU, the last map starts at zero.

    Args:
        features: of h, its last dimension.
        condition: numbers in a sample's condition c; for integer labels, the number of classes; 0 for none.
        hidden: the widths of the hidden layers.
        difference: whether it sees $h - c$ in place of both.
        device, dtype: of the parameters.

    Shape:
        - h: (..., features)
        - condition: (..., condition), or integer labels (...)
        - output: (..., features)

    Raises:
        TypeError, ValueError: as `LinearSynthesiser`; or `hidden` that is empty or no sequence of widths.

    Example:
        >>> MLPSynthesiser(16, hidden=(64,))(torch.randn(4, 16)).shape
        torch.Size([4, 16])

    Reference:
        M. Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017.
    """

    def __init__(
        self,
        features: int,
        condition: int = 0,
        *,
        hidden: Sequence[int] = (256,),
        difference: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, condition, difference)
        widths = _widths(hidden, "LinearSynthesiser")
        self._build(widths, lambda before, after: nn.Linear(before, after, device=device, dtype=dtype))


class ConvSynthesiser(_FeatureSynthesiser):
    r"""$\hat\delta = A * \phi(\dots \phi(B * [h, c]))$: the same with convolutions, for activations that are images.

    A condition with one number or vector a sample is spread over all pixels, in channels of its own.

    Args:
        features: channels of h.
        condition: channels of the condition c; for integer labels, the number of classes; 0 for none.
        hidden: channels of the hidden layers; `()` leaves one convolution.
        kernel_size: side of all kernels, odd.
        difference: whether it sees $h - c$ in place of both.
        device, dtype: of the parameters.

    Shape:
        - h: (batch, features, height, width)
        - condition: (batch, condition, height, width), (batch, condition), or integer labels (batch,)
        - output: as h

    Raises:
        TypeError, ValueError: as `LinearSynthesiser`; or an even `kernel_size`.

    Example:
        >>> ConvSynthesiser(3, condition=10)(torch.randn(2, 3, 8, 8), torch.tensor([7, 2])).shape
        torch.Size([2, 3, 8, 8])

    Reference:
        M. Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017.
    """

    axis = -3

    def __init__(
        self,
        features: int,
        condition: int = 0,
        *,
        hidden: Sequence[int] = (64,),
        kernel_size: int = 5,
        difference: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, condition, difference)
        widths = _widths(hidden)
        if _check.integer("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the estimate has the size of h; got {kernel_size}.")

        def layer(before: int, after: int) -> nn.Conv2d:
            return nn.Conv2d(before, after, kernel_size, padding="same", device=device, dtype=dtype)

        self._build(widths, layer)


def _widths(hidden: Sequence[int], instead: str = "") -> tuple[int, ...]:
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise TypeError(f"hidden must be a sequence of widths such as (256,), got {hidden!r}.")
    if instead and not hidden:
        raise ValueError(f"hidden is empty. Give it a width, or use {instead}.")
    return tuple(_check.integer(f"hidden[{i}]", width) for i, width in enumerate(hidden))
