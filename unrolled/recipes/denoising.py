"""`train_denoiser`: a recipe for `TNRD` to learn from clean images, stage by stage or at once."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from unrolled import _check
from unrolled._modes import modes_kept
from unrolled.image.tnrd import TNRD, TNRDStep
from unrolled.training import History, Stage, fit
from unrolled.training.loop import progress_bar
from unrolled.training.run import Loss

WARM_UP = 20  # steps in which the rate rises
LAST_RATE = 0.02  # what remains of it at the end


class SquaredError(nn.Module):
    r"""$\frac1N \|255\,(\mathrm{net}(y) - x)\|^2$ over the N pixels of batches (y, x): in grey levels, squared.

    Args:
        data_range: images are in [0, `data_range`].

    Example:
        >>> SquaredError()(torch.nn.Identity(), (torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2)))
        tensor(650.2500)
    """

    def __init__(self, data_range: float = 1.0) -> None:
        super().__init__()
        self.scale = 255 / _check.real("data_range", data_range, above=0.0)

    def forward(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        noisy, clean = batch
        # Grey levels are of order 1, so that Adam's epsilon is small beside the gradients.
        return (self.scale * (net(noisy) - clean)).square().mean()


class NegativePSNR(nn.Module):
    r"""$\frac1B \sum_b 10 \log_{10} \mathrm{MSE}_b$ over the images of batches (y, x): trains for the mean PSNR.

    `SquaredError` cares most about images that are hard; here a decibel is a decibel in every image.

    Args:
        data_range: images are in [0, `data_range`].

    Example:
        >>> NegativePSNR()(torch.nn.Identity(), (torch.full((2, 1, 2, 2), 0.1), torch.zeros(2, 1, 2, 2)))
        tensor(-20.)
    """

    def __init__(self, data_range: float = 1.0) -> None:
        super().__init__()
        self.scale = 1 / _check.real("data_range", data_range, above=0.0)

    def forward(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        noisy, clean = batch
        return 10 * (self.scale * (net(noisy) - clean)).square().mean((-3, -2, -1)).log10().mean()


def noisy_crops(
    images: Tensor,  # (N, C, H, W)
    sigma: float,
    *,
    crop: int = 64,
    batch_size: int = 8,
    data_range: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (noisy, clean): random crops, flipped and transposed at random, under fresh Gaussian noise.

    The noisy ones are not clipped.

    Args:
        images: (N, C, height, width), floating point, in [0, `data_range`].
        sigma: standard deviation of the noise in grey levels of 0..255.
        crop: side of the crops, at most that of the images.
        batch_size: crops in a batch, each of another image where there are enough.
        data_range: see `images`.
        seed: of everything random.

    Example:
        >>> noisy, clean = next(noisy_crops(torch.rand(10, 1, 80, 80), 25.0))
        >>> noisy.shape, round((255 * (noisy - clean)).std().item())
        (torch.Size([8, 1, 64, 64]), 25)
    """
    _check.finite("images", _check.tensor("images", images))
    if images.dim() != 4:
        raise ValueError(f"images must have shape (N, C, height, width), got {tuple(images.shape)}.")
    _check.real("sigma", sigma, above=0.0)
    if _check.integer("crop", crop) > min(images.shape[-2:]):
        raise ValueError(f"crop must be at most {min(images.shape[-2:])}, the side of the images, got {crop}.")
    _check.integer("batch_size", batch_size)
    deviation = sigma / 255 * _check.real("data_range", data_range, above=0.0)
    return _endless(images, deviation, crop, batch_size, torch.Generator().manual_seed(seed))


def _endless(
    images: Tensor, deviation: float, crop: int, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    order: list[int] = []
    while True:
        crops = []
        for _ in range(batch_size):
            order = order or torch.randperm(len(images), generator=generator).tolist()
            image = images[order.pop()]
            top, left = below(image.shape[-2] - crop + 1), below(image.shape[-1] - crop + 1)
            part = image[:, top : top + crop, left : left + crop]
            turns = below(8)
            part = part.flip(-1) if turns & 1 else part
            part = part.flip(-2) if turns & 2 else part
            crops.append(part.mT if turns & 4 else part)
        clean = torch.stack(crops)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        yield clean + deviation * noise.to(clean.device), clean


def train_denoiser(
    net: TNRD,
    images: Tensor,  # (N, C, H, W)
    *,
    sigma: float,
    num_steps: int = 3000,
    greedy_steps: int = 0,
    lr: float = 3e-3,
    crop: int = 64,
    batch_size: int = 8,
    loss: Loss | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> History:
    r"""Train a `TNRD` on clean images and Gaussian noise: greedily if asked for, then all stages together.

    Adam with momenta 0.9 and 0.98; its rate rises for 20 steps and falls to 2 % as a cosine. The weights of the
    influence functions, which are in grey levels, learn at ten times the rate of the filters.

    Args:
        net: the network; trained in place.
        images: clean, in [0, the network's `data_range`].
        sigma: standard deviation of the noise in grey levels of 0..255.
        num_steps: updates of all stages together.
        greedy_steps: before them, updates of each stage alone on top of those before it; 0 for none.
        lr: the highest rate of the filters.
        crop: side of the crops, see `noisy_crops`.
        batch_size: crops in a batch.
        loss: of the network and a batch (noisy, clean); `SquaredError` where not given, `NegativePSNR` is another.
        progress: whether to show a progress bar.
        checkpoint: as in `fit`, of the updates of all stages together.
        seed: of crops and noise.

    Returns:
        The `History` of all updates, in the unit of the loss (squared grey levels by default); the stages are in
        `stages`.

    Example:
        >>> net = TNRD(num_iters=2, sigma=25, filter_size=3)
        >>> history = train_denoiser(net, torch.rand(8, 1, 32, 32), sigma=25, num_steps=3, crop=24)
        >>> len(history)
        3
    """
    if not isinstance(net, TNRD):
        raise TypeError(f"net must be a TNRD, got {type(net).__name__}.")
    _check.integer("num_steps", num_steps)
    _check.integer("greedy_steps", greedy_steps, minimum=0)
    data_range = cast(TNRDStep, net[0]).data_range
    loss = SquaredError(data_range) if loss is None else loss
    history = History()

    def run(part: TNRD, stages: TNRD, steps: int, name: str, path: str | os.PathLike[str] | None = None) -> None:
        optimizer = denoising_optimizer(stages, lr)
        scheduler = LambdaLR(optimizer, lambda k: _rate(k, steps))
        own = seed + len(history.stages)
        batches = noisy_crops(images, sigma, crop=crop, batch_size=batch_size, data_range=data_range, seed=own)
        done = fit(
            part,
            batches,
            loss,
            num_steps=steps,
            optimizer=optimizer,
            scheduler=scheduler,
            progress=progress,
            checkpoint=path,
        )
        history.loss += done.loss
        history.seconds += done.seconds
        history.stages.append(Stage(len(part), name, len(done), done.loss[0], done.loss[-1]))

    if greedy_steps > 0 and net.tied is not True:
        for t in range(1, len(net) + 1):
            earlier = [p for p in net[: t - 1].parameters() if p.requires_grad] if t > 1 else []
            for parameter in earlier:
                parameter.requires_grad_(False)
            try:
                run(net[:t], net[t - 1 : t], greedy_steps, "new stage")
            finally:
                for parameter in earlier:
                    parameter.requires_grad_(True)
    run(net, net, num_steps, "all stages", checkpoint)
    return history


def refine_denoiser(net: TNRD, batch: tuple[Tensor, Tensor], *, num_steps: int = 50, progress: bool = False) -> History:
    """Train on by L-BFGS, as the authors did: all of one large batch in every step, no rate to choose.

    Args:
        net: the network; trained in place.
        batch: (noisy, clean), each (N, C, height, width).
        num_steps: iterations of L-BFGS; each takes a few evaluations of the loss.
        progress: whether to show a progress bar.

    Returns:
        The `History`: the loss before each iteration, in squared grey levels.

    Example:
        >>> net = TNRD(num_iters=2, sigma=25, filter_size=3)
        >>> batch = next(noisy_crops(torch.rand(8, 1, 32, 32), 25.0, crop=24))
        >>> history = refine_denoiser(net, batch, num_steps=3)
        >>> history.loss[-1] < history.loss[0]
        True
    """
    if not isinstance(net, TNRD):
        raise TypeError(f"net must be a TNRD, got {type(net).__name__}.")
    _check.integer("num_steps", num_steps)
    loss = SquaredError(cast(TNRDStep, net[0]).data_range)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=1, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(net, batch)
        value.backward()
        return value.item()

    history = History()
    begin = time.process_time()
    with modes_kept(net), progress_bar(num_steps, progress) as bar:
        net.train()
        for _ in range(num_steps):
            history.loss.append(float(cast(float, optimizer.step(closure))))
            bar.update()
    history.seconds = time.process_time() - begin
    return history


def denoising_optimizer(net: TNRD, lr: float = 3e-3) -> Optimizer:
    """Adam with the rate `lr` for filters and reactions, and 10 `lr` for influence functions, which are in grey levels.

    Args:
        net: the network, or some of its stages.
        lr: the rate of the filters, positive.
    """
    _check.real("lr", lr, above=0.0)
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "influence" not in name], "lr": lr},
        {"params": [p for name, p in named if "influence" in name], "lr": 10 * lr},
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.98))


def _rate(step: int, num_steps: int) -> float:
    warm_up = min(WARM_UP, num_steps // 4)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    done = (step - warm_up) / max(1, num_steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
