"""`Downsampling`: bicubic reduction of an image, the operator of super-resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unrolled import _check
from unrolled.operators import LinearOperator


class Downsampling(LinearOperator):
    r"""$y = R_h\, x\, R_w^T$: an image reduced by an integer factor, with the bicubic kernel widened by that factor.

    The rows of $R$ sum to 1; at the border the image is continued by its mirror image. It is what the literature of
    super-resolution calls bicubic downsampling.

    Args:
        factor: how many times smaller, at least 2.
        in_shape: (C, height, width) of the large image, both divisible by `factor`.
        device, dtype: of the matrices.

    Raises:
        TypeError, ValueError: numbers of the wrong kind or out of range; a size that is not divisible.

    Example:
        >>> A = Downsampling(2, (1, 6, 8))
        >>> A(torch.ones(1, 6, 8)).shape
        torch.Size([1, 3, 4])
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        factor: int,
        in_shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.integer("factor", factor, minimum=2)
        if len(in_shape) != 3 or in_shape[1] % factor or in_shape[2] % factor:
            raise ValueError(f"in_shape must be (C, height, width), divisible by {factor}, got {tuple(in_shape)}.")
        channels, height, width = in_shape
        super().__init__(in_shape, (channels, height // factor, width // factor))
        self.factor = factor
        for name, size in (("rows", height), ("columns", width)):
            dtype = torch.get_default_dtype() if dtype is None else dtype
            self.register_buffer(name, _matrix(size, factor).to(device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ self.check("x", x, self.in_shape) @ self.columns.mT

    def adjoint(self, y: Tensor) -> Tensor:
        return self.rows.mT @ self.check("y", y, self.out_shape) @ self.columns

    def enlarge(self, y: Tensor) -> Tensor:
        """A first estimate of the large image, by bicubic interpolation.

        Args:
            y: (..., *out_shape).
        """
        self.check("y", y, self.out_shape)
        flat = y.reshape(-1, *self.out_shape)
        large = torch.nn.functional.interpolate(flat, self.in_shape[1:], mode="bicubic", antialias=True)
        return large.reshape(*y.shape[:-3], *self.in_shape)


def _matrix(size: int, factor: int) -> Tensor:  # (size / factor, size)
    centres = (torch.arange(size // factor, dtype=torch.float64) + 0.5) * factor - 0.5
    reach = 2 * factor
    places = centres.floor().unsqueeze(1) + torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = _cubic((places - centres.unsqueeze(1)) / factor)
    weights = weights / weights.sum(1, keepdim=True)
    inside = places.long() % (2 * size)
    inside = torch.minimum(inside, 2 * size - 1 - inside)
    return torch.zeros(size // factor, size, dtype=torch.float64).scatter_add_(1, inside, weights)


def _cubic(t: Tensor) -> Tensor:
    """Keys' kernel with parameter -1/2."""
    t = t.abs()
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))
