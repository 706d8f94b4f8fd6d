"""Scenes with known answers: objects put on canvases, and how many of them were found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unrolled import _check
from unrolled.scene.air import Found

TRIES = 1000  # after so many, two objects that must not overlap are taken not to fit


class Canvases(NamedTuple):
    """Scenes, and what is on them."""

    x: Tensor  # (count, C, H, W)
    number: Tensor  # (count,): objects on each
    centres: Tensor  # (count, most, 2): x and y of their middles, in pixels from the canvas's corner; NaN where none


def scenes(
    images: Tensor,
    count: int,
    size: int,
    *,
    most: int = 2,
    overlap: bool = False,
    generator: torch.Generator | None = None,
) -> Canvases:
    """Draw scenes: 0 to `most` images at random places on an empty canvas, each number equally often.

    Where objects overlap their pixels are added, up to 1.

    Args:
        images: (n, C, height, width), values in [0, 1], drawn from with replacement.
        count: how many scenes.
        size: side of the canvas in pixels, at least that of the images.
        most: the largest number of objects.
        overlap: whether images may overlap; if not, all of their pixels are kept apart, the empty ones as well.
        generator: in place of torch's own random numbers.

    Raises:
        TypeError: `images` is no floating point tensor.
        ValueError: a wrong shape, values outside [0, 1], images larger than the canvas, or no place for `most` of them
            was found.

    Example:
        >>> x, number, centres = scenes(torch.rand(10, 1, 8, 8), 5, 24)
        >>> x.shape, number.shape, centres.shape
        (torch.Size([5, 1, 24, 24]), torch.Size([5]), torch.Size([5, 2, 2]))
    """
    _check.finite("images", _check.tensor("images", images))
    if images.dim() != 4:
        raise ValueError(f"images must have shape (n, C, height, width), got {tuple(images.shape)}.")
    if bool(images.min() < 0) or bool(images.max() > 1):
        raise ValueError(
            f"images must lie in [0, 1], got values from {images.min():.4g} to {images.max():.4g}. Rescale them first."
        )
    count, size, most = _check.integer("count", count), _check.integer("size", size), _check.integer("most", most)
    channels, height, width = images.shape[1:]
    if max(height, width) > size:
        raise ValueError(f"size must be at least {max(height, width)}, the images' side, got {size}.")
    number = torch.randint(most + 1, (count,), generator=generator)
    rows, columns = _corners(count, most, size, (height, width), number, overlap, generator)
    chosen = torch.randint(len(images), (count, most), generator=generator)
    x = images.new_zeros(count, channels, size, size)
    for scene in range(count):
        for i in range(int(number[scene])):
            top, left = int(rows[scene, i]), int(columns[scene, i])
            x[scene, :, top : top + height, left : left + width] += images[chosen[scene, i]]
    centres = torch.stack([columns + width / 2, rows + height / 2], -1)
    centres[torch.arange(most) >= number[:, None]] = torch.nan
    return Canvases(x.clamp_(max=1), number, centres)


def fraction_located(found: Found, centres: Tensor, *, within: float = 2.0) -> float:
    """The share of true objects that have the middle of a present window within so many pixels.

    Args:
        found: what `AIR.locate` returns for scenes (count, ...).
        centres: of the true objects, (count, most, 2) in pixels, NaN where there is none, as in `Canvases`.
        within: the largest distance that counts.

    Raises:
        ValueError: there is no true object, or the shapes do not fit.
    """
    if centres.dim() != 3 or centres.shape[-1] != 2 or len(centres) != len(found.present):
        raise ValueError(f"centres must have shape ({len(found.present)}, most, 2), got {tuple(centres.shape)}.")
    real = ~centres.isnan().any(-1)
    if not bool(real.any()):
        raise ValueError("centres hold no object at all, so that no share of them can be located.")
    apart = (centres[:, :, None] - found.centres[:, None].to(centres)).norm(dim=-1)  # (count, most, T)
    apart = apart.masked_fill(~found.present[:, None], torch.inf)
    return float((apart.amin(-1)[real] <= within).double().mean())


def _corners(
    count: int,
    most: int,
    size: int,
    image: tuple[int, int],
    number: Tensor,
    overlap: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Top rows and left columns (count, most), drawn again until the first `number` of each scene are apart."""
    height, width = image
    rows = torch.zeros(count, most, dtype=torch.long)
    columns = torch.zeros(count, most, dtype=torch.long)
    open_ = torch.arange(count)
    for _ in range(TRIES):
        rows[open_] = torch.randint(size - height + 1, (len(open_), most), generator=generator)
        columns[open_] = torch.randint(size - width + 1, (len(open_), most), generator=generator)
        if overlap:
            return rows, columns
        r, c = rows[open_], columns[open_]
        touch = ((r[:, :, None] - r[:, None]).abs() < height) & ((c[:, :, None] - c[:, None]).abs() < width)
        there = torch.arange(most) < number[open_, None]
        pairs = torch.ones(most, most, dtype=torch.bool).triu(1)
        open_ = open_[(touch & there[:, :, None] & there[:, None] & pairs).any((1, 2))]
        if len(open_) == 0:
            return rows, columns
    raise ValueError(
        f"most={most} images of {height} x {width} pixels found no place apart on a canvas of {size} x {size} in "
        f"{TRIES} tries. Ask for fewer, a larger canvas, or overlap=True."
    )
