"""Learned partial differential equations: two coupled images that evolve by learned mixtures of invariants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.image.invariants import OWN_LAPLACIAN, SWAPPED, differential_invariants
from unrolled.solvers.diffusion import MOST_DIFFUSIVITY, diffusivity_in_bounds
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll

OWN = (OWN_LAPLACIAN, SWAPPED[OWN_LAPLACIAN])  # which invariants of (u, v) are the Laplacians of u and of v
VALUE_LIMIT = 8.0  # times the range: where u and v themselves saturate, far enough to be nearly linear in images


class PDEState(NamedTuple):
    """The image u and its indicator v, each (..., C, H, W), in the units of the image."""

    u: Tensor
    v: Tensor


class _Prepared(NamedTuple):
    image: Tensor  # (..., C, H, W)
    mixture: Tensor  # (2, 17), of the saturated invariants of (u, v), without each image's own Laplacian
    diffusivity: Tensor  # (2,), of the own Laplacians
    limits: Tensor  # (17, 1): where the invariants saturate


class LearnedPDEStep(Step):
    r"""$u \leftarrow u + d_u \Delta u + \sum_i a_i\, s(\mathrm{inv}_i(u, v))$, and so for $v$: an explicit Euler step.

    The invariants are those of $u/\kappa$ and $v/\kappa$ with the contrast $\kappa$, and what they add is multiplied by
    it; $s(x) = x / (1 + |x| / M)$ saturates them. `coefficients` are kept in their bounds by construction: those of an
    image's own Laplacian, $d$, in (0, 0.3) by a sigmoid, the others in $(-c, c)$ by tanh. The time step is part of the
    coefficients.

    Args:
        contrast, diffusivity, indicator_diffusivity, bound, saturation, data_range, device, dtype: as for `LearnedPDE`.
    """

    event_dim = 3

    def __init__(
        self,
        *,
        contrast: float = 12.5,
        diffusivity: float = 0.1,
        indicator_diffusivity: float = 0.1,
        bound: float = 1.0,
        saturation: float = 8.0,
        data_range: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.contrast = _check.real("contrast", contrast, above=0.0, hint="It is in grey levels of 0..255.")
        self.diffusivity = diffusivity_in_bounds("diffusivity", diffusivity)
        self.indicator_diffusivity = diffusivity_in_bounds("indicator_diffusivity", indicator_diffusivity)
        self.bound = _check.real("bound", bound, above=0.0)
        self.saturation = _check.real("saturation", saturation, above=0.0)
        self.data_range = _check.real("data_range", data_range, above=0.0)
        self.raw_a = nn.Parameter(torch.empty(len(SWAPPED), device=device, dtype=dtype))
        self.raw_b = nn.Parameter(torch.empty_like(self.raw_a))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the heat equation, for both images."""
        for raw, diffusivity in ((self.raw_a, self.diffusivity), (self.raw_b, self.indicator_diffusivity)):
            raw.zero_()
            raw[OWN_LAPLACIAN] = math.log(diffusivity / (MOST_DIFFUSIVITY - diffusivity))

    @property
    def coefficients(self) -> Tensor:
        """(2, 17): those of inv_i(u, v) in the equation of u, then those of inv_i(v, u) in the equation of v."""
        raw = torch.stack([self.raw_a, self.raw_b])
        own = torch.arange(raw.shape[1], device=raw.device) == OWN_LAPLACIAN
        return torch.where(own, MOST_DIFFUSIVITY * raw.sigmoid(), self.bound * torch.tanh(raw / self.bound))

    @property
    def unit(self) -> float:
        """The contrast in the units of the image."""
        return self.contrast / 255 * self.data_range

    @property
    def growth(self) -> float:
        """By how much the largest value of an image can grow in a step, whatever the coefficients are."""
        polynomials = len(SWAPPED) - 4  # without 1, u, v and the own Laplacian, which makes nothing larger
        return self.bound * (self.unit * (1 + polynomials * self.saturation) + 2 * VALUE_LIMIT * self.data_range)

    def check(self, image: Tensor) -> None:
        _check.images("image", image, self.raw_a, self.data_range)

    def prepare(self, image: Tensor) -> _Prepared:
        a, b = self.coefficients.unbind()
        # inv_i(v, u) is inv_SWAPPED[i](u, v): one table of invariants serves both equations.
        swapped = b[list(SWAPPED)]
        places = torch.arange(len(a), device=a.device)
        mixture = torch.stack([torch.where(places == own, 0, row) for own, row in zip(OWN, (a, swapped), strict=True)])
        values = (places == 1) | (places == 2)
        limits = torch.where(values, VALUE_LIMIT * self.data_range / self.unit, self.saturation).to(a.dtype)
        diffusivity = torch.stack([a[OWN_LAPLACIAN], b[OWN_LAPLACIAN]])
        return _Prepared(image.to(a.dtype), mixture, diffusivity, limits.unsqueeze(1))

    def init(self, context: _Prepared) -> PDEState:
        return PDEState(context.image, context.image)

    def forward(self, state: PDEState, context: _Prepared) -> PDEState:
        with _check.full_precision(state.u.device):
            u, v = state
            invariants = differential_invariants(u / self.unit, v / self.unit)
            table = invariants.flatten(1)
            mixed = context.mixture @ (table / (1 + table.abs() / context.limits))
            heat = context.diffusivity.unsqueeze(1) * table[list(OWN)]
            du, dv = (self.unit * (heat + mixed)).unflatten(1, u.shape).unbind()
            return PDEState(u + du, v + dv)

    def readout(self, state: PDEState) -> Tensor:
        return state.u

    def extra_repr(self) -> str:
        return (
            f"contrast={self.contrast:g}, diffusivity={self.diffusivity:g}, indicator_diffusivity="
            f"{self.indicator_diffusivity:g}, bound={self.bound:g}, saturation={self.saturation:g}, "
            f"data_range={self.data_range:g}"
        )


class LearnedPDE(Unroll):
    r"""$u_t = \sum_{i=0}^{16} a_i(t)\, \mathrm{inv}_i(u, v)$, $v_t = \sum_{i=0}^{16} b_i(t)\, \mathrm{inv}_i(v, u)$.

    Two coupled partial differential equations that learn what to do to an image, in explicit Euler steps, one a layer.
    $u$ starts as the image that comes in and ends as the one that goes out; the indicator $v$ starts as the same image,
    and tells $u$ where it is. What they evolve by are the 17 differential invariants (see
    `unrolled.image.invariants`), each with a coefficient for every layer: 34 K numbers in all. Untrained it is the heat
    equation, `solvers.heat`, in both.

    The network answers to a turned or reflected image with its answer turned or reflected: for 90 degrees up to
    rounding, for other angles up to the grid. Channels evolve side by side, by the same equations. Pixels beyond the
    border are those at it.

    It cannot blow up. In place of the invariant $x$ stands $x / (1 + |x|/M)$, except for each image's own Laplacian,
    whose coefficient has the bounds of a stable scheme; and all coefficients are bounded. So whatever is learned,
    values grow by at most `net[k].growth` in a layer.

    Args:
        num_iters: number of layers K.
        contrast: $\kappa$ in grey levels of 0..255: invariants are of order 1 where neighbours differ by this much.
            Half the standard deviation of the noise is a good choice.
        diffusivity: of $u$ to begin with, above 0 and less than 0.3; pixels have side 1.
        indicator_diffusivity: of $v$.
        bound: $c$, the coefficients other than the diffusivities are less than this.
        saturation: $M$, what no invariant exceeds.
        data_range: images without noise are in [0, `data_range`].
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when a sample stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters.

    Shape:
        - image: (..., C, height, width), the dtype and device of the parameters, any number of channels
        - output: the same; not clipped

    Raises:
        TypeError: `image` is no floating point tensor, or not of the network's dtype.
        ValueError: a wrong shape or device, NaN or infinity, values far outside of [0, `data_range`], a diffusivity out
            of its bounds, another number that is not positive, `num_iters < 1`.

    Example:
        >>> net = LearnedPDE(num_iters=4)
        >>> noisy = 0.5 + 25 / 255 * torch.randn(2, 1, 32, 32)
        >>> (net(noisy).std() / noisy.std()).item() < 0.6
        True

    Reference:
        R. Liu, Z. Lin, W. Zhang and Z. Su, "Learning PDEs for Image Restoration via Optimal Control", ECCV 2010.
    """

    def __init__(
        self,
        num_iters: int = 10,
        *,
        contrast: float = 12.5,
        diffusivity: float = 0.1,
        indicator_diffusivity: float = 0.1,
        bound: float = 1.0,
        saturation: float = 8.0,
        data_range: float = 1.0,
        tied: bool | Sequence[str] = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = LearnedPDEStep(
            contrast=contrast,
            diffusivity=diffusivity,
            indicator_diffusivity=indicator_diffusivity,
            bound=bound,
            saturation=saturation,
            data_range=data_range,
            device=device,
            dtype=dtype,
        )
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, image: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(image, state=state, num_iters=num_iters)
