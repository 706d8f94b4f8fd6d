"""Denoising of images by shrinking their coefficients in every shifted discrete cosine transform."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from unrolled import _check

ATTENUATION = 2.7  # times sigma: up to where coefficients are noise; the best on photographs of 2.0, 2.4, 2.7, 3.0, 3.4


def dct_atoms(size: int, channels: int = 1) -> Tensor:
    r"""The orthonormal DCT-II basis of (channels, size, size) patches without its constant, in float64.

    Atoms are products of one cosine for each of the three axes. All have norm 1 and mean 0. With the constant, the
    filters of all shifts are a tight frame: $\sum_i b_i^T b_i = \mathrm{size}^2 I$.

    Args:
        size: side of the patches, at least 1.
        channels: of the patches, at least 1.

    Shape:
        - output: (channels size² - 1, channels, size, size), by colour pattern, then rows, then columns

    Raises:
        TypeError, ValueError: `size` or `channels` is no integer of at least 1, or both are 1.

    Example:
        >>> atoms = dct_atoms(3)
        >>> atoms.shape, torch.allclose(atoms.flatten(1) @ atoms.flatten(1).T, torch.eye(8, dtype=torch.float64))
        (torch.Size([8, 1, 3, 3]), True)
    """
    _check.integer("size", size)
    _check.integer("channels", channels)
    if size * channels == 1:
        raise ValueError("size and channels are both 1: a single pixel has the constant atom only. Take a larger size.")
    colour, side = cosines(channels), cosines(size)
    atoms = torch.einsum("ac,bh,dw->abdchw", colour, side, side).reshape(-1, channels, size, size)
    return atoms[1:]


def cosines(n: int) -> Tensor:  # (n, n)
    """The orthonormal DCT-II basis of n numbers in float64, a row each.

    Args:
        n: how many.
    """
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi / n * torch.outer(k, k + 0.5)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def noise_part(x: Tensor, sigma: float) -> Tensor:
    r"""$\nu(x) = x \exp(-(x / 2.7\sigma)^4 / 2)$: what of a coefficient is noise; small ones all, large ones nothing.

    Args:
        x: coefficients.
        sigma: standard deviation of the noise, positive, in the units of x.

    Example:
        >>> noise_part(torch.tensor([1.0, 30.0]), 1.0)
        tensor([0.9906, 0.0000])
    """
    return x * torch.exp(-((x / (ATTENUATION * sigma)) ** 4) / 2)


def symmetric_pad(image: Tensor, margin: int) -> Tensor:
    """Continue (..., height, width) by its mirror images, edge repeated, as often as it takes.

    Args:
        image: of any size.
        margin: by how many pixels on each side, at least 0.

    Example:
        >>> symmetric_pad(torch.tensor([[1.0, 2.0, 3.0]]), 2)[0]
        tensor([2., 1., 1., 2., 3., 3., 2.])
    """
    for dim in (-2, -1):
        size = image.shape[dim]
        place = torch.arange(-margin, size + margin, device=image.device) % (2 * size)
        image = image.index_select(dim, torch.minimum(place, 2 * size - 1 - place))
    return image


def dct_shrinkage(
    image: Tensor,  # (..., C, H, W)
    sigma: float,
    *,
    filter_size: int = 5,
    data_range: float = 1.0,
    joint: bool = False,
    num_iters: int = 1,
    influence: Callable[[Tensor], Tensor] | None = None,
    margin: int | None = None,
) -> Tensor:
    r"""$u \leftarrow u - \sum_i \bar b_i * \phi(b_i * u)$ with $\phi(x) = x \exp(-(x / 2.7\sigma)^4 / 2) / m^2$.

    Denoises by a transform that does not depend on where the image begins: in the discrete cosine transform of every m
    x m patch the small coefficients are taken out, and what the patches say is averaged. It is one step of a nonlinear
    diffusion, and it is what `TNRD` is before training.

    Args:
        image: noisy, floating point.
        sigma: standard deviation of the noise in grey levels of 0..255, whatever the range of the image.
        filter_size: m, odd, at least 3.
        data_range: the range of the image without noise is [0, `data_range`].
        joint: transform all channels together; otherwise each by itself.
        num_iters: how many such steps, at least 1.
        influence: $\phi$ where another one is wanted, a function of coefficients (..., m² - 1, height, width) of an
            image in 0..255.
        margin: by how many pixels the image is continued by its mirror image; 2 (m // 2) where not given.

    Shape:
        - image, output: (..., C, height, width)

    Raises:
        TypeError, ValueError: an image that is not floating point, has less than three dimensions, NaN or infinity;
            an even `filter_size`; a number out of its range.

    Example:
        >>> clean = torch.ones(1, 1, 16, 16) / 2
        >>> noisy = clean + 25 / 255 * torch.randn(1, 1, 16, 16)
        >>> ((dct_shrinkage(noisy, 25.0) - clean).std() / (noisy - clean).std()).item() < 0.5
        True
    """
    _check.finite("image", _check.tensor("image", image))
    if image.dim() < 3:
        raise ValueError(f"image must have shape (..., channels, height, width), got {tuple(image.shape)}.")
    _check.real("sigma", sigma, above=0.0)
    _check.real("data_range", data_range, above=0.0)
    _check.integer("num_iters", num_iters)
    m = odd("filter_size", filter_size)
    margin = 2 * (m // 2) if margin is None else _check.integer("margin", margin, minimum=0)
    channels = image.shape[-3] if joint else 1
    atoms = dct_atoms(m, channels).to(image)
    height, width = image.shape[-2:]
    scale = 255 / data_range
    u = symmetric_pad(image * scale, margin).reshape(-1, channels, height + 2 * margin, width + 2 * margin)
    for _ in range(num_iters):
        x = conv2d(u, atoms, padding=m // 2)
        noise = noise_part(x, sigma) / m**2 if influence is None else influence(x)
        u = u - conv_transpose2d(noise, atoms, padding=m // 2)
    return u[..., margin : margin + height, margin : margin + width].reshape(image.shape) / scale


def odd(name: str, value: int) -> int:
    """Return `value` if it is an odd integer of at least 3, the side of a filter that has a middle.

    Args:
        name: of the argument, for the error.
        value: the side.
    """
    if _check.integer(name, value, minimum=3) % 2 == 0:
        raise ValueError(f"{name} must be odd, so that a filter has a middle, got {value}. Take {value + 1}.")
    return int(value)
