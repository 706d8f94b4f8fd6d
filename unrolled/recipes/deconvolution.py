"""Training of deconvolution on synthetic blurs: random camera shake, noise, and the borders that a camera sees.

Only sharp images are needed. The kernels are drawn, never taken from a benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.image.deconvolution import NonBlindDeconvolution
from unrolled.solvers.deconvolution import check_image
from unrolled.training import History, fit


class Blurs(NamedTuple):
    """Blurred images, their kernels, and what they were."""

    blurred: Tensor  # (batch, C, height, width)
    kernel: Tensor  # (batch, 1, side, side)
    sharp: Tensor  # (batch, C, height, width): what lies under the blurred image


def motion_kernel(side: int, generator: torch.Generator, *, widths: tuple[float, float] = (0.45, 0.85)) -> Tensor:
    r"""A random camera shake: a smooth Gaussian process in the plane, drawn as a line of random width.

    How long the line is against the side, how fast it turns, and its width are random, too. Where the camera moves
    slowly the line is brighter.

    Args:
        side: of the kernel, odd, at least 5.
        generator: where the random numbers come from.
        widths: the least and the largest standard deviation across the line, in pixels.

    Shape:
        - output: (1, side, side), float32, sum 1, as many empty lines on either side

    Raises:
        TypeError, ValueError: a side that is even or less than 5.

    Example:
        >>> kernel = motion_kernel(15, torch.Generator().manual_seed(0))
        >>> kernel.shape, kernel.sum()
        (torch.Size([1, 15, 15]), tensor(1.))
    """
    if _check.integer("side", side, minimum=5) % 2 == 0:
        raise ValueError(f"side must be odd, so that the kernel has a centre, got {side}.")

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    time = torch.linspace(0, 1, 300, dtype=torch.float64)
    covariance = torch.exp(-(time[:, None] - time).square() / (2 * uniform(0.1, 0.45) ** 2))
    root = torch.linalg.cholesky(covariance + 1e-8 * torch.eye(len(time), dtype=torch.float64))
    path = root @ torch.randn(len(time), 2, generator=generator, dtype=torch.float64)
    low, high = path.amin(0), path.amax(0)
    path = (path - (low + high) / 2) / (high - low).amax() * (side - 3) * uniform(0.75, 1.0) + side // 2
    place, width = torch.arange(side, dtype=torch.float64), uniform(*widths)
    rows, columns = (torch.exp(-(path[:, i, None] - place).square() / (2 * width**2)) for i in (0, 1))
    kernel = rows.T @ columns
    kernel = torch.where(kernel < 0.02 * kernel.amax(), 0.0, kernel)
    return (kernel / kernel.sum()).float()[None]


@dataclass(frozen=True)
class SyntheticBlurs:
    r"""Crops of sharp images, blurred by `motion_kernel`s, with white noise: as many as are asked for.

    Args:
        images: sharp ones, (N, C, height, width), in [0, 1].
        crop: side of the crops in pixels; the blurred image is smaller by the kernel's side less 1, as pixels beyond
            the border of a crop are not known.
        sides: the least and the largest side of the kernels, odd. All kernels of a batch have one side.
        sigmas: the least and the largest standard deviation of the noise in grey levels of 0..255; its logarithm is
            uniform.
        widths: the least and the largest width of the line that the camera draws, see `motion_kernel`.

    Raises:
        TypeError, ValueError: images of integers or of another shape, a crop that is larger than they are or too small
            for the kernels, even sides, sigmas or widths that are not positive.

    Example:
        >>> problem = SyntheticBlurs(torch.rand(3, 1, 64, 64), crop=48, sides=(5, 9))
        >>> batch = next(problem.batches(2, seed=0))
        >>> batch.blurred.shape == batch.sharp.shape, batch.kernel.shape[:2]
        (True, torch.Size([2, 1]))
    """

    images: Tensor
    crop: int = 128
    sides: tuple[int, int] = (11, 27)
    sigmas: tuple[float, float] = (0.5, 3.0)
    widths: tuple[float, float] = (0.45, 0.85)

    def __post_init__(self) -> None:
        check_image(self.images, "images")
        if self.images.dim() != 4 or min(self.images.shape[-2:]) < self.crop:
            raise ValueError(
                f"images must have shape (N, C, height, width) of at least {self.crop} x {self.crop} pixels, got "
                f"{tuple(self.images.shape)}. Choose a smaller crop."
            )
        low, high = self.sides
        if low % 2 == 0 or high % 2 == 0 or not 5 <= low <= high < self.crop // 2:
            raise ValueError(f"sides must be odd, from 5 to less than half of crop={self.crop}, got {self.sides}.")
        for name, (least, most) in (("sigmas", self.sigmas), ("widths", self.widths)):
            if not 0 < least <= most < math.inf:
                raise ValueError(f"{name} must be positive, the lower one first, got {(least, most)}.")

    def batches(self, batch_size: int, *, seed: int) -> Iterator[Blurs]:
        """Batches without end, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            low, high = self.sides
            side = low + 2 * int(torch.randint((high - low) // 2 + 1, (), generator=generator))
            yield Blurs(*map(torch.stack, zip(*(self._draw(side, generator) for _ in range(batch_size)), strict=True)))

    def _draw(self, side: int, generator: torch.Generator) -> Blurs:
        image = self.images[int(torch.randint(len(self.images), (), generator=generator))]
        for dim in (-2, -1):
            start = int(torch.randint(image.shape[dim] - self.crop + 1, (), generator=generator))
            image = image.narrow(dim, start, self.crop)
        if torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        kernel = motion_kernel(side, generator, widths=self.widths).to(image)
        blurred = nn.functional.conv2d(image.unsqueeze(1), kernel.flip(-2, -1).unsqueeze(1)).squeeze(1)
        low, high = map(math.log, self.sigmas)
        sigma = math.exp(low + (high - low) * torch.rand((), generator=generator).item()) / 255
        noise = torch.randn(blurred.shape, generator=generator, dtype=blurred.dtype)
        half = side // 2
        return Blurs(blurred + sigma * noise, kernel, image[..., half:-half, half:-half])


class RestorationError:
    r"""$\tfrac12\log_{10}$ of the mean squared error of each image without its border, the mean: -PSNR / 20.

    Args:
        border: how many pixels of each side do not count.
    """

    def __init__(self, border: int = 8) -> None:
        self.border = _check.integer("border", border, minimum=0)

    def __call__(self, net: nn.Module, batch: Blurs) -> Tensor:
        error = net(batch.blurred, batch.kernel) - batch.sharp
        b = self.border
        inner = error[..., b : error.shape[-2] - b, b : error.shape[-1] - b]
        return inner.square().mean((-3, -2, -1)).log10().mean() / 2


def train_deconvolution(
    net: NonBlindDeconvolution,
    problem: SyntheticBlurs,
    *,
    num_steps: int = 200,
    batch_size: int = 4,
    lr: float = 0.03,
    seed: int = 0,
    **options: Any,
) -> History:
    """Train a `NonBlindDeconvolution` to restore synthetic blurs whose kernels it is given.

    Args:
        net: the network, changed in place.
        problem: where the blurs come from.
        num_steps: updates.
        batch_size: images an update.
        lr: Adam's learning rate to begin with; it falls to nearly 0 along a cosine.
        seed: of the blurs.
        options: passed on to `fit`, such as `progress=True` or `callbacks`.

    Returns:
        The `History`; its losses are -PSNR / 20 of images in [0, 1].

    Example:
        >>> problem = SyntheticBlurs(torch.rand(3, 1, 48, 48), crop=40, sides=(5, 7))
        >>> len(train_deconvolution(NonBlindDeconvolution(2), problem, num_steps=2, batch_size=1))
        2
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, eta_min=0.02 * lr)
    # Through many thresholds a gradient can be huge now and then; cut off, it does not spoil Adam's averages.
    handles = [p.register_hook(lambda g: g.clamp(-1, 1)) for p in net.parameters() if p.requires_grad]
    try:
        return fit(
            net,
            problem.batches(batch_size, seed=seed),
            RestorationError(),
            num_steps=num_steps,
            optimizer=optimizer,
            scheduler=scheduler,
            **options,
        )
    finally:
        for handle in handles:
            handle.remove()
