"""`tiled`: a network applied to a large image piece by piece, to the same result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unrolled import _check


def tiled(
    function: Callable[[Tensor], Tensor],
    image: Tensor,  # (..., C, H, W)
    *,
    size: int = 512,
    margin: int,
) -> Tensor:  # (..., C, H, W)
    r"""$f(u)$ from $f$ of overlapping tiles of $u$, of which only what lies `margin` away from a cut is kept.

    The memory needed is that of one tile. If a pixel of the output depends on no pixel further away than `margin`, and
    the border of the image is treated by what lies within `margin` of it, there are no seams: the result is that of the
    whole image, up to rounding. For a `TNRD` the margin is `net.reach`.

    Args:
        function: takes (..., C, h, w) and returns the same size, for any size.
        image: the large image.
        size: side of what a tile contributes, at least 1; with the margins a tile is up to size + 2 margin large.
        margin: how far the function looks, at least 0.

    Shape:
        - image, output: (..., C, height, width)

    Raises:
        TypeError, ValueError: `image` is no floating point tensor of at least two dimensions, a number out of its
            range, or a function that returns another size.

    Example:
        >>> net = TNRD.pretrained(sigma=25)
        >>> image = torch.rand(1, 1, 90, 120)
        >>> torch.allclose(tiled(net, image, size=40, margin=net.reach), net(image), atol=1e-5)
        True
    """
    _check.tensor("image", image)
    if image.dim() < 2:
        raise ValueError(f"image must have shape (..., height, width), got {tuple(image.shape)}.")
    _check.integer("size", size)
    _check.integer("margin", margin, minimum=0)
    rows = []
    for top in range(0, image.shape[-2], size):
        row = [_tile(function, image, top, left, size, margin) for left in range(0, image.shape[-1], size)]
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)


def _tile(function: Callable[[Tensor], Tensor], image: Tensor, top: int, left: int, size: int, margin: int) -> Tensor:
    """What the tile at this place contributes."""
    above, before = min(margin, top), min(margin, left)
    piece = image[..., top - above : top + size + margin, left - before : left + size + margin]
    found = function(piece)
    if found.shape[-2:] != piece.shape[-2:]:
        raise ValueError(
            f"function made {tuple(found.shape[-2:])} of {tuple(piece.shape[-2:])}; it must keep the size."
        )
    height, width = (min(size, image.shape[dim] - begin) for dim, begin in ((-2, top), (-1, left)))
    return found[..., above : above + height, before : before + width]
