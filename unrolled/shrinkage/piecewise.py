"""A shrinkage curve made of straight pieces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.shrinkage._base import Shrinkage, joined


class PiecewiseLinear(Shrinkage):
    r"""$t\,\psi(x / t)$ with $\psi$ odd, continuous and straight between knots at $0, h, 2h, \dots, \kappa$.

    A curve that learns its shape, in units of the threshold: the heights of $\psi$ at the knots are the parameters, and
    beyond the last knot the last piece goes on. It starts as the soft threshold, exactly. Nothing keeps it monotone or
    shrinking. It costs a look into a table, however many knots there are.

    Args:
        num_knots: knots above 0, a multiple of `reach`, so that 1, the kink of the soft threshold, is one of them.
        reach: $\kappa \ge 2$, the last knot, in units of the threshold.
        num_channels, channel_dim: one curve for all entries or one for each channel, see `Shrinkage`.
        device, dtype: of the parameters.

    Shape:
        - x: any, with `num_channels` in dimension `channel_dim` where there are several; complex ones keep their phase
        - threshold: a positive number or tensor that broadcasts with x
        - output: the shape of x

    Raises:
        TypeError, ValueError: `num_knots` is no multiple of `reach`, `reach` less than 2, `num_channels` less than 1,
            `channel_dim` not negative; `threshold` is a number that is not positive; x is of integers or has other
            channels.

    Example:
        >>> shrink = PiecewiseLinear()
        >>> shrink(torch.tensor([-2.0, 0.5, 1.0]), 0.75).detach()
        tensor([-1.2500,  0.0000,  0.2500])
    """

    def __init__(
        self,
        num_knots: int = 24,
        reach: int = 6,
        *,
        num_channels: int = 1,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, channel_dim)
        self.reach = _check.integer("reach", reach, minimum=2)
        self.num_knots = _check.integer("num_knots", num_knots)
        if self.num_knots % self.reach:
            raise ValueError(
                f"num_knots must be a multiple of reach={reach}, got {num_knots}: 1, the kink of the soft threshold, "
                "must be a knot."
            )
        self.heights = nn.Parameter(torch.empty(self.num_channels, self.num_knots, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the soft threshold."""
        self.heights.copy_((self.knots - 1).relu())

    @property
    def knots(self) -> Tensor:
        """Where the heights are, (num_knots,), in units of the threshold."""
        number = torch.arange(1, self.num_knots + 1, device=self.heights.device, dtype=self.heights.dtype)
        return number / (self.num_knots // self.reach)

    def forward(self, x: Tensor, threshold: float | Tensor = 1.0) -> Tensor:
        self.check(x)
        if not isinstance(threshold, Tensor):
            _check.real("threshold", threshold, above=0.0, hint="It is the unit of the curve.")
        density = self.num_knots // self.reach
        place = x.abs() * density / threshold
        # The piece that |x| is on; what lies beyond the last knot is on the last one.
        piece = place.detach().clamp(max=self.num_knots - 1).long().clamp(min=0)  # NaN becomes anything
        first = piece + self.per_channel(torch.arange(self.num_channels, device=x.device) * (self.num_knots + 1))
        table = nn.functional.pad(self.heights, (1, 0)).flatten()  # psi(0) = 0
        left, right = (table.index_select(0, (first + i).flatten()).reshape(first.shape) for i in (0, 1))
        modulus = threshold * (left + (place - piece) * (right - left))
        return torch.sgn(x) * modulus.to(x.real.dtype)

    def extra_repr(self) -> str:
        return joined(f"num_knots={self.num_knots}, reach={self.reach}", super().extra_repr())
