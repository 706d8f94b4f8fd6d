"""Deconvolution of images with a known kernel, by half-quadratic splitting.

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
from torch.nn.functional import pad

from unrolled import _check
from unrolled.functional import generalized_threshold


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


def complete(seen: Tensor, inside: Tensor, K: Tensor, D: Tensor, area: Frame) -> Tensor:
    """What was seen, and beyond the border what the blur of the last estimate would show."""
    return inside * seen + (1 - inside) * irfft2(K * D, s=area.full)


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
