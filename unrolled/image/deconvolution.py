"""Non-blind deconvolution: half-quadratic splitting with learned filters, weights and shrinkage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fft import irfft2, rfft2

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.image import _weights
from unrolled.shrinkage import GeneralizedShrinkage, Shrinkage
from unrolled.solvers.deconvolution import Frame, check_blur, differences, frame, noise_variance, transfer
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class DeconvolutionState(NamedTuple):
    """The sharp image, the larger one around it, and how many iterations it has seen."""

    image: Tensor  # (..., C, height, width), in [0, 1]
    full: Tensor  # (..., C, *frame)
    k: Tensor  # ()


class _Prepared(NamedTuple):
    seen: Tensor  # the blurred image in its frame, and its mirror image around it, (..., C, *frame)
    inside: Tensor  # where it was seen, 0 or 1, (..., 1, *frame)
    K: Tensor  # transform of the kernel, (..., 1, ...)
    F: Tensor  # transforms of the filters, (n, ...)
    strength: Tensor  # lambda_i sigma^2, (..., n, 1, 1)
    area: Frame


class DeconvolutionStep(Step):
    r"""$w_i = \mathrm{shrink}(F_i x, 1/\beta),\quad x = (K^*K + \sum_i\mu_i F_i^*F_i)^{-1}
    (K^*\tilde y + \sum_i \mu_i F_i^* w_i),\quad \mu_i = \lambda_i\sigma^2\beta$, then $\beta\leftarrow\gamma\beta$.

    The state is the image with a margin. Beyond the border of what was seen, $\tilde y$ is the blur of the last x.

    Args:
        filters, shrinkage, weight, beta, growth, sigma, data_range, device, dtype: as for `NonBlindDeconvolution`.
    """

    event_dim = 3
    filters: Tensor

    def __init__(
        self,
        *,
        filters: Tensor | None = None,
        shrinkage: Shrinkage | None = None,
        weight: float = 10.0,
        beta: float = 1.0,
        growth: float = 1.4,
        sigma: float | None = None,
        data_range: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.first_weight = _check.real("weight", weight, above=0.0)
        self.beta = _check.real("beta", beta, above=0.0)
        self.growth = _check.real("growth", growth, above=0.0)
        hint = "It is in grey levels of 0..255; None estimates it."
        self.sigma = None if sigma is None else _check.real("sigma", sigma, above=0.0, hint=hint)
        self.data_range = _check.real("data_range", data_range, above=0.0)
        given = _filters(differences(torch.empty(0)) if filters is None else filters)
        if isinstance(filters, nn.Parameter):
            self.filters = nn.Parameter(_check.converted("filters", given, device, dtype).clone())
        else:
            self.register_buffer("filters", _check.converted("filters", given, device, dtype))
        if shrinkage is None:
            shrinkage = GeneralizedShrinkage(0.8, device=self.filters.device, dtype=self.filters.dtype)
        elif not isinstance(shrinkage, Shrinkage):
            raise TypeError(
                f"shrinkage must be an unrolled.shrinkage.Shrinkage such as SoftThreshold(), got {shrinkage!r}."
            )
        if shrinkage.num_channels > 1 and (shrinkage.num_channels, shrinkage.channel_dim) != (len(given), -3):
            raise ValueError(
                f"shrinkage must have num_channels=1 or, for one curve a filter, num_channels={len(given)} and "
                f"channel_dim=-3, got {shrinkage!r}."
            )
        self.shrinkage = shrinkage
        self.log_weight = nn.Parameter(self.filters.new_empty(len(given)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the weight that was given first; filters and shrinkage stay."""
        self.log_weight.copy_(self.log_weight.new_tensor(self.first_weight).log())

    def check(self, y: Tensor, kernel: Tensor) -> None:
        check_blur(y, kernel)
        _check.of_the_network("y", y, self.log_weight)

    def prepare(self, y: Tensor, kernel: Tensor) -> _Prepared:
        y = y / self.data_range
        area = frame(y.shape[-2:], 2 * kernel.shape[-1])
        inside = area.zeros(torch.ones_like(y[..., :1, :, :]))
        variance = noise_variance(y, self.sigma)
        strength = self.log_weight.exp()[:, None, None] * variance.unsqueeze(-1)
        filters = self.filters - self.filters.mean((-2, -1), keepdim=True)  # what is flat stays as it is
        return _Prepared(
            area.reflect(y), inside, transfer(kernel, area.full), transfer(filters, area.full), strength, area
        )

    def init(self, context: _Prepared) -> DeconvolutionState:
        seen = context.seen
        return DeconvolutionState(context.area.crop(seen), seen, seen.new_zeros(()))

    def forward(self, state: DeconvolutionState, context: _Prepared) -> DeconvolutionState:
        seen, inside, K, F, strength, area = context
        beta = self.beta * self.growth**state.k
        X = rfft2(state.full)
        completed = inside * seen + (1 - inside) * irfft2(K * X, s=area.full)
        w = self.shrinkage(irfft2(F * X.unsqueeze(-3), s=area.full), 1 / beta)  # (..., C, n, *frame)
        mu = strength * beta
        prior = (mu * F.conj() * rfft2(w)).sum(-3)
        power = (mu * F.abs().square()).sum(-3)
        full = irfft2((K.conj() * rfft2(completed) + prior) / (K.abs().square() + power), s=area.full)
        return DeconvolutionState(area.crop(full), full, state.k + 1)

    def readout(self, state: DeconvolutionState) -> Tensor:
        return self.data_range * state.image

    def extra_repr(self) -> str:
        sigma = "estimated" if self.sigma is None else f"{self.sigma:g}"
        return (
            f"filters={tuple(self.filters.shape)}, weight={self.first_weight:g}, beta={self.beta:g}, "
            f"growth={self.growth:g}, sigma={sigma}, data_range={self.data_range:g}"
        )


class NonBlindDeconvolution(Unroll):
    r"""$w_i = \mathrm{shrink}(F_i x, 1/\beta),\quad x = (K^*K + \sum_i\mu_i F_i^*F_i)^{-1}
    (K^*\tilde y + \sum_i \mu_i F_i^* w_i),\quad \mu_i = \lambda_i\sigma^2\beta$, then $\beta\leftarrow\gamma\beta$.

    Takes a known blur away, $\min_x \tfrac{1}{2\sigma^2}\|k * x - y\|^2 + \sum_i\lambda_i\sum|F_i x|^p$
    approximately, by half-quadratic splitting: a shrinkage of filter responses and a division of Fourier transforms
    take turns. Untrained it is `solvers.deconvolve`. Each iteration learns its weights $\lambda_i$ and its shrinkage,
    and the filters where they are given as a Parameter.

    Nothing is assumed beyond the border of the image: there $\tilde y$ is the blur of the last x (at first of the
    mirror image), which converges to the solution that uses what was seen only.

    Args:
        num_iters: number of layers K.
        filters: $F_i$, (n, a, b) with odd a and b; the differences of neighbours where not given. A Parameter is
            learned, a Tensor stays as it is. Their mean is taken off, so that flat regions stay flat.
        shrinkage: what makes $F_i x$ smaller, see `unrolled.shrinkage`; `GeneralizedShrinkage(0.8)` where not given.
            For one curve a filter pass `num_channels=n, channel_dim=-3`.
        weight: $\lambda$ to start with, positive, for images in [0, 1].
        beta: $\beta$ in the first layer, positive, for images in [0, 1]. It is not learned.
        growth: $\gamma$, positive.
        sigma: standard deviation of the noise in grey levels of 0..255, positive. Where not given it is estimated for
            each image, from the blurred image's finest diagonal differences, and is at least 0.25.
        data_range: the distance of white from black.
        tied: one layer's parameters for all (`True`), each its own (`False`), or the names of those shared.
        gradient: how gradients flow through the layers, see `unrolled.gradient`.
        stop: when an image stops before the last layer, see `unrolled.Tolerance`.
        device, dtype: of the parameters.

    Shape:
        - y: (..., C, height, width), in [0, data_range], the dtype and device of the parameters
        - kernel: (..., 1, side, side), odd side, sum 1, the batch dimensions of y
        - output: (..., C, height, width), not clipped

    Raises:
        TypeError: an image of integers, a dtype that does not fit, a shrinkage or a strategy of another kind.
        ValueError: a kernel with an even side, larger than the image or with a sum that is not 1; NaN; a wrong shape;
            `sigma <= 0`; another number that is not positive.

    Example:
        >>> from unrolled.solvers.deconvolution import deconvolve
        >>> net = NonBlindDeconvolution(3)
        >>> kernel = torch.full((2, 1, 5, 5), 1 / 25)
        >>> y = torch.rand(2, 3, 24, 32)
        >>> torch.allclose(net(y, kernel), deconvolve(y, kernel, num_iters=3), atol=1e-4)
        True

    Reference:
        D. Krishnan and R. Fergus, "Fast Image Deconvolution using Hyper-Laplacian Priors", NIPS 2009, for the
        splitting; U. Schmidt and S. Roth, "Shrinkage Fields for Effective Image Restoration", CVPR 2014, for learning
        filters and shrinkage of each iteration.
    """

    def __init__(
        self,
        num_iters: int = 20,
        *,
        filters: Tensor | None = None,
        shrinkage: Shrinkage | None = None,
        weight: float = 10.0,
        beta: float = 1.0,
        growth: float = 1.4,
        sigma: float | None = None,
        data_range: float = 1.0,
        tied: bool | Sequence[str] = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = DeconvolutionStep(
            filters=filters,
            shrinkage=shrinkage,
            weight=weight,
            beta=beta,
            growth=growth,
            sigma=sigma,
            data_range=data_range,
            device=device,
            dtype=dtype,
        )
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, kernel: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, kernel, state=state, num_iters=num_iters)

    @classmethod
    def pretrained(
        cls,
        *,
        data_range: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NonBlindDeconvolution:
        """A network of 8 layers, each with 8 filters of 3 x 3 and a curve for each; the weights come along.

        They were trained on synthetic camera shakes of grey photographs with noise of 0.5 to 3 grey levels.

        Args:
            data_range: the distance of white from black.
            device, dtype: of the parameters.
        """
        net = cls(
            8,
            growth=2.0,
            filters=nn.Parameter(torch.zeros(8, 3, 3)),
            shrinkage=GeneralizedShrinkage(0.8, num_channels=8, channel_dim=-3),
            data_range=data_range,
            device=device,
            dtype=dtype,
        )
        net.load_state_dict(_weights.load("deconvolution"))
        return net.eval()


def _filters(filters: Tensor) -> Tensor:
    _check.finite("filters", _check.tensor("filters", filters))
    if filters.dim() != 3 or filters.shape[1] % 2 == 0 or filters.shape[2] % 2 == 0:
        raise ValueError(f"filters must have shape (n, a, b) with odd a and b, got {tuple(filters.shape)}.")
    return filters
