"""How good a restored image is: PSNR, SSIM, and the error ratio of deblurring, which forgives a shift.

All are computed in float64 and give one figure an image: average them with `.mean()`, and say so, as the PSNR of the
mean error is another figure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unrolled import _check


def psnr(found: Tensor, true: Tensor, *, data_range: float = 1.0) -> Tensor:
    r"""$10 \log_{10}(R^2 / \overline{(\hat u - u)^2})$ in dB: the peak signal-to-noise ratio of each image.

    Nothing is clipped: by custom restored images are, `found.clamp(0, data_range)`, before this is taken.

    Args:
        found: restored images $\hat u$.
        true: the images $u$.
        data_range: $R$, the distance of white from black, 1 or 255 as a rule.

    Shape:
        - found, true: (..., C, height, width), the same
        - output: (...), float64; infinity where an image is exact

    Raises:
        TypeError: no floating point tensors: for 8-bit images pass `image.double()` and `data_range=255`.
        ValueError: shapes that differ, less than three dimensions, NaN or infinity, `data_range <= 0`.

    Example:
        >>> psnr(torch.full((2, 1, 8, 8), 0.6), torch.full((2, 1, 8, 8), 0.5))
        tensor([20.0000, 20.0000], dtype=torch.float64)
    """
    found, true, peak = _images(found, true, data_range)
    return 20 * torch.log10(peak / (found - true).square().mean((-3, -2, -1)).sqrt())


def ssim(found: Tensor, true: Tensor, *, data_range: float = 1.0) -> Tensor:
    r"""Mean of $\frac{(2\mu\hat\mu + c_1)(2\rho + c_2)}{(\mu^2 + \hat\mu^2 + c_1)(\sigma^2 + \hat\sigma^2 + c_2)}$.

    The structural similarity of each image, in the published form: local means, variances and covariance under a
    Gaussian window of 11 x 11 pixels with standard deviation 1.5, $c_1 = (0.01 R)^2$, $c_2 = (0.03 R)^2$, averaged over
    the places where the window lies inside the image, and over channels. It is scikit-image's
    `structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.

    Args:
        found: restored images.
        true: the images.
        data_range: $R$, the distance of white from black.

    Shape:
        - found, true: (..., C, height, width), the same, at least 11 x 11
        - output: (...), float64, at most 1

    Raises:
        TypeError, ValueError: as `psnr`, and for images of less than 11 x 11 pixels.

    Example:
        >>> image = torch.rand(2, 1, 16, 16)
        >>> ssim(image, image)
        tensor([1., 1.], dtype=torch.float64)

    Reference:
        Z. Wang, A. C. Bovik, H. R. Sheikh and E. P. Simoncelli, "Image Quality Assessment: From Error Visibility to
        Structural Similarity", IEEE Transactions on Image Processing 13(4), 2004, equation (13).
    """
    found, true, peak = _images(found, true, data_range)
    if min(found.shape[-2:]) < 11:
        raise ValueError(f"ssim needs images of at least 11 x 11 pixels, got {tuple(found.shape)}.")
    place = torch.arange(-5.0, 6.0, dtype=found.dtype, device=found.device)
    window = torch.exp(-place.square() / (2 * 1.5**2))
    window = window / window.sum()

    def mean(image: Tensor) -> Tensor:
        return image.unfold(-1, 11, 1).matmul(window).unfold(-2, 11, 1).matmul(window)

    a, b = mean(found), mean(true)
    variance_a, variance_b = mean(found.square()) - a.square(), mean(true.square()) - b.square()
    covariance = mean(found * true) - a * b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * a * b + c1) / (a.square() + b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean((-3, -2, -1))


class Aligned(NamedTuple):
    """Two images that lie on one another, and how far the first was moved for it, see `align`."""

    found: Tensor  # (..., C, height - 2 border, width - 2 border)
    true: Tensor  # the same shape
    shift: Tensor  # (..., 2), float64: rows and columns


@torch.no_grad()
def align(found: Tensor, true: Tensor, *, max_shift: int = 5, border: int = 15, subpixel: int = 4) -> Aligned:
    r"""Move each restored image by the shift, of at most `max_shift` pixels, that makes $\sum(\hat u - u)^2$ smallest.

    A blur kernel and an image are only known up to opposite shifts, so that blind deconvolution is judged after this,
    without the border, which no kernel lets one restore. The best whole shift is found first, then the best among
    fractions less than a pixel from it, with bilinear interpolation. That smooths a little, which can lower the error
    by itself; `subpixel=1` leaves it out. Say which one a figure is of.

    Args:
        found: restored images $\hat u$.
        true: the images $u$.
        max_shift: the largest shift along either axis in pixels, at least 0.
        border: how many pixels to leave out at each side, at least `max_shift`.
        subpixel: fractions of a pixel to try, 4 for quarters.

    Shape:
        - found, true: (..., C, height, width), the same

    Returns:
        `Aligned(found, true, shift)`: both without their border. `psnr(*align(found, true)[:2])` is the PSNR.

    Raises:
        TypeError, ValueError: as `psnr`; a border that is less than `max_shift` or leaves nothing, `subpixel < 1`.

    Example:
        >>> true = torch.rand(1, 1, 48, 48)
        >>> align(true.roll((2, -3), (-2, -1)), true).shift
        tensor([[ 2., -3.]], dtype=torch.float64)
    """
    found, true, _ = _images(found, true, 1.0)
    _check.integer("max_shift", max_shift, minimum=0)
    _check.integer("border", border, minimum=max_shift)
    _check.integer("subpixel", subpixel)
    batch, event = found.shape[:-3], found.shape[-3:]
    if 2 * border >= min(event[1:]):
        raise ValueError(f"border={border} leaves nothing of images of {event[1]} x {event[2]} pixels.")
    moved, shifts = [], []
    cut = true[..., border : event[1] - border, border : event[2] - border]
    for image, target in zip(found.reshape(-1, *event), cut.reshape(-1, event[0], *cut.shape[-2:]), strict=True):
        whole = range(-max_shift, max_shift + 1)
        dy, dx = _best(image, target, border, [(dy, dx) for dy in whole for dx in whole])
        near = [n / subpixel for n in range(1 - subpixel, subpixel)]
        places = [(dy + a, dx + b) for a in near for b in near if max(abs(dy + a), abs(dx + b)) <= max_shift]
        best = _best(image, target, border, places)
        moved.append(_moved(image, border, *best, target))
        shifts.append(best)
    return Aligned(
        torch.stack(moved).reshape(cut.shape), cut, torch.tensor(shifts, dtype=torch.float64).reshape(*batch, 2)
    )


def error_ratio(
    found: Tensor, reference: Tensor, true: Tensor, *, max_shift: int = 5, border: int = 15, subpixel: int = 4
) -> Tensor:
    r"""$\sum(\hat u - u)^2 / \sum(\hat u_k - u)^2$ after alignment: what not knowing the kernel costs.

    $\hat u_k$ was restored by the same method with the true kernel. By custom a ratio of up to 2 or 3 counts as a
    success. It is a ratio of squared errors, as Levin et al. define it; some codes take a ratio of norms.

    Args:
        found: images restored blindly, $\hat u$.
        reference: images restored with the true kernel, $\hat u_k$.
        true: the images $u$.
        max_shift, border, subpixel: of the alignment, see `align`; both restored images are aligned.

    Shape:
        - found, reference, true: (..., C, height, width), the same
        - output: (...), float64

    Raises:
        TypeError, ValueError: as `align`.

    Example:
        >>> true = torch.rand(1, 1, 48, 48)
        >>> error_ratio(true + 0.2, true + 0.1, true)
        tensor([4.0000], dtype=torch.float64)

    Reference:
        A. Levin, Y. Weiss, F. Durand and W. T. Freeman, "Understanding and evaluating blind deconvolution algorithms",
        CVPR 2009.
    """
    errors = []
    for image in (found, reference):
        aligned = align(image, true, max_shift=max_shift, border=border, subpixel=subpixel)
        errors.append((aligned.found - aligned.true).square().sum((-3, -2, -1)))
    return errors[0] / errors[1]


def _best(image: Tensor, target: Tensor, border: int, shifts: list[tuple[float, float]]) -> tuple[float, float]:
    errors = torch.stack([(_moved(image, border, dy, dx, target) - target).square().sum() for dy, dx in shifts])
    return shifts[int(errors.argmin())]


def _moved(image: Tensor, border: int, dy: float, dx: float, like: Tensor) -> Tensor:
    """The part of the image that lies on `like`, by which its border is cut off, when it is moved back by (dy, dx)."""
    for dim, shift in ((-2, dy), (-1, dx)):
        whole = int(shift // 1)
        part = image.narrow(dim, border + whole, like.shape[dim])
        if shift != whole:
            part = torch.lerp(part, image.narrow(dim, border + whole + 1, like.shape[dim]), shift - whole)
        image = part
    return image


@torch.no_grad()
def _images(found: Tensor, true: Tensor, data_range: float) -> tuple[Tensor, Tensor, float]:
    for name, image in (("found", found), ("true", true)):
        _check.tensor(name, image)
        if image.dim() < 3:
            raise ValueError(f"{name} must have shape (..., C, height, width), got {tuple(image.shape)}.")
        _check.finite(name, image)
    if found.shape != true.shape:
        raise ValueError(f"found and true must have one shape, got {tuple(found.shape)} and {tuple(true.shape)}.")
    return found.double(), true.double(), _check.real("data_range", data_range, above=0.0)
