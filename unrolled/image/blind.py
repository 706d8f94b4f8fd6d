"""Blind deconvolution: kernel and image from coarse to fine, with exponents and weights learned for every iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fft import irfft2, rfft2

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.image import _weights
from unrolled.image.deconvolution import NonBlindDeconvolution
from unrolled.shrinkage import GeneralizedShrinkage
from unrolled.shrinkage.generalized import folded
from unrolled.solvers.blind_deconvolution import (
    HALVINGS,
    check_kernel_size,
    divergence,
    enlarged,
    first_kernel,
    fitted_kernel,
    reach,
    resized,
    scaled_size,
    scales,
    seen_gradients,
    shrunk_gradients,
)
from unrolled.solvers.deconvolution import Frame, check_blur, check_image, complete, differences, frame, transfer
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll

START, GROWTH, SELECT = 2.0, 2.5, 1.0
RIDGE, PENALTY, CUT = 0.01, 0.1, 0.05


class KernelState(NamedTuple):
    """The kernel, the image of few edges, the multipliers of the kernel's constraints, and a counter."""

    kernel: Tensor  # (..., 1, side, side), on the simplex
    image: Tensor  # (..., C, *frame)
    multipliers: Tensor  # (..., 1, *frame)
    k: Tensor  # ()


class _Prepared(NamedTuple):
    kernel: Tensor  # the first one
    seen: Tensor  # the blurred image and its mirror image all around, (..., C, *frame)
    inside: Tensor  # where it was seen, 0 or 1
    slopes: Tensor  # its gradients, (..., 2 C, *frame): those along rows, then those along columns
    sloped: Tensor  # where they were seen, 0 or 1
    F: Tensor  # transforms of the two differences
    roughness: Tensor  # their powers together
    area: Frame


class KernelStep(Step):
    r"""$w = G_{\lambda/\beta_j, p}(Dx),\ x = (K^*K + \beta_j D^*D)^{-1}(K^*y + \beta_j D^*w)$, ten times, then
    $k = \arg\min_{k \in \Delta}\|L(k * d - Dy)\|^2 + \epsilon\|k\|^2,\ d = G_{s\lambda/\beta, p}(Dx)$.

    One iteration of `solvers.kernel_at_scale`, with what that sets by hand as parameters. In iteration t of a
    schedule of T, with $r = \min(t / (T - 1), 1)$: $\lambda = 4^{-r}\lambda_0$ and $p = p_0 + 0.4 r$, folded back at
    1 and -1; $\beta_j = b\lambda\gamma^j$. An untied network learns a $\lambda_0$ and a $p_0$ for each iteration, which
    is the same as learning $\lambda$ and $p$. For a kernel with a side of n, $\lambda$ is $(n / 10)^{-c}$ and
    $\epsilon$ is $(n / 10)^q$ times as large; by hand c and q are 0. The power of $L$ is $(|D|^2 / 4 + 0.05)^{-a}$:
    with $a = 0$, by hand, gradients are compared, with 1 nearly images. The multipliers of the kernel's ADMM start at 0
    in every iteration; how much of the last ones to keep, from -1 to 1, is learned, too.

    Args:
        schedule: T.
        device, dtype: of the parameters.
    """

    event_dim = 3

    def __init__(
        self, schedule: int = 8, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.schedule = _check.integer("schedule", schedule)
        self.shrinkage = GeneralizedShrinkage(-0.2, 0.004, device=device, dtype=dtype)
        like = self.shrinkage.log_weight
        self.log_start = nn.Parameter(like.new_empty(()))
        self.log_growth = nn.Parameter(like.new_empty(()))
        self.log_select = nn.Parameter(like.new_empty(()))
        self.log_ridge = nn.Parameter(like.new_empty(()))
        self.log_penalty = nn.Parameter(like.new_empty(()))
        self.logit_cut = nn.Parameter(like.new_empty(()))
        self.raw_keep = nn.Parameter(like.new_empty(()))
        self.raw_coarse = nn.Parameter(like.new_empty(()))
        self.raw_fine = nn.Parameter(like.new_empty(()))
        self.raw_level = nn.Parameter(like.new_empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the schedule set by hand."""
        self.shrinkage.reset_parameters()
        for parameter, value in (
            (self.log_start, START),
            (self.log_growth, GROWTH),
            (self.log_select, SELECT),
            (self.log_ridge, RIDGE),
            (self.log_penalty, PENALTY),
        ):
            parameter.copy_(parameter.new_tensor(value).log())
        self.logit_cut.copy_(self.logit_cut.new_tensor(CUT).logit())
        for parameter in (self.raw_keep, self.raw_coarse, self.raw_fine, self.raw_level):
            parameter.zero_()

    def exponent(self, k: Tensor) -> Tensor:
        """p in iteration k, (1,)."""
        return folded(self.shrinkage.raw_p + 0.4 * self._progress(k))

    def weight(self, k: Tensor, side: int = 10) -> Tensor:
        """lambda in iteration k for a kernel of this side, (1,)."""
        return self.shrinkage.weight * 4 ** -self._progress(k) * (side / 10) ** -self.raw_coarse

    def ridge(self, side: int) -> Tensor:
        """epsilon for a kernel of this side, in units of the mean power of the gradients, ()."""
        return self.log_ridge.exp() * (side / 10) ** self.raw_fine

    def _progress(self, k: Tensor) -> Tensor:
        return (k / max(self.schedule - 1, 1)).clamp(max=1)

    def check(self, y: Tensor, kernel: Tensor) -> None:
        check_blur(y, kernel)
        _check.of_the_network("y", y, self.log_ridge)

    def prepare(self, y: Tensor, kernel: Tensor) -> _Prepared:
        area = frame(y.shape[-2:], 2 * kernel.shape[-1])
        inside = area.zeros(torch.ones_like(y[..., :1, :, :]))
        F = transfer(differences(y), area.full)
        roughness = F.abs().square().sum(-3)
        return _Prepared(kernel, area.reflect(y), inside, *seen_gradients(y, area), F, roughness, area)

    def init(self, context: _Prepared) -> KernelState:
        seen = context.seen
        return KernelState(context.kernel, seen, torch.zeros_like(seen[..., :1, :, :]), seen.new_zeros(()))

    def forward(self, state: KernelState, context: _Prepared) -> KernelState:
        _, seen, inside, slopes, sloped, F, roughness, area = context
        side = state.kernel.shape[-1]
        weight, p = self.weight(state.k, side), self.exponent(state.k)
        K, X = transfer(state.kernel, area.full), rfft2(state.image)
        KY, power = K.conj() * rfft2(complete(seen, inside, K, X, area)), K.abs().square()
        beta = self.log_start.exp() * weight
        for j in range(HALVINGS):
            beta = beta * self.log_growth.exp() if j else beta
            w = shrunk_gradients(X, F, area, weight / beta, p)
            X = (KY + beta * divergence(w, F)) / (power + beta * roughness)
        d = shrunk_gradients(X, F, area, self.log_select.exp() * weight / beta, p).flatten(-4, -3)
        D = rfft2(d)
        sloped = sloped * reach(d, side)
        kernel, multipliers = fitted_kernel(
            state.kernel,
            state.multipliers,
            D,
            rfft2(complete(slopes, sloped, K, D, area)),
            area,
            self.ridge(side),
            self.log_penalty.exp(),
            self.logit_cut.sigmoid(),
            self.raw_keep.tanh(),
            (roughness / 4 + 0.05) ** -self.raw_level,
        )
        return KernelState(kernel, irfft2(X, s=area.full), multipliers, state.k + 1)

    def readout(self, state: KernelState) -> Tensor:
        return state.kernel

    def extra_repr(self) -> str:
        return f"schedule={self.schedule}"


class KernelEstimation(Unroll):
    r"""$x = (K^*K + \beta_{tj} D^*D)^{-1}(K^*y + \beta_{tj} D^*G_{\lambda_t/\beta_{tj}, p_t}(Dx)),\quad
    k = \arg\min_{k\in\Delta}\|L_t(k * d - Dy)\|^2 + \epsilon_t\|k\|^2$: the blur of an image at one scale.

    Finds the kernel on the simplex $\Delta$ (no negative entry, sum 1) from the gradients Dy of a blurred image and
    those, d, of a sharp image of few edges. The exponent $p_t$ and the weight $\lambda_t$ of each iteration are
    parameters, beside $\beta$, $\epsilon$, L and what the kernel's ADMM needs. Untrained it is
    `solvers.kernel_at_scale`. `BlindDeconvolution` runs it from coarse to fine.

    Args:
        num_iters: number of iterations T.
        tied: each iteration its own parameters (`False`); `True`: one set, with the hand-made schedule on top.
        gradient: how gradients flow through the iterations, see `unrolled.gradient`.
        stop: when an image stops before the last iteration, see `unrolled.Tolerance`.
        device, dtype: of the parameters.

    Shape:
        - y: (..., C, height, width), in [0, 1]; all channels under one kernel
        - kernel: (..., 1, side, side), the first kernel, odd side, sum 1, the batch dimensions of y
        - output: (..., 1, side, side), centred as far as its size allows

    Raises:
        TypeError: an image of integers, a dtype that does not fit, a strategy of another kind.
        ValueError: a kernel with an even side, larger than the image or with a sum that is not 1; NaN; a wrong shape.

    Example:
        >>> net = KernelEstimation(num_iters=2)
        >>> start = torch.zeros(2, 1, 5, 5)
        >>> start[..., 2, 2:4] = 0.5
        >>> net(torch.rand(2, 1, 32, 32), start).sum((-2, -1)).flatten().detach()
        tensor([1., 1.])

    Reference:
        W. Zuo, D. Ren, D. Zhang, S. Gu and L. Zhang, "Learning Iteration-wise Generalized Shrinkage-Thresholding
        Operators for Blind Deconvolution", IEEE Transactions on Image Processing 25(4), 2016, for the structure.
    """

    def __init__(
        self,
        num_iters: int = 8,
        *,
        tied: bool | Sequence[str] = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        schedule = _check.integer("num_iters", num_iters)
        step = KernelStep(schedule, device=device, dtype=dtype)
        super().__init__(step, schedule, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, y: Tensor, kernel: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(y, kernel, state=state, num_iters=num_iters)

    @torch.no_grad()
    def learned_schedule(self) -> tuple[list[float], list[float]]:
        r"""The exponents $p_t$ and the weights $\lambda_t$ of all iterations, these for kernels of 10 x 10 pixels."""
        steps = [cast(KernelStep, self[t]) for t in range(len(self))]
        numbers = torch.arange(len(self), device=steps[0].log_ridge.device)
        pairs = [(step.exponent(t), step.weight(t)) for step, t in zip(steps, numbers, strict=True)]
        return [float(p) for p, _ in pairs], [float(weight) for _, weight in pairs]


class Deblurred(NamedTuple):
    """What `BlindDeconvolution` found."""

    image: Tensor  # (..., C, height, width), not clipped
    kernel: Tensor  # (..., 1, kernel_size, kernel_size)


class BlindDeconvolution(nn.Module):
    r"""$\hat k = $ `KernelEstimation` from coarse to fine, $\hat x = $ `NonBlindDeconvolution`$(y, \hat k)$.

    Sharpens an image whose blur is not known. The kernel is found on a small version of the image first, where it has
    5 x 5 pixels, and from there on versions that are larger by about $\sqrt2$ each, always with the same iterations.
    Untrained it is `solvers.estimate_kernel` with `solvers.deconvolve`.

    Args:
        kernel_estimation: the iterations at each scale; `KernelEstimation()` where not given.
        deconvolution: what restores the image with the kernel; `NonBlindDeconvolution()` where not given.
        data_range: the distance of white from black; `deconvolution` must have the same.

    Shape:
        - y: (..., C, height, width), in [0, data_range], the dtype and device of the parameters
        - output: `Deblurred(image, kernel)`

    Raises:
        TypeError: an image of integers, a part that is no network of its kind.
        ValueError: a kernel size that is even or larger than the image, NaN, a wrong shape, data ranges that differ.

    Example:
        >>> net = BlindDeconvolution(KernelEstimation(2), NonBlindDeconvolution(2))
        >>> image, kernel = net(torch.rand(1, 1, 40, 40), kernel_size=7)
        >>> image.shape, kernel.shape
        (torch.Size([1, 1, 40, 40]), torch.Size([1, 1, 7, 7]))

    Reference:
        W. Zuo, D. Ren, D. Zhang, S. Gu and L. Zhang, "Learning Iteration-wise Generalized Shrinkage-Thresholding
        Operators for Blind Deconvolution", IEEE Transactions on Image Processing 25(4), 2016, for the structure.
    """

    def __init__(
        self,
        kernel_estimation: KernelEstimation | None = None,
        deconvolution: NonBlindDeconvolution | None = None,
        *,
        data_range: float = 1.0,
    ) -> None:
        super().__init__()
        self.data_range = _check.real("data_range", data_range, above=0.0)
        estimation = KernelEstimation() if kernel_estimation is None else kernel_estimation
        tail = NonBlindDeconvolution(data_range=self.data_range) if deconvolution is None else deconvolution
        for name, part, kind in (
            ("kernel_estimation", estimation, KernelEstimation),
            ("deconvolution", tail, NonBlindDeconvolution),
        ):
            if not isinstance(part, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {part!r}.")
        if tail[0].data_range != self.data_range:
            raise ValueError(
                f"data_range is {data_range:g} but that of deconvolution is {tail[0].data_range}. Give both the same."
            )
        self.kernel_estimation = estimation
        self.deconvolution = tail

    def forward(self, y: Tensor, kernel_size: int = 25) -> Deblurred:
        """The sharp image and the kernel.

        Args:
            y: the blurred image.
            kernel_size: an upper bound of the kernel's side, odd, at least 3. A tight one gives the best kernel.
        """
        kernel = self.kernels(y, kernel_size)[-1]
        return Deblurred(self.deconvolution(y, kernel), kernel)

    def kernels(self, y: Tensor, kernel_size: int) -> list[Tensor]:
        """The kernel of every scale, from coarse to fine, the last one as large as asked for.

        No gradient flows from one scale to the one before: each is trained by what it makes of the kernel it is given.

        Args:
            y: the blurred image.
            kernel_size: as in a call.
        """
        check_image(y)
        check_kernel_size(kernel_size, y)
        y = y / self.data_range
        kernels: list[Tensor] = []
        for side in scales(kernel_size):
            small = resized(y, scaled_size(y, side, kernel_size))
            start = enlarged(kernels[-1].detach(), side) if kernels else first_kernel(small, side)
            kernels.append(self.kernel_estimation(small, start))
        return kernels

    def extra_repr(self) -> str:
        return f"data_range={self.data_range:g}"

    @classmethod
    def pretrained(
        cls,
        *,
        data_range: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BlindDeconvolution:
        """With a learned schedule and `NonBlindDeconvolution.pretrained()`; the weights come along.

        They were trained on synthetic camera shakes of grey photographs, with kernels of 7 to 27 pixels and noise of
        0.5 to 2 grey levels.

        Args:
            data_range: the distance of white from black.
            device, dtype: of the parameters.
        """
        estimation = KernelEstimation(device=device, dtype=dtype)
        estimation.load_state_dict(_weights.load("blind"))
        tail = NonBlindDeconvolution.pretrained(data_range=data_range, device=device, dtype=dtype)
        return cls(estimation, tail, data_range=data_range).eval()
