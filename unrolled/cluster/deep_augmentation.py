"""`RandomAffine`: images a little turned, shifted and scaled, which labels would not notice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from unrolled import _check


@dataclass(frozen=True)
class RandomAffine:
    r"""$x(u) \mapsto x(R_\phi u / s + t)$: each image turned by $\phi$, scaled by $s$, shifted by $t$.

    An augmentation for `fit_deep_kmeans`, drawn at random. It knows no labels; it says that a digit is the same digit
    a little turned or shifted, so use it where that is true of the classes that you look for. What comes in from
    outside of the image is 0. Pixels are interpolated linearly.

    Args:
        degrees: $\phi$ is drawn evenly from minus to plus so many degrees.
        shift: $t$ is drawn evenly from minus to plus this part of the width and of the height.
        scale: $s$ is drawn evenly from `1 - scale` to `1 + scale`; less than 1.
        shape: (channels, height, width) where the samples come as vectors of pixels; they leave as they came.

    Shape:
        - x: (n, channels, height, width), or (n, ...) with the pixels of `shape`
        - output: as x

    Raises:
        TypeError, ValueError: a number out of range, a shape that is not of an image, samples that are no images.

    Example:
        >>> augment = RandomAffine()
        >>> augment(torch.rand(5, 1, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([5, 1, 8, 8])

    Reference:
        The defaults follow X. Guo, E. Zhu, X. Liu and J. Yin, "Deep Embedded Clustering with Data Augmentation", ACML
        2018.
    """

    degrees: float = 10.0
    shift: float = 0.1
    scale: float = 0.0
    shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("degrees", "shift", "scale"):
            _check.real(name, getattr(self, name), minimum=0.0)
        if self.scale >= 1:
            raise ValueError(f"scale must be less than 1, got {self.scale}: an image of size 0 is none.")
        if self.shape is not None and len(self.shape) != 3:
            raise ValueError(f"shape must be (channels, height, width), got {self.shape}.")

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        images = x if self.shape is None else x.reshape(len(x), *self.shape)
        if images.dim() != 4:
            raise ValueError(
                f"x must be images (n, channels, height, width), got {tuple(x.shape)}. Say how its vectors are images: "
                "RandomAffine(shape=(1, 28, 28))."
            )
        # Drawn on the generator's device, the CPU's by default: the same images wherever they are.
        device = "cpu" if generator is None else generator.device
        angle, across, down, size = (2 * torch.rand(4, len(x), generator=generator, device=device) - 1).to(images)
        angle = angle * math.radians(self.degrees)
        size = 1 / (1 + self.scale * size)
        cos, sin = size * angle.cos(), size * angle.sin()
        aspect = images.shape[-2] / images.shape[-1]  # grid coordinates reach from -1 to 1 both ways
        top = torch.stack([cos, -aspect * sin, 2 * self.shift * across], 1)
        bottom = torch.stack([sin / aspect, cos, 2 * self.shift * down], 1)
        grid = affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
        return grid_sample(images, grid, align_corners=False).reshape(x.shape)
