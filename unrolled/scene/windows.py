"""Windows on a canvas: cut them out and paint them back, differentiable in the picture and in the place."""

from __future__ import annotations

import torch
from torch import Tensor

from unrolled import _check


def crop(canvas: Tensor, where: Tensor, size: tuple[int, int]) -> Tensor:
    r"""The window at `where`, resampled to `size` pixels by bilinear interpolation; the outside of the canvas is 0.

    A canvas reaches from -1 to 1 in both directions, from border to border. Window coordinates u, which do as well, lie
    at $s u + (x, y)$ of the canvas. The same as an affine grid without rotation and
    `torch.nn.functional.grid_sample`, computed as two matrix products, one for the rows and one for the columns.

    Args:
        canvas: (..., C, H, W).
        where: scale $s > 0$, place x from left to right, place y from top to bottom, (..., 3), with the batch
            dimensions of the canvas.
        size: height and width of the window in pixels.

    Returns:
        (..., C, height, width).

    Raises:
        TypeError, ValueError: no floating point tensors, shapes that do not fit, a size less than 1.

    Example:
        >>> canvas = torch.arange(16.0).reshape(1, 4, 4)
        >>> crop(canvas, torch.tensor([0.5, 0.0, 0.0]), (2, 2))
        tensor([[[ 5.,  6.],
                 [ 9., 10.]]])
    """
    _check_shapes("canvas", canvas, where, size)
    scale, x, y = where[..., None].unbind(-2)  # (..., 1) each
    rows = _weights(scale * _centres(size[0], where) + y, canvas.shape[-2])
    columns = _weights(scale * _centres(size[1], where) + x, canvas.shape[-1])
    return rows[..., None, :, :] @ canvas @ columns[..., None, :, :].mT


def paint(window: Tensor, where: Tensor, size: tuple[int, int]) -> Tensor:
    r"""The window put at `where` on an empty canvas of `size` pixels: the inverse of `crop`, 0 outside the window.

    Args:
        window: (..., C, height, width).
        where: as in `crop`, (..., 3).
        size: H and W of the canvas in pixels.

    Returns:
        (..., C, H, W).

    Raises:
        TypeError, ValueError: as in `crop`.

    Example:
        >>> paint(torch.ones(1, 2, 2), torch.tensor([0.5, 0.5, -0.5]), (4, 4))
        tensor([[[0., 0., 1., 1.],
                 [0., 0., 1., 1.],
                 [0., 0., 0., 0.],
                 [0., 0., 0., 0.]]])
    """
    _check_shapes("window", window, where, size)
    scale, x, y = where[..., None].unbind(-2)
    rows = _weights((_centres(size[0], where) - y) / scale, window.shape[-2])
    columns = _weights((_centres(size[1], where) - x) / scale, window.shape[-1])
    return rows[..., None, :, :] @ window @ columns[..., None, :, :].mT


def _centres(count: int, like: Tensor) -> Tensor:
    """Where the centres of `count` pixels lie between the borders -1 and 1."""
    return (2 * torch.arange(count, device=like.device, dtype=like.dtype) + 1) / count - 1


def _weights(places: Tensor, count: int) -> Tensor:
    """How much of each of `count` pixels is at each place, (..., places, count): a hat of one pixel's width."""
    pixels = ((places + 1) * count - 1) / 2
    return (1 - (pixels[..., None] - torch.arange(count, device=places.device, dtype=places.dtype)).abs()).clamp_min(0)


def _check_shapes(name: str, picture: Tensor, where: Tensor, size: tuple[int, int]) -> None:
    _check.tensor(name, picture)
    _check.tensor("where", where)
    if picture.dim() < 3 or where.shape != (*picture.shape[:-3], 3):
        raise ValueError(
            f"{name} must have shape (..., C, height, width) and where (..., 3) with the same batch dimensions, got "
            f"{tuple(picture.shape)} and {tuple(where.shape)}."
        )
    if len(size) != 2:
        raise ValueError(f"size must be (height, width), got {size}.")
    for side in size:
        _check.integer("size", side)
