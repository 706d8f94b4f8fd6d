"""`RadialBasis`: free curves as sums of Gaussians, looked up in a table that is made of their weights in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.functional import soft_threshold
from unrolled.shrinkage._base import Shrinkage, joined

Curve = Callable[[Tensor], Tensor]

REACH = 6  # widths beyond the outermost centre at which a Gaussian has died: exp(-18) is below float32's rounding


class RadialBasis(Shrinkage):
    r"""$\phi_c(x) = \sum_j w_{cj} \exp(-(x - \mu_j)^2 / 2\gamma^2)$, and $t\,\phi_c(x / t)$ for a threshold t.

    A curve of any shape for every channel c, which needs neither be odd nor grow. The centres $\mu_j$ are evenly spaced
    from -`radius` to `radius`, the width $\gamma$ is their spacing. Six widths further out the curve is 0.

    The sum is never formed at the entries of x. A table of it, with `samples` values between neighbouring centres, is
    made of the weights in each call and read by linear interpolation. Its error is of the order of 1e-4 of the curve's
    range, the time a hundredth or less. Gradients are those of the table, exactly. It has no second derivative:
    `create_graph=True` is an error.

    Args:
        num_channels: how many curves there are.
        channel_dim: where the channels of x are, counted from the end: -1 for codes, -3 for images.
        num_knots: how many Gaussians, at least 2.
        radius: the outermost centre, in units of the threshold.
        samples: values of the table from one centre to the next, at least 1.
        curve: the curve through whose values at the centres all curves pass to begin with; the soft threshold at 1
            where not given.
        device, dtype: of the weights.

    Shape:
        - x: any, with the channels in `channel_dim` where there are several
        - threshold: broadcasts with x
        - output: as x

    Raises:
        TypeError: a number of the wrong kind, an x that is not floating point, a dtype that differs from the weights'.
        ValueError: numbers out of their range, the wrong number of channels.
        RuntimeError: in a backward pass with `create_graph=True`.

    Example:
        >>> bump = RadialBasis(radius=10.0, curve=lambda x: x * torch.exp(-(x**2) / 8))
        >>> bump(torch.tensor([-2.0, 0.0, 2.0, 100.0])).detach().round(decimals=2)
        tensor([-1.2100, -0.0000,  1.2100,  0.0000])

    Reference:
        Y. Chen and T. Pock, "Trainable Nonlinear Reaction Diffusion: A Flexible Framework for Fast and Effective Image
        Restoration", TPAMI 2017, section 3.
    """

    basis: Tensor  # (num_knots, entries of the table): the Gaussians at the table's places

    def __init__(
        self,
        num_channels: int = 1,
        channel_dim: int = -1,
        *,
        num_knots: int = 63,
        radius: float = 10.0,
        samples: int = 50,
        curve: Curve | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, channel_dim)
        self.num_knots = _check.integer("num_knots", num_knots, minimum=2)
        self.radius = _check.real("radius", radius, above=0.0)
        self.samples = _check.integer("samples", samples)
        if curve is not None and not callable(curve):
            raise TypeError(f"curve must be a function of a Tensor, got {curve!r}.")
        self.weight = nn.Parameter(torch.empty(self.num_channels, self.num_knots, device=device, dtype=dtype))
        # Made of the constants above, and so not saved with the weights.
        entries = samples * (num_knots - 1 + 2 * REACH) + 1
        self.register_buffer("basis", self.weight.new_empty(num_knots, entries), persistent=False)
        self.reset_parameters(curve)

    @property
    def width(self) -> float:
        r"""$\gamma$, the standard deviation of the Gaussians, which is the distance of their centres."""
        return 2 * self.radius / (self.num_knots - 1)

    @property
    def _start(self) -> float:
        return -self.radius - REACH * self.width

    def _gaussians(self, x: Tensor) -> Tensor:  # (*x.shape, num_knots), in the dtype of x
        centres = torch.linspace(-self.radius, self.radius, self.num_knots, dtype=x.dtype)
        return torch.exp(-((x.unsqueeze(-1) - centres) / self.width).square() / 2)

    @torch.no_grad()
    def reset_parameters(self, curve: Curve | None = None) -> None:
        """Let all curves pass through this one's values at the centres; the soft threshold's by default."""
        places = torch.linspace(self._start, -self._start, self.basis.shape[1], dtype=torch.float64)
        basis = self._gaussians(places).T
        # The curve ends in two zeros on either side. Whatever lies further out then meets a slope of exactly 0.
        basis[:, :2] = basis[:, -2:] = 0
        self.basis.copy_(basis)
        centres = torch.linspace(-self.radius, self.radius, self.num_knots, dtype=torch.float64)
        values = soft_threshold(centres, 1.0) if curve is None else curve(centres)
        self.weight.copy_(_solve(self._gaussians(centres), values))

    def forward(self, x: Tensor, threshold: float | Tensor = 1.0) -> Tensor:
        self.check(x)
        if isinstance(threshold, (int, float)) and threshold == 1:
            return self._looked_up(x)
        return threshold * self._looked_up(x / threshold)

    def check(self, x: Tensor) -> Tensor:
        _check.tensor("x", x)
        if x.dtype != self.weight.dtype:
            raise TypeError(f"x is {x.dtype} but the weights are {self.weight.dtype}. Convert one with .to(...).")
        return super().check(x)

    def _looked_up(self, x: Tensor) -> Tensor:
        table = self.table()
        first = torch.arange(self.num_channels, dtype=torch.int32, device=x.device) * table.shape[1]
        layout = (self._start, self.samples / self.width, self.per_channel(first))
        if _check.is_traced(x) or _check.is_traced(table):
            return _interpolated(x, table, *layout)
        return _Lookup.apply(x, table, *layout)[0]

    def table(self) -> Tensor:
        """All curves at evenly spaced places, (num_channels, entries)."""
        return self.weight @ self.basis

    def exact(self, x: Tensor) -> Tensor:
        """The sum itself, of as many Gaussians at every entry of x: slow, and with derivatives of every order."""
        self.check(x)
        trailing = 0 if self.num_channels == 1 else -1 - self.channel_dim
        weight = self.weight.reshape(-1, *(1,) * trailing, self.num_knots)
        return (self._gaussians(x) * weight).sum(-1).reshape(x.shape)

    def extra_repr(self) -> str:
        own = f"num_knots={self.num_knots}, radius={self.radius:g}, samples={self.samples}"
        return joined(super().extra_repr(), own)


def _solve(matrix: Tensor, values: Tensor) -> Tensor:
    """The solution of a positive definite system, by Gauss and Jordan.

    Written out, since a library's last digits depend on where in memory a matrix lies: two networks that are made alike
    shall be alike in every bit.
    """
    system = torch.cat([matrix, values.unsqueeze(-1)], 1)
    for k in range(len(matrix)):
        row = system[k] / system[k, k]
        system = system - system[:, k : k + 1] * row
        system[k] = row
    return system[:, -1]


def _interpolated(x: Tensor, table: Tensor, start: float, density: float, first: Tensor) -> Tensor:
    """The table at x by linear interpolation, in plain operations, for compilers and torch.func to transform."""
    position = (x - start) * density
    index = position.detach().to(torch.int32).clamp(0, table.shape[1] - 2)
    entry = (index + first).flatten()
    low, slope = (values.flatten().index_select(0, entry).reshape(x.shape) for values in (table, _slopes(table)))
    return low + slope * (position - index)


def _slopes(table: Tensor) -> Tensor:
    return table.diff(append=table[:, -1:])


class _Lookup(torch.autograd.Function):
    """The same, with a backward pass that adds into the table directly, and without memory for what lies between.

    Allocating is what costs time here, so everything is done in place. An integer is clamped, not a float, because
    float32 rounds large ones up. Truncation is the floor for those that are not clamped.
    """

    @staticmethod
    def forward(x: Tensor, table: Tensor, start: float, density: float, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fraction = x.sub(start).mul_(density)
        index = fraction.to(torch.int32).clamp_(0, table.shape[1] - 2)
        fraction.sub_(index)
        entry = index.add_(first).flatten()
        out = table.flatten().index_select(0, entry)
        out.addcmul_(_slopes(table).flatten().index_select(0, entry), fraction.flatten())
        return out.reshape(x.shape), entry, fraction

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, table, _, ctx.density, _ = inputs
        _, index, fraction = output
        ctx.mark_non_differentiable(index, fraction)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(table, index, fraction)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: it lets pass, as zeros, derivatives of what was saved.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The table of RadialBasis has no second derivative. Leave out create_graph=True, or use "
                "RadialBasis.exact, which is slow."
            )
        if gradient is None:
            return (None,) * 5
        table, index, fraction = ctx.saved_tensors
        for_x = for_table = None
        if ctx.needs_input_grad[0]:
            slope = _slopes(table).mul_(ctx.density).flatten().index_select(0, index)
            for_x = slope.reshape(gradient.shape).mul_(gradient)
        if ctx.needs_input_grad[1]:
            right = gradient * fraction
            # Every index leaves an entry after it, so that the shifted sum stays within its channel.
            for_table = table.new_zeros(table.numel()).index_add_(0, index, (gradient - right).flatten())
            for_table[1:] += table.new_zeros(table.numel()).index_add_(0, index, right.flatten())[:-1]
            for_table = for_table.reshape(table.shape)
        return for_x, for_table, None, None, None
