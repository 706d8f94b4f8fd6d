"""Generalised shrinkage-thresholding: the proximal operator of |x|^p with a learned exponent, also a negative one."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled import _check
from unrolled.functional import generalized_threshold
from unrolled.shrinkage._base import Shrinkage, channel_numbers, joined


class GeneralizedShrinkage(Shrinkage):
    r"""$G_{w t, p}(x) = \arg\min_z \tfrac12 (z - x)^2 + w t\,|z|^p$ with learned exponent $p$ and weight $w$.

    Between the soft threshold ($p = 1$) and the hard one ($p = 0$) large entries are shrunk the less, the smaller p
    is. Below 0 what is kept grows: in image gradients, strong edges become sharper while texture disappears, which is
    what the first iterations of blind deconvolution need. See `functional.generalized_threshold` for the formulas and
    the exact derivatives.

    Whatever an optimiser does, $-1 \le p \le 1$: the parameter is folded back at both ends. Its slope is 1 or -1
    everywhere, so that a p at one of the ends still learns.

    Args:
        p: the exponent to start with, from -1 to 1.
        weight: $w > 0$ to start with. The parameter is its logarithm.
        num_channels, channel_dim: one curve for all entries or one for each channel, see `Shrinkage`.
        device, dtype: of the parameters.

    Shape:
        - x: any, with `num_channels` in dimension `channel_dim` where there are several
        - threshold: a number or a tensor that broadcasts with x
        - output: the shape of x

    Raises:
        TypeError, ValueError: `p` is not from -1 to 1, `weight` not positive, `num_channels` less than 1,
            `channel_dim` not negative; x is of integers or has other channels.

    Example:
        >>> shrink = GeneralizedShrinkage(p=-0.5, weight=0.2)
        >>> shrink(torch.tensor([-2.0, 0.5, 1.0])).detach()
        tensor([-2.0345,  0.0000,  1.0881])

    Reference:
        W. Zuo, D. Ren, D. Zhang, S. Gu and L. Zhang, "Learning Iteration-wise Generalized Shrinkage-Thresholding
        Operators for Blind Deconvolution", IEEE Transactions on Image Processing 25(4), 2016.
    """

    def __init__(
        self,
        p: float = 0.5,
        weight: float = 1.0,
        *,
        num_channels: int = 1,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, channel_dim)
        self.first_p = _check.real("p", p, minimum=-1.0)
        if self.first_p > 1:
            raise ValueError(f"p must be at most 1, got {p}. Penalties |x|^p with p > 1 give no zeros.")
        self.first_weight = _check.real("weight", weight, above=0.0)
        self.raw_p = channel_numbers(self.num_channels, device, dtype)
        self.log_weight = channel_numbers(self.num_channels, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the exponent and the weight that were given first."""
        self.raw_p.fill_(self.first_p)
        self.log_weight.copy_(self.log_weight.new_tensor(self.first_weight).log())

    @property
    def p(self) -> Tensor:
        """The exponents, (num_channels,), from -1 to 1."""
        return folded(self.raw_p)

    @property
    def weight(self) -> Tensor:
        """The weights, (num_channels,), positive."""
        return self.log_weight.exp()

    def forward(self, x: Tensor, threshold: float | Tensor = 1.0) -> Tensor:
        return generalized_threshold(self.check(x), self.per_channel(self.weight) * threshold, self.per_channel(self.p))

    def extra_repr(self) -> str:
        return joined(f"p={self.first_p:g}, weight={self.first_weight:g}", super().extra_repr())


def folded(raw: Tensor) -> Tensor:
    """`raw` folded back into [-1, 1] at both ends, with slope 1 or -1 everywhere."""
    place = (raw + 1).remainder(4)
    return torch.where(place <= 2, place - 1, 3 - place)
