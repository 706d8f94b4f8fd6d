"""Claim: a learned PDE of 340 numbers removes noise better than the diffusions that people wrote down.

Gaussian noise of sigma 25, not clipped; answers clipped to [0, 1]. The network (10 layers, 17 invariants in two
equations) is trained on 360 images of Train400, with three seeds. The heat equation, Perona and Malik's diffusion and
total variation have their settings chosen on the other 40; so were the network's. The tests are Set12 under three draws
of noise and BSD68 under one. PSNR in dB is the mean over images. Asymmetry is the largest difference, in grey levels of
0..255, between the answer to a turned or reflected image and the answer turned or reflected, over all eight. One
thread, CPU time; a time an image is that of one of 256 x 256. Total variation is scikit-image's, left out where that is
missing.

    python benchmarks/learned_pde.py --data FOLDER [--pictures learned_pde_coefficients.png] [--classical-only]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save, spread, table
from torch import Tensor
from tqdm import tqdm

from unrolled.image.diffusion import LearnedPDE
from unrolled.image.invariants import NAMES
from unrolled.metrics.image import psnr
from unrolled.recipes.diffusion import train_pde
from unrolled.solvers.diffusion import heat, perona_malik

SIGMA, STEPS, SEEDS, HELD_OUT = 25.0, 700, 3, 40
Denoiser = Callable[[Tensor], Tensor]


def load(folder: Path) -> dict[str, list[Tensor]]:
    """Images (1, 1, H, W) in [0, 1] of each set."""
    sets = {}
    for name in ("train400", "set12", "bsd68"):
        path = folder / f"{name}.npz"
        if not path.is_file():
            raise SystemExit(f"{path} is missing: --data takes the folder with train400.npz, set12.npz and bsd68.npz.")
        with np.load(path) as data:
            images = list(data["x"]) if name == "train400" else [data[key] for key in data.files]
        sets[name] = [torch.tensor(image)[None, None].float() / 255 for image in images]
    return sets


def noisy(images: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [image + SIGMA / 255 * torch.randn(image.shape, generator=generator) for image in images]


@torch.no_grad()
def score(denoise: Denoiser, clean: list[Tensor], seed: int) -> float:
    pairs = zip(noisy(clean, seed), clean)
    return statistics.mean(float(psnr(denoise(y).clamp(0, 1), x)) for y, x in pairs)


def classical() -> dict[str, list[tuple[dict[str, Any], Denoiser]]]:
    """Each rival with the settings that it may choose from."""

    def grid(function: Callable[..., Tensor], **choices: list[Any]) -> list[tuple[dict[str, Any], Denoiser]]:
        settings: list[dict[str, Any]] = [{}]
        for name, values in choices.items():
            settings = [{**setting, name: value} for setting in settings for value in values]
        return [(setting, functools.partial(function, **setting)) for setting in settings]

    rivals = {
        "heat equation": grid(heat, diffusivity=[0.1], num_iters=[2, 3, 4, 5, 6, 8]),
        "Perona-Malik": grid(perona_malik, contrast=[6.0, 8.0, 10.0, 12.0, 15.0, 20.0], num_iters=[8, 16, 32, 64]),
    }
    try:
        from skimage.restoration import denoise_tv_chambolle
    except ImportError:
        print("scikit-image is not installed: no row for total variation")
        return rivals

    def total_variation(y: Tensor, weight: float) -> Tensor:
        return torch.tensor(denoise_tv_chambolle(y[0, 0].numpy(), weight=weight))[None, None]

    return {**rivals, "total variation": grid(total_variation, weight=[0.04, 0.05, 0.06, 0.07, 0.08, 0.1])}


def evaluate(denoise: Denoiser, sets: dict[str, list[Tensor]]) -> dict[str, Any]:
    y = noisy([image for image in sets["set12"] if image.shape[-1] == 256][:1], 0)[0]
    begin = time.process_time()
    with torch.no_grad():
        for _ in range(3):
            denoise(y)
    seconds = (time.process_time() - begin) / 3
    set12 = [score(denoise, sets["set12"], seed) for seed in range(3)]
    return {"Set12": set12, "BSD68": score(denoise, sets["bsd68"], 0), "s an image": seconds}


@torch.no_grad()
def asymmetry(net: torch.nn.Module, y: Tensor) -> float:
    """In grey levels, over the eight symmetries of the square."""
    moves = [functools.partial(torch.rot90, k=k, dims=(-2, -1)) for k in range(4)]
    moves += [lambda x, move=move: move(x).flip(-1) for move in moves]
    return 255 * max((net(move(y)) - move(net(y))).abs().max().item() for move in moves)


def pictures(coefficients: Tensor, path: Path) -> None:
    """(K, 2, 17): how the coefficients change from layer to layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    limit = coefficients.abs().max().item()
    for axis, values, image in zip(axes, coefficients.unbind(1), ("u", "v")):
        shown = axis.imshow(values.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set(xlabel="layer", title=f"equation of {image}")
        axis.set_xticks(range(0, len(values), 2), range(1, len(values) + 1, 2))
    axes[0].set_yticks(range(len(NAMES)), [name.replace("grad ", "∇") for name in NAMES])
    axes[1].set_ylabel("(u and v change places)")
    figure.colorbar(shown, ax=axes, label="coefficient")
    figure.savefig(path, dpi=90)
    print(f"written: {path}")


def networks(
    sets: dict[str, list[Tensor]], train: list[Tensor], held_out: list[Tensor], path: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of the network before and after training, and what else there is to say of each seed."""
    untrained = LearnedPDE()
    before = {"held out": score(untrained, held_out, 9), **evaluate(untrained, sets)}
    seeds = []
    for seed in tqdm(range(SEEDS)):
        net = LearnedPDE()
        history = train_pde(net, torch.cat(train), sigma=SIGMA, num_steps=STEPS, seed=seed)
        y = noisy(sets["set12"][:1], 0)[0]
        coefficients = torch.stack([step.coefficients for step in net]).detach()
        if seed == 0:
            first = coefficients
        seeds.append(
            {
                "held out": score(net, held_out, 9),
                **evaluate(net, sets),
                "training s": history.seconds,
                "asymmetry, single": asymmetry(net, y),
                "asymmetry, double": asymmetry(net.double(), y.double()),
                "largest coefficient": coefficients.abs().max().item(),
            }
        )
        print(seeds[-1], flush=True)
    if path:
        pictures(first, path)
    after = {key: statistics.median(one[key] for one in seeds) for key in seeds[0] if key != "Set12"}
    draws = [value for one in seeds for value in one["Set12"]]
    rows = {
        "learned PDE, untrained": before | {"Set12": spread(before["Set12"])},
        "learned PDE": {"held out": after.pop("held out"), "Set12": spread(draws), **after},
    }
    return rows, {"seeds": seeds, "coefficients of seed 0": first.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train400.npz, set12.npz and bsd68.npz")
    parser.add_argument("--pictures", type=Path, help="draw the coefficients of the first seed into this file")
    parser.add_argument("--classical-only", action="store_true", help="keep the networks of the results that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sets = load(arguments.data)
    train, held_out = sets["train400"][:-HELD_OUT], sets["train400"][-HELD_OUT:]

    rows: dict[str, Any] = {"noisy": evaluate(lambda y: y, sets)}
    rows["noisy"].pop("s an image")
    for name, settings in classical().items():
        found = [score(denoise, held_out[:12], 9) for _, denoise in settings]
        setting, denoise = settings[found.index(max(found))]
        rows[name] = {"setting": setting, "held out": score(denoise, held_out, 9), **evaluate(denoise, sets)}

    for row in rows.values():
        row["Set12"] = spread(row["Set12"])

    if arguments.classical_only:
        kept = json.loads((RESULTS / "learned_pde.json").read_text())
        rows |= {name: row for name, row in kept["rows"].items() if name.startswith("learned PDE")}
        rest = {key: kept[key] for key in ("seeds", "coefficients of seed 0")}
    else:
        trained, rest = networks(sets, train, held_out, arguments.pictures)
        rows |= trained
    columns = ["held out", "Set12", "BSD68", "s an image", "training s"]
    cells = [
        [name, *(f"{row[key]['median']:.2f}" if key == "Set12" else f"{row.get(key, 0):.3f}" for key in columns)]
        for name, row in rows.items()
    ]
    print()
    table(cells, [f"PSNR, sigma {SIGMA:g}", *columns])
    save(
        "learned_pde",
        {"sigma": SIGMA, "steps": STEPS, "rows": rows, **rest},
    )


if __name__ == "__main__":
    main()
