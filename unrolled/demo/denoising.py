"""Taking the noise out of a photograph: every 8x8 patch is replaced by what a few atoms say of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import solvers
from unrolled.demo import data
from unrolled.demo.coding import CHUNK, Coder
from unrolled.demo.networks import Size, config, random_batches, train
from unrolled.losses import Lasso
from unrolled.sparse import LISTA

SIGMA = 25 / 255  # standard deviation of the noise, for grey values from 0 to 1
CONVERGED = 60  # iterations of FISTA with restarts, after which the picture changes by less than 0.01 dB


class Method(NamedTuple):
    """One row of the table."""

    name: str
    iterations: int | None
    psnr: float
    picture: Tensor  # (height, width)


class Denoising(NamedTuple):
    alpha: float  # weight of the l1 norm
    clean: Tensor
    methods: list[Method]  # the noisy picture itself first


class PatchError(nn.Module):
    r"""$\frac1B \sum_i \|D x_i - p_i\|^2$ with $x_i$ = net($y_i$); batches are (noisy y, clean p)."""

    dictionary: Tensor

    def __init__(self, dictionary: Tensor) -> None:
        super().__init__()
        self.register_buffer("dictionary", dictionary)

    def forward(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        noisy, clean = batch
        return (net(noisy) @ self.dictionary.T - clean).square().sum(1).mean()


def compare(dictionary: Tensor, training: Tensor, held_out: Tensor, size: Size, seed: int) -> Denoising:
    """Train two networks on one photograph, and denoise the other with them and with the solver that they unroll."""
    generator = torch.Generator().manual_seed(seed)
    training, clean = data.centre(training, size.side), data.centre(held_out, size.side)
    alpha = choose_alpha(training, dictionary, generator)

    settings = config(size, alpha, momentum=True)
    solver, denoiser = LISTA(dictionary, **settings), LISTA(dictionary, **settings)
    pairs = noisy_pairs(training, dictionary.device, size.batch, seed)
    train(solver, (noisy for noisy, _ in pairs), Lasso(dictionary, alpha), size.steps)
    train(denoiser, pairs, PatchError(dictionary), size.steps)

    noisy = clean + SIGMA * torch.randn(clean.shape, generator=generator)
    fista = partial(solvers.fista, dictionary, alpha=alpha)
    coders: list[tuple[str, int, Coder]] = [
        ("FISTA", size.num_layers, partial(fista, num_iters=size.num_layers)),
        ("FISTA, converged", CONVERGED, partial(fista, num_iters=CONVERGED, restart=True)),
        ("LISTA with momentum, trained on the Lasso", size.num_layers, solver),
        ("LISTA with momentum, trained to denoise", size.num_layers, denoiser),
    ]
    methods = [Method("noisy photograph", None, psnr(noisy, clean), noisy)]
    for name, iterations, code in coders:
        picture = denoise(noisy, code, dictionary, size.stride)
        methods.append(Method(name, iterations, psnr(picture, clean), picture))
    return Denoising(alpha, clean, methods)


def noisy_pairs(picture: Tensor, device: torch.device, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of random patches with fresh noise, and the same without; the noisy mean is taken off both."""
    generator = torch.Generator().manual_seed(seed)
    for clean in random_batches(data.patches(picture), size, seed):
        noisy = clean + SIGMA * torch.randn(clean.shape, generator=generator)
        mean = noisy.mean(1, keepdim=True)
        yield (noisy - mean).to(device), (clean - mean).to(device)


def choose_alpha(clean: Tensor, dictionary: Tensor, generator: torch.Generator) -> float:
    """The weight of the l1 norm at which the Lasso denoises a picture best, among multiples of the noise."""
    clean = data.centre(clean, 320)
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=generator)

    def quality(alpha: float) -> float:
        return psnr(denoise(noisy, partial(solvers.fista, dictionary, alpha=alpha, num_iters=30), dictionary, 4), clean)

    return max((multiple * SIGMA for multiple in (1.0, 1.25, 1.5, 1.75, 2.0)), key=quality)


@torch.no_grad()
def denoise(picture: Tensor, code: Coder, dictionary: Tensor, stride: int) -> Tensor:
    """Code every patch without its mean, put the mean back, and average the patches where they overlap."""
    y = data.patches(picture, stride).to(dictionary.device)
    mean = y.mean(1, keepdim=True)
    clean = torch.cat([code(part) @ dictionary.T for part in (y - mean).split(CHUNK)]) + mean
    return data.average(clean.cpu(), picture.shape, stride)


def psnr(found: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of grey values from 0 to 1."""
    return -10 * (found - clean).square().mean().log10().item()
