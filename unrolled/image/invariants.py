"""The differential invariants of two images: what shifts, rotations and reflections of the plane leave as it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from unrolled import _check

NAMES = (
    "1",
    "v",
    "u",
    "|grad v|^2",
    "|grad u|^2",
    "grad v . grad u",
    "tr Hv",
    "tr Hu",
    "grad v' Hv grad v",
    "grad v' Hu grad v",
    "grad v' Hv grad u",
    "grad v' Hu grad u",
    "grad u' Hv grad u",
    "grad u' Hu grad u",
    "tr Hv Hv",
    "tr Hv Hu",
    "tr Hu Hu",
)
"""What the 17 invariants of (u, v) are, in the order of `differential_invariants`."""

# Which invariant of (u, v) is invariant i of (v, u): the two images change places.
SWAPPED = (0, 2, 1, 4, 3, 5, 7, 6, 13, 12, 11, 10, 9, 8, 16, 15, 14)

OWN_LAPLACIAN = NAMES.index("tr Hu")

# (down, right) of the pixel itself and of its neighbours to the left, right, above and below; then the diagonal ones.
_PLACES = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))


class Derivatives(NamedTuple):
    """The derivatives of an image up to the second order, each (..., H, W), for pixels of side 1."""

    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor


def derivatives(image: Tensor) -> Derivatives:
    r"""$\partial_x u, \partial_y u, \partial_{xx} u, \partial_{xy} u, \partial_{yy} u$ by central differences.

    A difference along one axis is averaged along the other one, with weights (1, 4, 1)/6 for the first order and
    (1, 10, 1)/12 for the second. The leading error of each is then a multiple of its Laplacian, $\tfrac16\Delta
    \partial_x u$ and $\tfrac1{12}\Delta\partial_{xx} u$: it does not prefer a direction. The sum `xx + yy` is the
    nine-point Laplacian (1, 4, 1; 4, -20, 4; 1, 4, 1)/6. The outermost pixels are repeated beyond the border, so that
    no gradient crosses it.

    Args:
        image: x grows to the right, y downwards.

    Shape:
        - image: (..., H, W)
        - output: `Derivatives`, each (..., H, W)

    Raises:
        TypeError: `image` is no floating point tensor.
        ValueError: it has less than two dimensions, or is empty.

    Example:
        >>> ramp = torch.arange(5.0).expand(4, 5)
        >>> derivatives(ramp).x[0]
        tensor([0.5000, 1.0000, 1.0000, 1.0000, 0.5000])
    """
    if _check.tensor("image", image).dim() < 2:
        raise ValueError(f"image must have shape (..., H, W), got {tuple(image.shape)}.")
    height, width = image.shape[-2:]
    wide = pad(image.reshape(-1, 1, height, width), (1, 1, 1, 1), mode="replicate")
    C, L, R, U, D, LU, RU, LD, RD = (
        wide[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width].reshape(image.shape)
        for down, right in _PLACES
    )
    # What a turn or a reflection exchanges stands on both sides of one addition, which commutes: the derivatives of a
    # turned image are the turned ones to the last bit.
    return Derivatives(
        (4 * (R - L) + ((RU - LU) + (RD - LD))) / 12,
        (4 * (D - U) + ((LD - LU) + (RD - RU))) / 12,
        (10 * ((L + R) - 2 * C) + (((LU + RU) - 2 * U) + ((LD + RD) - 2 * D))) / 12,
        ((LU + RD) - (LD + RU)) / 4,
        (10 * ((U + D) - 2 * C) + (((LU + LD) - 2 * L) + ((RU + RD) - 2 * R))) / 12,
    )


def differential_invariants(u: Tensor, v: Tensor) -> Tensor:
    r"""$1, v, u, \|\nabla v\|^2, \|\nabla u\|^2, \nabla v^\top \nabla u, \mathrm{tr} H_v, \dots, \mathrm{tr} H_u^2$.

    With $H$ the Hessian: the 17 polynomials, up to products of two gradients and a Hessian or of two Hessians, that do
    not change where both images are shifted, rotated or reflected. `NAMES` has them in order. On the grid, with
    `derivatives`, the invariance is exact for turns by 90 degrees and for reflections.

    Args:
        u: an image.
        v: another one of the same shape.

    Shape:
        - u, v: (..., H, W)
        - output: (17, ..., H, W)

    Raises:
        TypeError: an image is no floating point tensor.
        ValueError: they differ in shape, have less than two dimensions, or are empty.

    Example:
        >>> differential_invariants(torch.rand(8, 8), torch.rand(8, 8)).shape
        torch.Size([17, 8, 8])

    Reference:
        R. Liu, Z. Lin, W. Zhang and Z. Su, "Learning PDEs for Image Restoration via Optimal Control", ECCV 2010.
    """
    if _check.tensor("u", u).shape != _check.tensor("v", v).shape:
        raise ValueError(f"u and v must have the same shape, got {tuple(u.shape)} and {tuple(v.shape)}.")
    values = torch.stack([v, u])
    x, y, xx, xy, yy = derivatives(values)
    first, second = [0, 0, 1], [0, 1, 1]  # the pairs (v, v), (v, u), (u, u)
    x1, x2, y1, y2 = x[first], x[second], y[first], y[second]
    # (grad a)(grad b)' by its entries, the two beside the diagonal together; then its product with each Hessian.
    outer_xx, outer_xy, outer_yy = x1 * x2, x1 * y2 + y1 * x2, y1 * y2
    cubic = (outer_xx.unsqueeze(1) * xx + outer_yy.unsqueeze(1) * yy) + outer_xy.unsqueeze(1) * xy
    squares = (xx[first] * xx[second] + yy[first] * yy[second]) + 2 * xy[first] * xy[second]
    products = outer_xx + outer_yy
    return torch.cat([torch.ones_like(values[:1]), values, products[[0, 2, 1]], xx + yy, cubic.flatten(0, 1), squares])
