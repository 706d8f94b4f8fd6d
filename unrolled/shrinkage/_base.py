"""`Shrinkage`: the protocol that every learnable shrinkage operator follows."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._config import Recorded


class Shrinkage(Recorded, nn.Module, abc.ABC):
    r"""$s = \mathrm{shrink}(x, t)$: entry by entry, a learnable function of one number in units set by a threshold.

    Every iterative algorithm for sparse codes or images has a place where small entries are made smaller. A step that
    calls `self.shrinkage(x, threshold)` there works with any of them. The threshold comes from the algorithm (a step
    size times the weight of the penalty), the shape of the curve is what the shrinkage learns:

    - `SoftThreshold` and `GeneralizedShrinkage` are proximal operators, of $t\,|x|$ and $t\,|x|^p$;
    - `PiecewiseLinear` and `RadialBasis` are free curves $t\,\psi(x / t)$ with $\psi$ learned.

    A subclass calls `super().__init__(num_channels, channel_dim)`, makes its parameters with a first dimension of
    `num_channels`, and writes `reset_parameters` and `forward`. It may call `check` and `per_channel` there.

    Args:
        num_channels: how many curves there are, one for each channel of x; 1 is one curve for all entries.
        channel_dim: where the channels of x are, counted from the end: -1 for codes (..., n), -3 for images
            (..., C, height, width). It makes no difference where there is one curve.

    Raises:
        TypeError, ValueError: `num_channels` is less than 1, `channel_dim` is not negative.

    Example:
        >>> class Firm(Shrinkage):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log_ratio = torch.nn.Parameter(torch.zeros(1))
        ...     def forward(self, x, threshold=1.0):
        ...         ratio = 1 + self.per_channel(self.log_ratio).exp()
        ...         return firm_threshold(x, threshold, ratio * threshold)
        >>> Firm()(torch.tensor([0.5, 1.5, 4.0]), 1.0).detach()
        tensor([0., 1., 4.])
    """

    def __init__(self, num_channels: int = 1, channel_dim: int = -1) -> None:
        super().__init__()
        self.num_channels = _check.integer("num_channels", num_channels)
        self.channel_dim = _check.integer("channel_dim", channel_dim, minimum=-16)
        if self.channel_dim >= 0:
            raise ValueError(
                f"channel_dim must be negative, counted from the end, got {channel_dim}: -1 for codes (..., n), -3 for "
                "images (..., C, height, width)."
            )

    @abc.abstractmethod
    def forward(self, x: Tensor, threshold: float | Tensor = 1.0) -> Tensor:
        """The shrunk x, of its shape and dtype; `threshold` is positive and broadcasts with x without enlarging it."""

    def per_channel(self, values: Tensor) -> Tensor:
        """Parameters (num_channels,) in the shape in which they broadcast with x: () where there is one curve."""
        if self.num_channels == 1:
            return values.reshape(())
        return values.reshape(self.num_channels, *(1,) * (-1 - self.channel_dim))

    def check(self, x: Tensor) -> Tensor:
        """Return x if it is a floating point or complex tensor with the channels that there are curves for."""
        _check.tensor("x", x, allow_complex=True)
        if self.num_channels > 1 and (x.dim() < -self.channel_dim or x.shape[self.channel_dim] != self.num_channels):
            raise ValueError(
                f"x must have {self.num_channels} channels in dimension {self.channel_dim}, got shape "
                f"{tuple(x.shape)}. See num_channels and channel_dim of {type(self).__name__}."
            )
        return x

    def extra_repr(self) -> str:
        return "" if self.num_channels == 1 else f"num_channels={self.num_channels}, channel_dim={self.channel_dim}"


def channel_numbers(
    num_channels: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:  # (num_channels,)
    """One number for each curve, to be filled by `reset_parameters`."""
    return nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))


def joined(*parts: str) -> str:
    """The non-empty parts of an `extra_repr`."""
    return ", ".join(part for part in parts if part)
