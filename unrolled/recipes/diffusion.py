"""`train_pde`: a recipe for `LearnedPDE` to learn to denoise from clean images."""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from unrolled import _check
from unrolled.image.diffusion import LearnedPDE, LearnedPDEStep
from unrolled.recipes.denoising import SquaredError, noisy_crops
from unrolled.training import History, fit


def train_pde(
    net: LearnedPDE,
    images: Tensor,  # (N, C, H, W)
    *,
    sigma: float,
    num_steps: int = 1200,
    lr: float = 1e-2,
    crop: int = 64,
    batch_size: int = 8,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> History:
    r"""$\min \frac1N\|255\,(\mathrm{net}(y) - x)\|^2$: train a `LearnedPDE` on clean images and Gaussian noise.

    Adam with momenta 0.9 and 0.98; its rate rises during the first twentieth of the steps and then falls to zero as a
    cosine. One rate serves all coefficients, as the contrast makes the invariants of one order.

    Args:
        net: the network; trained in place.
        images: clean, in [0, the network's `data_range`].
        sigma: standard deviation of the noise in grey levels of 0..255.
        num_steps: updates.
        lr: the highest rate.
        crop: side of the crops, see `noisy_crops`.
        batch_size: crops in a batch.
        progress: whether to show a progress bar.
        checkpoint: as in `fit`.
        seed: of crops and noise.

    Returns:
        The `History`, in squared grey levels.

    Example:
        >>> net = LearnedPDE(num_iters=3)
        >>> history = train_pde(net, torch.rand(8, 1, 32, 32), sigma=25, num_steps=3, crop=24)
        >>> len(history)
        3
    """
    if not isinstance(net, LearnedPDE):
        raise TypeError(f"net must be a LearnedPDE, got {type(net).__name__}.")
    _check.integer("num_steps", num_steps)
    _check.real("lr", lr, above=0.0)
    data_range = cast(LearnedPDEStep, net[0]).data_range
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.98))
    return fit(
        net,
        noisy_crops(images, sigma, crop=crop, batch_size=batch_size, data_range=data_range, seed=seed),
        SquaredError(data_range),
        num_steps=num_steps,
        optimizer=optimizer,
        # One step more than there are, as the schedule is asked once more after the last one.
        scheduler=OneCycleLR(optimizer, lr, num_steps + 1, pct_start=0.05, cycle_momentum=False),
        progress=progress,
        checkpoint=checkpoint,
    )
