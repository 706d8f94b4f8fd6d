"""Deconvolution of images by half-quadratic splitting: with a known kernel, and blind, from coarse to fine by hand.

Blurs are convolutions as mathematics has them (an impulse becomes the kernel). Images are (..., C, height, width), all
channels under one kernel, kernels (..., 1, side, side) with an odd side, their centre in the middle. What the camera
saw is the part of the blur that no pixel beyond the border of the sharp image is needed for; the rest is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fft import irfft2, rfft2
from torch.nn.functional import interpolate, pad

from unrolled import _check
from unrolled.functional import firm_threshold, generalized_threshold, project_simplex


class Frame(NamedTuple):
    """A larger image around one of height x width: periodic, so that a Fourier transform may be taken."""

    height: int
    width: int
    top: int
    left: int
    full: tuple[int, int]

    def crop(self, image: Tensor) -> Tensor:
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def reflect(self, image: Tensor) -> Tensor:
        """The image, and its mirror image all around."""
        rows = _mirror(self.height, self.top, self.full[0]).to(image.device)
        columns = _mirror(self.width, self.left, self.full[1]).to(image.device)
        return image.index_select(-2, rows).index_select(-1, columns)

    def zeros(self, image: Tensor) -> Tensor:
        """The image, or a part of it that begins at its first pixel, and zeros all around."""
        right = self.full[1] - self.left - image.shape[-1]
        return pad(image, (self.left, right, self.top, self.full[0] - self.top - image.shape[-2]))


def frame(size: Sequence[int], margin: int) -> Frame:
    """The frame that is larger by at least `margin` along both axes and has sizes that Fourier transforms like."""
    height, width = size
    full = _smooth(height + margin), _smooth(width + margin)
    return Frame(height, width, (full[0] - height) // 2, (full[1] - width) // 2, full)


def transfer(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The real Fourier transform of a kernel (..., a, b) with its centre at the origin of an image of this size."""
    a, b = kernel.shape[-2:]
    return rfft2(pad(kernel, (0, size[1] - b, 0, size[0] - a)).roll((-(a // 2), -(b // 2)), (-2, -1)))


def differences(like: Tensor) -> Tensor:
    """Filters (2, 3, 3) whose responses are the differences of neighbours: in a row, and in a column."""
    filters = like.new_zeros(2, 3, 3)
    filters[0, 1, 1] = filters[1, 1, 1] = -1.0
    filters[0, 1, 0] = filters[1, 0, 1] = 1.0
    return filters


def noise_level(image: Tensor) -> Tensor:  # (..., C, height, width) -> (..., 1, 1, 1)
    """The standard deviation of the noise: median of the finest diagonal differences over 0.6745 (Donoho's rule)."""
    even = image[..., : image.shape[-2] // 2 * 2, : image.shape[-1] // 2 * 2]
    a, b = even[..., ::2, ::2] - even[..., ::2, 1::2], even[..., 1::2, ::2] - even[..., 1::2, 1::2]
    return ((a - b).abs() / 2).flatten(-3).median(-1).values[..., None, None, None] / 0.6745


def deconvolve(
    y: Tensor,
    kernel: Tensor,
    *,
    num_iters: int = 20,
    p: float = 0.8,
    weight: float = 10.0,
    beta: float = 1.0,
    growth: float = 1.4,
    sigma: float | None = None,
    data_range: float = 1.0,
) -> Tensor:
    r"""$w = G_{1/\beta, p}(D x),\quad x = (K^*K + \mu D^*D)^{-1}(K^* \tilde y + \mu D^* w),\quad
    \mu = \lambda\sigma^2\beta$, then $\beta \leftarrow \gamma\beta$.

    Half-quadratic splitting for $\min_x \tfrac{1}{2\sigma^2}\|k * x - y\|^2 + \lambda\sum|Dx|^p$, a hyper-Laplacian
    prior on the differences of neighbours. Beyond the border of the image, where nothing was seen, $\tilde y$ is what
    the blur of the last x would show; the first x is the image and its mirror image all around.

    Args:
        y: the blurred image, in [0, data_range].
        kernel: the blur, sum 1.
        num_iters: number of iterations.
        p: the exponent of the prior, from -1 to 1.
        weight: $\lambda > 0$, for images in [0, 1].
        beta: $\beta > 0$ to begin with, for images in [0, 1].
        growth: $\gamma > 0$.
        sigma: standard deviation of the noise in grey levels of 0..255, positive; estimated for each image where not
            given, and at least 0.25.
        data_range: the distance of white from black.

    Shape:
        - y, output: (..., C, height, width)
        - kernel: (..., 1, side, side), side odd

    Raises:
        TypeError, ValueError: an image or a kernel that does not fit, see `check_blur`; numbers out of range.

    Example:
        >>> kernel = torch.full((1, 1, 3, 3), 1 / 9)
        >>> deconvolve(torch.full((1, 1, 16, 16), 0.5), kernel).sub(0.5).abs().max() < 1e-5
        tensor(True)

    Reference:
        D. Krishnan and R. Fergus, "Fast Image Deconvolution using Hyper-Laplacian Priors", NIPS 2009.
    """
    check_blur(y, kernel)
    num_iters = _check.integer("num_iters", num_iters)
    _check.real("p", p, minimum=-1.0)
    for name, value in (("weight", weight), ("beta", beta), ("growth", growth), ("data_range", data_range)):
        _check.real(name, value, above=0.0)
    y = y / data_range
    variance = noise_variance(y, sigma)
    area = frame(y.shape[-2:], 2 * kernel.shape[-1])
    K = transfer(kernel, area.full)
    F = transfer(differences(y), area.full)
    inside = area.zeros(torch.ones_like(y[..., :1, :, :]))
    seen = area.reflect(y)
    X = rfft2(seen)
    for t in range(num_iters):
        b = beta * growth**t
        completed = complete(seen, inside, K, X, area)
        w = generalized_threshold(irfft2(F * X.unsqueeze(-3), s=area.full), 1 / b, p)
        mu = weight * variance * b
        numerator = K.conj() * rfft2(completed) + mu * (F.conj() * rfft2(w)).sum(-3)
        X = numerator / (K.abs().square() + mu * F.abs().square().sum(-3))
    return data_range * area.crop(irfft2(X, s=area.full))


def noise_variance(y: Tensor, sigma: float | None) -> Tensor:
    """The squared noise of images in [0, 1], (..., 1, 1, 1): given in grey levels of 0..255, or estimated."""
    if sigma is not None:
        sigma = _check.real("sigma", sigma, above=0.0, hint="It is in grey levels of 0..255; None estimates it.")
        return y.new_full((1, 1, 1), (sigma / 255) ** 2)
    return noise_level(y).clamp(min=0.25 / 255).square()


class KernelEstimate(NamedTuple):
    """The variables of `kernel_at_scale`, of which `kernel` is the answer."""

    kernel: Tensor  # (..., 1, side, side)
    gradients: Tensor  # (..., 2 C, *frame): horizontal ones, then vertical ones, of the sharp image
    multipliers: Tensor  # (..., 1, *frame)


def kernel_at_scale(y: Tensor, kernel: Tensor, *, num_iters: int = 20) -> Tensor:
    r"""One scale of blind deconvolution with the schedule set by hand, from an image and a first kernel.

    Every iteration t, with $r = t / (T - 1)$, $\lambda = (5 - 4r)\,10^{-5}$ and $p = -1 + 1.5 r$, first makes the
    gradients d of the sharp image from those of the blurred one, g, then the kernel from both:

    $$d = (K^*K + \eta)^{-1}(K^* g + \eta\,G_{\lambda/\eta, p}(d)),\quad \eta = .002, .008, .032,\quad
    d = G_{\lambda/\eta, p}(d)$$

    $$k = \arg\min \|k * d - g\|^2 + \epsilon\|k\|^2,\quad k \ge 0,\ \textstyle\sum k = 1$$

    the latter by five iterations of ADMM from multipliers 0. Entries below 4 % of the largest become 0, entries above
    6 % stay, those between are on a ramp; then the kernel is centred. At first $p < 0$ makes few, sharp edges;
    later p admits detail. Beyond the border of what was seen, g is the blur of the last d.

    Args:
        y: the blurred image in [0, 1].
        kernel: the kernel to begin with.
        num_iters: number of iterations $T$.

    Shape:
        - y: (..., C, height, width)
        - kernel, output: (..., 1, side, side), side odd

    Raises:
        TypeError, ValueError: an image or a kernel that does not fit, see `check_blur`.

    Example:
        >>> y = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 40, 40).round(), 3, 1)
        >>> kernel_at_scale(y, first_kernel(y, 5), num_iters=2).shape
        torch.Size([1, 1, 5, 5])

    Reference:
        W. Zuo, D. Ren, D. Zhang, S. Gu and L. Zhang, "Learning Iteration-wise Generalized Shrinkage-Thresholding
        Operators for Blind Deconvolution", IEEE Transactions on Image Processing 25(4), 2016, for the structure.
    """
    check_blur(y, kernel)
    num_iters = _check.integer("num_iters", num_iters)
    side = kernel.shape[-1]
    area = frame(y.shape[-2:], side)
    seen, inside = seen_gradients(y, area)
    d, multipliers = seen, seen.new_zeros(*seen.shape[:-3], 1, *area.full)
    for t in range(num_iters):
        r = t / max(num_iters - 1, 1)
        weight, p = (5 - 4 * r) * 1e-5, -1 + 1.5 * r
        K = transfer(kernel, area.full)
        g = complete(seen, inside, K, rfft2(d), area)
        KG, power = K.conj() * rfft2(g), K.abs().square()
        d = g
        for eta in (0.002, 0.008, 0.032):
            w = generalized_threshold(d, weight / eta, p)
            d = irfft2((KG + eta * rfft2(w)) / (power + eta), s=area.full)
        d = generalized_threshold(d, weight / 0.032, p)
        D = rfft2(d)
        g = complete(seen, inside, K, D, area)
        kernel, multipliers = fitted_kernel(kernel, multipliers, D, rfft2(g), area, 0.01, 0.1, 0.05, 0.0)
    return kernel


def complete(seen: Tensor, inside: Tensor, K: Tensor, D: Tensor, area: Frame) -> Tensor:
    """What was seen, and beyond the border what the blur of the last estimate would show."""
    return inside * seen + (1 - inside) * irfft2(K * D, s=area.full)


def seen_gradients(y: Tensor, area: Frame) -> tuple[Tensor, Tensor]:
    """Differences of neighbours in a frame, (..., 2 C, *frame), and where they were seen, 0 or 1, of the same shape."""
    across, down = y[..., :, 1:] - y[..., :, :-1], y[..., 1:, :] - y[..., :-1, :]
    seen = torch.cat([area.zeros(part) for part in (across, down)], -3)
    return seen, torch.cat([area.zeros(torch.ones_like(part)) for part in (across, down)], -3)


def fitted_kernel(
    kernel: Tensor,  # (..., 1, side, side)
    multipliers: Tensor,  # (..., 1, *frame)
    D: Tensor,  # transforms of the sharp gradients, (..., 2 C, ...)
    G: Tensor,  # transforms of the blurred ones
    area: Frame,
    ridge: float | Tensor,
    penalty: float | Tensor,
    cut: float | Tensor,
    keep: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The kernel on the simplex that makes the blurred gradients of the sharp ones, by ADMM, and its multipliers.

    `ridge` and `penalty` are in units of the mean power of the sharp gradients, `cut`, where entries are set to 0, of
    the kernel's largest entry; `keep` is how much of the multipliers of the last iteration is left.
    """
    side = kernel.shape[-1]
    half = side // 2
    power = D.abs().square().sum(-3, keepdim=True)
    match = (D.conj() * G).sum(-3, keepdim=True)
    # The mean over all frequencies is the first entry of the autocorrelation, which is the sum of squares. Where the
    # threshold left no gradient at all, the kernel stays as it is.
    energy = irfft2(power, s=area.full)[..., :1, :1]
    blank = energy <= torch.finfo(energy.dtype).tiny
    energy = torch.where(blank, 1.0, energy)
    before, u = kernel, keep * multipliers
    for _ in range(5):
        z = _wrapped(kernel, area.full)
        free = irfft2((match + penalty * energy * rfft2(z - u)) / (power + (ridge + penalty) * energy), s=area.full)
        inner = (free + u).roll((half, half), (-2, -1))[..., :side, :side]
        kernel = project_simplex(inner.flatten(-2)).unflatten(-1, (side, side))
        u = u + free - _wrapped(kernel, area.full)
    top = kernel.amax((-2, -1), keepdim=True)
    kernel = firm_threshold(kernel, 0.8 * cut * top, 1.2 * cut * top)
    kernel = centred(kernel / kernel.sum((-2, -1), keepdim=True))
    return torch.where(blank, before, kernel), torch.where(blank, multipliers, u)


def centred(kernel: Tensor) -> Tensor:
    """The kernel moved by whole pixels so that its centre of mass is in the middle, as far as nothing is cut off."""
    side = kernel.shape[-1]
    place = torch.arange(side, device=kernel.device)
    mass = kernel.detach().clamp(min=0)
    for dim, other in ((-2, -1), (-1, -2)):
        along = mass.sum(other)  # (..., side)
        wanted = ((along * (place - side // 2)).sum(-1) / along.sum(-1)).round().long()
        first = torch.where(along > 0, place, side).amin(-1)  # as many empty lines before, and side - 1 - last after
        last = torch.where(along > 0, place, -1).amax(-1)
        by = torch.minimum(torch.maximum(wanted, last - side + 1), first)
        index = (place + by[..., None]).remainder(side)
        index = index.unsqueeze(-1) if dim == -2 else index.unsqueeze(-2)
        kernel = kernel.gather(dim, index.expand(kernel.shape))
    return kernel


def first_kernel(y: Tensor, side: int) -> Tensor:
    """Two equal taps side by side, for each image of a batch, (..., 1, side, side)."""
    kernel = y.new_zeros(*y.shape[:-3], 1, side, side)
    kernel[..., side // 2, side // 2 : side // 2 + 2] = 0.5
    return kernel


def scales(kernel_size: int) -> list[int]:
    """The sides of the kernel from coarse to fine, odd, each about 1.4 times the one before, from 5 on (or 3)."""
    sides = [kernel_size]
    while sides[-1] > 5:
        smaller = 2 * round((sides[-1] / 2**0.5 - 1) / 2) + 1
        sides.append(max(5, min(smaller, sides[-1] - 2)))
    return sides[::-1]


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Cubic interpolation, without aliasing where the image becomes smaller."""
    if tuple(image.shape[-2:]) == size:
        return image
    flat = image.reshape(-1, 1, *image.shape[-2:])
    return interpolate(flat, size=size, mode="bicubic", antialias=True).reshape(*image.shape[:-2], *size)


def enlarged(kernel: Tensor, side: int) -> Tensor:
    """The kernel of the next finer scale to begin with."""
    kernel = resized(kernel, (side, side)).clamp(min=0)
    return kernel / kernel.sum((-2, -1), keepdim=True)


def estimate_kernel(y: Tensor, kernel_size: int, *, num_iters: int = 20, data_range: float = 1.0) -> Tensor:
    r"""The blur of an image, from coarse to fine: `kernel_at_scale` on ever larger versions of the image.

    Args:
        y: the blurred image, in [0, data_range].
        kernel_size: an upper bound of the kernel's side, odd, at least 3. A tight one gives the best kernel.
        num_iters: number of iterations at each scale.
        data_range: the distance of white from black.

    Shape:
        - y: (..., C, height, width)
        - output: (..., 1, kernel_size, kernel_size), non-negative, sum 1, centred as far as its size allows

    Raises:
        TypeError, ValueError: no floating point image, NaN, a kernel size that is even or larger than the image.

    Example:
        >>> y = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 40, 40).round(), 3, 1)
        >>> estimate_kernel(y, 5, num_iters=2).sum()
        tensor(1.)
    """
    check_image(y)
    check_kernel_size(kernel_size, y)
    y = y / _check.real("data_range", data_range, above=0.0)
    kernel = None
    for side in scales(kernel_size):
        small = resized(y, scaled_size(y, side, kernel_size))
        kernel = first_kernel(small, side) if kernel is None else enlarged(kernel, side)
        kernel = kernel_at_scale(small, kernel, num_iters=num_iters)
    assert kernel is not None
    return kernel


def scaled_size(y: Tensor, side: int, kernel_size: int) -> tuple[int, int]:
    """The size of an image at the scale where a kernel of kernel_size has this side."""
    height, width = y.shape[-2:]
    return max(side, round(height * side / kernel_size)), max(side, round(width * side / kernel_size))


def check_image(y: Tensor, name: str = "y") -> None:
    """Refuse what is no image: integers, less than (C, height, width), NaN."""
    if isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex():
        raise TypeError(
            f"{name} must be floating point, got {y.dtype}. Convert it to its range: {name}.float() / 255 for 8 bits."
        )
    _check.tensor(name, y)
    if y.dim() < 3:
        raise ValueError(
            f"{name} must have shape (..., C, height, width), got {tuple(y.shape)}. For one grey image take "
            f"{name}[None, None]."
        )
    _check.finite(name, y)


def check_kernel_size(size: int, y: Tensor) -> None:
    """Refuse an even side, and one that is larger than the image."""
    _check.integer("kernel_size", size, minimum=3)
    if size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the kernel has a centre, got {size}. Take {size + 1}.")
    if size > min(y.shape[-2:]):
        raise ValueError(f"kernel_size is {size}, larger than y with its {y.shape[-2]} x {y.shape[-1]} pixels.")


def check_blur(y: Tensor, kernel: Tensor) -> None:
    """Refuse an image and a kernel that do not fit each other, and a kernel whose sum is not 1."""
    check_image(y)
    _check.tensor("kernel", kernel)
    if kernel.dim() < 3 or kernel.shape[-3] != 1 or kernel.shape[-2] != kernel.shape[-1]:
        raise ValueError(
            f"kernel must have shape (..., 1, side, side), one for all channels, got {tuple(kernel.shape)}. Pad it "
            "with zeros to a square."
        )
    if kernel.shape[-1] % 2 == 0:
        raise ValueError(f"kernel must have an odd side, so that it has a centre, got {kernel.shape[-1]}. Pad it.")
    if kernel.shape[-1] > min(y.shape[-2:]):
        raise ValueError(f"kernel {tuple(kernel.shape)} is larger than y, {tuple(y.shape)}. Crop its zeros.")
    if kernel.shape[:-3] != y.shape[:-3]:
        raise ValueError(
            f"kernel must have the batch dimensions of y, {tuple(y.shape[:-3])}, got {tuple(kernel.shape[:-3])}. Use "
            "kernel.expand(...)."
        )
    if kernel.dtype != y.dtype:
        raise TypeError(f"kernel is {kernel.dtype} but y is {y.dtype}. Convert one with .to(...).")
    if kernel.device != y.device:
        raise ValueError(f"kernel is on {kernel.device} but y is on {y.device}. Move one with .to(...).")
    _check.finite("kernel", kernel)
    if _check.can_look_at(kernel):
        worst = (kernel.detach().sum((-2, -1)) - 1).abs().max().item()
        if worst > 1e-2:
            raise ValueError(f"kernel must sum to 1, its sum is off by {worst:.3g}. Divide it by its sum.")


def _wrapped(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The kernel in an image of zeros, with its centre at the origin."""
    side = kernel.shape[-1]
    return pad(kernel, (0, size[1] - side, 0, size[0] - side)).roll((-(side // 2), -(side // 2)), (-2, -1))


def _mirror(size: int, before: int, full: int) -> Tensor:
    """Which entry of an axis each entry of the frame shows."""
    place = (torch.arange(full) - before).remainder(max(2 * size - 2, 1))
    return torch.minimum(place, 2 * size - 2 - place)


def _smooth(size: int) -> int:
    """The next even number without prime factors above 5."""
    size += size % 2
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2
