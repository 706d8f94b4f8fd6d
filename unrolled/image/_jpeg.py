"""`JPEGBox`: the images that a JPEG file stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.solvers.denoising import cosines

SIDE = 8

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def quantisation_table(quality: int) -> Tensor:  # (8, 8)
    """The steps to which JPEG rounds the brightness at this quality, by the formula that encoders share.

    Args:
        quality: from 1 to 100.

    Example:
        >>> quantisation_table(50)[0, :3]
        tensor([16., 11., 10.])
    """
    if _check.integer("quality", quality) > 100:
        raise ValueError(f"quality must be at most 100, got {quality}.")
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(LUMINANCE) * scale + 50) // 100).clamp(1, 255).float()


class JPEGBox(nn.Module):
    r"""$\mathrm{argmin}_x \|x - u\|$ over all x that JPEG rounds to f: each block's DCT stays within half a step.

    The data term of `TNRD` for images that were compressed: `TNRD(projection=JPEGBox(table))`.

    Args:
        table: the quantisation steps, (8, 8), positive. `PIL` tells those of a file as `image.quantization[0]`, in
            zigzag order; `quantisation_table` computes them from the quality.

    Shape:
        - u, image: (..., height, width) in grey levels of 0..255, both divisible by 8; `image` as decoded
        - output: as u

    Raises:
        TypeError, ValueError: a table of another kind, or an image whose sides are not divisible by 8: pass the
            decoded image before it was cropped.

    Example:
        >>> box = JPEGBox(quantisation_table(10))
        >>> decoded = box.compress(255 * torch.rand(16, 16))
        >>> torch.allclose(box(decoded, decoded), decoded, atol=1e-3)
        True
    """

    table: Tensor
    basis: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        _check.finite("table", _check.tensor("table", table))
        if table.shape != (SIDE, SIDE) or (not table.is_meta and not bool((table > 0).all())):
            raise ValueError(f"table must be (8, 8) and positive, got shape {tuple(table.shape)}.")
        self.register_buffer("table", table)
        self.register_buffer("basis", cosines(SIDE).to(table))

    def compress(self, image: Tensor) -> Tensor:
        """What JPEG makes of a grey image in 0..255, before its pixels are rounded.

        Args:
            image: (..., height, width).
        """
        return self._pixels((self._coefficients(image) / self.table).round() * self.table)

    def forward(self, u: Tensor, image: Tensor) -> Tensor:
        centre = (self._coefficients(image) / self.table).round()
        inside = torch.minimum(torch.maximum(self._coefficients(u) / self.table, centre - 0.5), centre + 0.5)
        return self._pixels(inside * self.table)

    def _coefficients(self, image: Tensor) -> Tensor:  # (..., rows, columns, 8, 8)
        if image.dim() < 2 or image.shape[-2] % SIDE or image.shape[-1] % SIDE:
            raise ValueError(f"image must have sides divisible by {SIDE}, got {tuple(image.shape)}. Do not crop it.")
        blocks = (image - 128).unflatten(-2, (-1, SIDE)).unflatten(-1, (-1, SIDE)).transpose(-2, -3)
        return self.basis @ blocks @ self.basis.mT

    def _pixels(self, coefficients: Tensor) -> Tensor:
        blocks = self.basis.mT @ coefficients @ self.basis
        return blocks.transpose(-2, -3).flatten(-2).flatten(-3, -2) + 128
