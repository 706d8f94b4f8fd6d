"""Blind deconvolution by hand: the kernel of a blur, from coarse to fine, and with it the image.

Images are (..., C, height, width), all channels under one kernel, kernels (..., 1, side, side) with an odd side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fft import irfft2, rfft2
from torch.nn.functional import interpolate, max_pool2d, pad

from unrolled import _check
from unrolled.functional import firm_threshold, generalized_threshold, project_simplex
from unrolled.solvers.deconvolution import Frame, check_blur, check_image, complete, differences, frame, transfer

HALVINGS = 10  # half-quadratic steps in an iteration
SPARE = 0.02  # the share of a kernel that may be lost at either end when it is centred
SPECK = 0.05  # the least share of a part of a kernel that hangs together


def kernel_at_scale(y: Tensor, kernel: Tensor, *, num_iters: int = 8) -> Tensor:
    r"""One scale of blind deconvolution with the schedule set by hand, from an image and a first kernel.

    Every iteration t, with $r = t / (T - 1)$, $\lambda = 0.004 \cdot 4^{-r}$ and $p = -0.2 + 0.4 r$, first makes a
    sharp image of few edges by half-quadratic splitting, with $\beta = 2\lambda \cdot 2.5^j$ for $j = 0, \dots, 9$:

    $$w = G_{\lambda/\beta, p}(D x),\quad x = (K^*K + \beta D^*D)^{-1}(K^*\tilde y + \beta D^* w),$$

    then the kernel from the gradients d that are left of it, and those of the blurred image within reach of them:

    $$d = G_{\lambda/\beta, p}(D x),\quad k = \arg\min \|k * d - D y\|^2 + \epsilon\|k\|^2,\quad
    k \ge 0,\ \textstyle\sum k = 1$$

    G shrinks the lengths of gradients, not their two components. The kernel comes from five iterations of ADMM from
    multipliers 0. Entries below 4 % of the largest become 0, entries above 6 % stay, those between are on a ramp. Parts
    that hang together and hold less than 5 % go; then it is moved to the middle of its window. At first $p < 0$ makes
    edges sharper than they are and a large $\lambda$ leaves few; later both admit detail. Beyond the border of what was
    seen, y is the blur of the last x.

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
        Operators for Blind Deconvolution", IEEE Transactions on Image Processing 25(4), 2016, for shrinkage by
        iteration; L. Xu, S. Zheng and J. Jia, "Unnatural L0 Sparse Representation for Natural Image Deblurring", CVPR
        2013, for the image of few edges.
    """
    check_blur(y, kernel)
    num_iters = _check.integer("num_iters", num_iters)
    area = frame(y.shape[-2:], 2 * kernel.shape[-1])
    seen, inside = area.reflect(y), area.zeros(torch.ones_like(y[..., :1, :, :]))
    slopes, sloped = seen_gradients(y, area)
    F = transfer(differences(y), area.full)
    roughness = F.abs().square().sum(-3)
    multipliers = torch.zeros_like(seen[..., :1, :, :])
    X = rfft2(seen)
    for t in range(num_iters):
        r = t / max(num_iters - 1, 1)
        weight, p = 0.004 * 4**-r, -0.2 + 0.4 * r
        K = transfer(kernel, area.full)
        KY, power = K.conj() * rfft2(complete(seen, inside, K, X, area)), K.abs().square()
        for j in range(HALVINGS):
            beta = 2 * weight * 2.5**j
            w = shrunk_gradients(X, F, area, weight / beta, p)
            X = (KY + beta * divergence(w, F)) / (power + beta * roughness)
        d = shrunk_gradients(X, F, area, weight / beta, p).flatten(-4, -3)
        D = rfft2(d)
        g = complete(slopes, sloped * reach(d, kernel.shape[-1]), K, D, area)
        kernel, _ = fitted_kernel(kernel, multipliers, D, rfft2(g), area, 0.01, 0.1, 0.05, 0.0)
    return kernel


def shrunk_gradients(X: Tensor, F: Tensor, area: Frame, threshold: float | Tensor, p: float | Tensor) -> Tensor:
    """The differences of neighbours, (..., C, 2, *frame), in a row and in a column, with lengths that have shrunk."""
    d = irfft2(F * X.unsqueeze(-3), s=area.full)
    # On real numbers: lengths and directions of complex ones take twice the time. The root has no slope at 0.
    lengths = d.square().sum(-3).clamp(min=torch.finfo(d.dtype).tiny).sqrt()
    return d * (generalized_threshold(lengths, threshold, p) / lengths).unsqueeze(-3)


def divergence(w: Tensor, F: Tensor) -> Tensor:
    """The transform of the adjoint of the differences of neighbours."""
    return (F.conj() * rfft2(w)).sum(-3)


def seen_gradients(y: Tensor, area: Frame) -> tuple[Tensor, Tensor]:
    """Differences of neighbours in a frame, (..., 2 C, *frame), and where they were seen, 0 or 1, of the same shape."""
    parts = y[..., :, 1:] - y[..., :, :-1], y[..., 1:, :] - y[..., :-1, :]
    seen = torch.stack([area.zeros(part) for part in parts], -3)
    sloped = torch.stack([area.zeros(torch.ones_like(part)) for part in parts], -3)
    return seen.flatten(-4, -3), sloped.flatten(-4, -3)


def reach(d: Tensor, side: int) -> Tensor:
    """1 where a kernel of this side brings anything of the gradients d (..., 2 C, *frame), else 0: (..., 1, *frame).

    Blurred gradients elsewhere are those of weak edges and texture, which d has left out, and say nothing about the
    kernel.
    """
    left = (d != 0).any(-3, keepdim=True).to(d.dtype)
    flat = left.reshape(-1, 1, *left.shape[-2:])
    flat = max_pool2d(max_pool2d(flat, (side, 1), 1, (side // 2, 0)), (1, side), 1, (0, side // 2))
    return flat.reshape(left.shape)


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
    level: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """The kernel on the simplex that makes the blurred gradients of the sharp ones, by ADMM, and its multipliers.

    `ridge` and `penalty` are in units of the mean power of the sharp gradients, `cut`, where entries are set to 0, of
    the kernel's largest entry; `keep` is how much of the multipliers of the last iteration is left; `level` weighs the
    frequencies of the misfit.
    """
    side = kernel.shape[-1]
    half = side // 2
    power = level * D.abs().square().sum(-3, keepdim=True)
    match = level * (D.conj() * G).sum(-3, keepdim=True)
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
    kernel = centred(without_specks(kernel))
    return torch.where(blank, before, kernel), torch.where(blank, multipliers, u)


def without_specks(kernel: Tensor) -> Tensor:
    """The kernel without those of its parts that hold less than 5 %; parts touch at edges or corners. Its sum is 1.

    A camera moves on a line without gaps. What lies apart from it is noise.
    """
    side = kernel.shape[-1]
    on = (kernel > 0).to(kernel.dtype)
    flat = on.reshape(-1, 1, side, side)
    # Each part takes the largest of the numbers of its entries, which spreads from neighbour to neighbour.
    number = torch.arange(1, side * side + 1, dtype=kernel.dtype, device=kernel.device).reshape(side, side) * flat
    for _ in range(2 * side):
        number = max_pool2d(number, 3, 1, 1) * flat
    part = number.reshape(on.shape).flatten(-2).long()
    entries = kernel.detach().flatten(-2)
    whole = entries.new_zeros(*entries.shape[:-1], side * side + 1).scatter_add(-1, part, entries)
    mass = whole.gather(-1, part)
    least = (SPECK * entries.sum(-1, keepdim=True)).minimum(mass.amax(-1, keepdim=True))
    kernel = kernel * (mass >= least).unflatten(-1, (side, side))
    return kernel / kernel.sum((-2, -1), keepdim=True)


def centred(kernel: Tensor) -> Tensor:
    """The kernel moved by whole pixels so that as many empty lines are on either side; its sum is 1.

    Lines at the ends that hold 2 % of it at most count as empty, and are lost where they move out of the window. It is
    not the centre of mass that is put in the middle: a camera that rests for a while draws a bright spot at one end of
    a long thin line, and the line would not have room.
    """
    side = kernel.shape[-1]
    place = torch.arange(side, device=kernel.device)
    for dim, other in ((-2, -1), (-1, -2)):
        along = kernel.detach().sum(other)  # (..., side)
        share = along.cumsum(-1) / along.sum(-1, keepdim=True)
        first, last = (share <= SPARE).sum(-1), (share < 1 - SPARE).sum(-1)
        by = torch.div(first + last - (side - 1), 2, rounding_mode="trunc")
        index = place + by[..., None]
        index, inside = index.remainder(side), (index >= 0) & (index < side)
        index, inside = (x.unsqueeze(-1 if dim == -2 else -2) for x in (index, inside))
        kernel = kernel.gather(dim, index.expand(kernel.shape)) * inside
    return kernel / kernel.sum((-2, -1), keepdim=True)


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


def estimate_kernel(y: Tensor, kernel_size: int, *, num_iters: int = 8, data_range: float = 1.0) -> Tensor:
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


def check_kernel_size(size: int, y: Tensor) -> None:
    """Refuse an even side, and one that is larger than the image."""
    _check.integer("kernel_size", size, minimum=3)
    if size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the kernel has a centre, got {size}. Take {size + 1}.")
    if size > min(y.shape[-2:]):
        raise ValueError(f"kernel_size is {size}, larger than y with its {y.shape[-2]} x {y.shape[-1]} pixels.")


def _wrapped(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The kernel in an image of zeros, with its centre at the origin."""
    side = kernel.shape[-1]
    return pad(kernel, (0, size[1] - side, 0, size[0] - side)).roll((-(side // 2), -(side // 2)), (-2, -1))
