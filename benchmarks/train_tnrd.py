"""Trains the weights of `TNRD` that come with the package, and writes them there.

Train400's first 384 images are for training; settings were chosen on the other 16, whose PSNR is printed. The test sets
are not looked at. Networks for noise of 15 and 50 grey levels go on from the weights for 25. On one thread; CPU seconds
depend much on what else the machine does. With `--checkpoint` a run that was interrupted goes on.

    python benchmarks/train_tnrd.py --data FOLDER                                 # 5x5 at 25, then 15 and 50
    python benchmarks/train_tnrd.py --data FOLDER --filter-size 7 --sigma 25
    python benchmarks/train_tnrd.py --data FOLDER --sigma 25 --further 1          # then go on; and again, with 2, 3
    python benchmarks/train_tnrd.py --data FOLDER --sigma 25 --filter-size 7 --further 1
    python benchmarks/train_tnrd.py --data FOLDER --sigma 25 --further 3 --steps 8000 --lr 3e-3 --crop 96 --batch 4
    python benchmarks/train_tnrd.py --data FOLDER --sigma 25 --further 5 --steps 14000 --lr 2e-3 --crop 96 --batch 4
    python benchmarks/train_tnrd.py --data FOLDER --sigma 25 --further 7 --steps 10000 --lr 2e-3 --crop 96 --batch 4
    python benchmarks/train_tnrd.py --data FOLDER --sigma 25 --steps 20000 --checkpoint run.pt    # a longer run
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _common import save
from torch import Tensor

from unrolled.image import TNRD, _weights
from unrolled.image.tnrd import RADIUS
from unrolled.metrics.image import psnr
from unrolled.recipes.denoising import NegativePSNR, train_denoiser

HELD_OUT = 16
STAGES = 5


class Plan(NamedTuple):
    """How a network is trained."""

    steps: int
    lr: float
    seed: int
    origin: int | None = None  # the noise whose weights it begins with
    rescaled: bool = False  # and then with its influence functions stretched to this noise
    crop: int = 64
    batch: int = 8
    psnr: bool = False  # what is trained for: the mean PSNR, or the squared error


PLANS = {
    (5, 25): Plan(2650, 3e-3, 0),
    (5, 15): Plan(450, 2e-3, 3, origin=25),
    (5, 50): Plan(450, 2e-3, 4, origin=25, rescaled=True),
    (7, 25): Plan(700, 3e-3, 1),
}
FURTHER = {
    (5, 25): Plan(2500, 2e-3, 10, origin=25),
    (7, 25): Plan(2000, 2e-3, 11, origin=25),
}


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """For training and held out, (N, 1, 180, 180) in 0..1."""
    with np.load(folder / "train400.npz") as arrays:
        x = torch.from_numpy(arrays["x"]).float().unsqueeze(1) / 255
    return x[:-HELD_OUT], x[-HELD_OUT:]


@torch.no_grad()
def rescale(net: TNRD, factor: float) -> None:
    """phi(x) becomes s phi(x / s): what the network was for images and noise s times smaller."""
    for step in net.steps:
        centres = torch.linspace(-RADIUS, RADIUS, step.influence.num_knots)
        inner = (centres / factor).expand(1, step.influence.num_channels, 1, -1)
        values = factor * step.influence(inner)[0, :, 0]
        gaussians = torch.exp(-(((centres[:, None] - centres) / step.influence.width) ** 2) / 2)
        step.influence.weight.copy_(torch.linalg.solve(gaussians.double(), values.double().T).T)


@torch.no_grad()
def held_out_psnr(net: TNRD, clean: Tensor, sigma: float) -> float:
    """Mean over images, noise not clipped, output clipped."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    return psnr(net(clean + sigma / 255 * noise).clamp(0, 1), clean).mean().item()


def train(folder: Path, size: int, sigma: int, plan: Plan, checkpoint: str | None) -> dict[str, float]:
    train_set, held_out = images(folder)
    net = TNRD(STAGES, sigma=sigma, filter_size=size)
    if plan.origin is not None:
        net.load_state_dict(_weights.load(f"tnrd_{size}x{size}_sigma{plan.origin}"))
        if plan.rescaled:
            rescale(net, sigma / plan.origin)
    before = held_out_psnr(net, held_out, sigma)
    begin = time.process_time()
    train_denoiser(
        net,
        train_set,
        sigma=sigma,
        num_steps=plan.steps,
        lr=plan.lr,
        crop=plan.crop,
        batch_size=plan.batch,
        loss=NegativePSNR() if plan.psnr else None,
        seed=plan.seed,
        progress=True,
        checkpoint=checkpoint,
    )
    seconds = time.process_time() - begin
    after = held_out_psnr(net, held_out, sigma)
    _weights.save(net, _weights.FOLDER / f"tnrd_{size}x{size}_sigma{sigma}.npz")
    print(f"{size}x{size}, sigma {sigma}: held-out PSNR {before:.2f} -> {after:.2f} dB in {seconds:.0f} CPU s")
    return {**plan._asdict(), "psnr_before": before, "psnr": after, "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train400.npz")
    parser.add_argument("--filter-size", type=int, default=5)
    parser.add_argument("--sigma", type=int, help="only this noise")
    for name, kind in (("steps", int), ("lr", float), ("crop", int), ("batch", int)):
        parser.add_argument(f"--{name}", type=kind, help="in place of the plan's")
    parser.add_argument("--psnr", action="store_true", help="train for the mean PSNR, not the squared error")
    parser.add_argument("--further", type=int, default=0, help="how many runs there were already, to go on from")
    parser.add_argument("--checkpoint", help="file to go on from and to write to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for (size, sigma), plan in (FURTHER if args.further else PLANS).items():
        if size == args.filter_size and args.sigma in (None, sigma):
            plan = plan._replace(seed=plan.seed + 100 * max(0, args.further - 1))  # crops that it has not seen
            given = {name: getattr(args, name) for name in ("steps", "lr", "crop", "batch")}
            given = {name: value for name, value in given.items() if value is not None}
            plan = plan._replace(psnr=args.psnr, **given)
            result = train(args.data, size, sigma, plan, args.checkpoint)
            save(f"train_tnrd_{size}x{size}_sigma{sigma}{f'_further{args.further}' if args.further else ''}", result)


if __name__ == "__main__":
    main()
