"""The soft threshold as a shrinkage with a learned factor."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled import _check
from unrolled.functional import soft_threshold
from unrolled.shrinkage._base import Shrinkage, channel_numbers, joined


class SoftThreshold(Shrinkage):
    r"""$S_{w t}(x) = \mathrm{sgn}(x)\max(|x| - w t, 0)$: the proximal operator of $w t\,|x|$, with $w$ learned.

    In a step that learns its own thresholds $t$, such as LISTA's, it starts as the plain soft threshold. By itself it
    is a layer with a learned threshold: `SoftThreshold(0.1)(x)`.

    Args:
        weight: $w > 0$ to start with. The parameter is its logarithm.
        num_channels, channel_dim: one weight for all entries or one for each channel, see `Shrinkage`.
        device, dtype: of the parameter.

    Shape:
        - x: any, with `num_channels` in dimension `channel_dim` where there are several
        - threshold: a number or a tensor that broadcasts with x
        - output: the shape of x

    Raises:
        TypeError, ValueError: `weight` is not positive, `num_channels` less than 1, `channel_dim` not negative; x is
            of integers or has other channels.

    Example:
        >>> shrink = SoftThreshold(0.75)
        >>> shrink(torch.tensor([-2.0, 0.5, 1.0])).detach()
        tensor([-1.2500,  0.0000,  0.2500])

    Reference:
        D. L. Donoho, "De-noising by soft-thresholding", IEEE Transactions on Information Theory 41(3), 1995.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        num_channels: int = 1,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, channel_dim)
        self.first_weight = _check.real("weight", weight, above=0.0)
        self.log_weight = channel_numbers(self.num_channels, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the weight that was given first."""
        with torch.no_grad():
            self.log_weight.copy_(self.log_weight.new_tensor(self.first_weight).log())

    @property
    def weight(self) -> Tensor:
        """The weights, (num_channels,), positive."""
        return self.log_weight.exp()

    def forward(self, x: Tensor, threshold: float | Tensor = 1.0) -> Tensor:
        return soft_threshold(self.check(x), self.per_channel(self.weight) * threshold)

    def extra_repr(self) -> str:
        return joined(f"weight={self.first_weight:g}", super().extra_repr())
