"""Claim: at 8 iterations SC2Net needs at most two thirds of FISTA's nonzeros for the same PSNR; LISTA does as well.

8x8 patches of MNIST and of CIFAR-10 (JPEG copy, grey), without their means and divided by the mean norm of training
patches, 100 atoms, 8 layers or iterations, alpha from 0.025 to 0.2. The networks, both tied, are trained on the
objective for the same steps, at rates chosen on validation patches at alpha 0.1 with seed 0. Tested on whole images,
tiled; PSNR is that of D x plus the patch's mean, over all pixels of 200 test images, peak 1. Sparsity is the share of
entries that are not 0. Three seeds: of the samples, the dictionary and the batches. One thread.

    python benchmarks/reconstruction.py --data FOLDER     # with mnist.npz and cifar10_jpeg.npz

cifar10_jpeg.npz holds all JPEG files end to end (jpeg), where each begins (offsets), and which are for testing (test).
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import RESULTS, save, table
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from unrolled import LISTA, Unroll, fit
from unrolled.demo.data import choose, learn_dictionary
from unrolled.losses import Lasso
from unrolled.solvers import fista, lasso_objective
from unrolled.sparse import SC2Net

ATOMS, LAYERS, SIDE, STEPS, BATCH, TEST_IMAGES = 100, 8, 8, 250, 64, 200
ALPHAS = (0.025, 0.05, 0.1, 0.2)
RATES = (1e-3, 2e-3, 4e-3)
SHOWN = 0.1  # alpha of the picture

NETWORKS: dict[str, Callable[[Tensor, float], Unroll]] = {
    "LISTA": lambda D, alpha: LISTA(D, LAYERS, alpha=alpha, tied=True),
    "SC2Net": lambda D, alpha: SC2Net(D, LAYERS, alpha=alpha),
}
Encoder = Callable[[Tensor], Tensor]


class Data(NamedTuple):
    learning: Tensor  # (20000, 64), without mean, divided by scale
    validation: Tensor  # (1000, 64), likewise
    images: Tensor  # (200, 32, 32), grey, 0 to 1
    scale: float
    dictionary: Tensor  # (64, 100)


# ---- Images ----------------------------------------------------------------------------------------------------------


def read(folder: Path | None, name: str, keys: str) -> Any:
    if folder is None or not (folder / name).is_file():
        raise SystemExit(f"--data: a folder with {name} is needed (arrays {keys}), got {folder}.")
    return np.load(folder / name)


def mnist(folder: Path | None, seed: int) -> tuple[Tensor, Tensor]:
    """Training and test images, (n, 32, 32): two pixels of background are added on every side."""
    x = read(folder, "mnist.npz", "x, y")["x"]
    random = np.random.default_rng(seed)
    pick = random.choice(60_000, 2_000, replace=False), 60_000 + random.choice(10_000, TEST_IMAGES, replace=False)
    learning, testing = (F.pad(torch.from_numpy(x[index]).float() / 255, (2, 2, 2, 2)) for index in pick)
    return learning, testing


def cifar(folder: Path | None, seed: int) -> tuple[Tensor, Tensor]:
    """Training and test images, (n, 32, 32), grey."""
    from PIL import Image

    arrays = read(folder, "cifar10_jpeg.npz", "jpeg, offsets, test")
    jpeg, offsets, test = arrays["jpeg"], arrays["offsets"], arrays["test"]
    random = np.random.default_rng(seed)

    def decode(indices: np.ndarray) -> Tensor:
        files = (io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()) for i in indices)
        return torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("L")) for file in files])).float() / 255

    learning, testing = (np.flatnonzero(test == held_out) for held_out in (False, True))
    return decode(random.choice(learning, 2_000, replace=False)), decode(
        random.choice(testing, TEST_IMAGES, replace=False)
    )


SOURCES = {"MNIST": mnist, "CIFAR-10 (JPEG copy)": cifar}


def tiles(images: Tensor) -> Tensor:  # (n, 32, 32) -> (16 n, 64)
    return F.unfold(images[:, None], SIDE, stride=SIDE).mT.reshape(-1, SIDE * SIDE)


def untiled(patches: Tensor) -> Tensor:
    return F.fold(patches.reshape(-1, 16, SIDE * SIDE).mT, (32, 32), SIDE, stride=SIDE)[:, 0]


def prepare(source: str, folder: Path | None, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    learning, testing = SOURCES[source](folder, seed)
    row, column = torch.randint(32 - SIDE + 1, (2, 30_000, 1, 1), generator=generator)
    index = torch.arange(SIDE)
    image = torch.randint(len(learning), (30_000, 1, 1), generator=generator)
    patches = learning[image, row + index[:, None], column + index].flatten(1)
    patches = patches - patches.mean(1, keepdim=True)
    patches = patches[patches.norm(dim=1) > 0.1]  # the background of a digit teaches nothing
    scale = patches.norm(dim=1).mean().item()
    patches = patches / scale
    dictionary = learn_dictionary(patches[:3_000], ATOMS, SHOWN, passes=2, seed=seed)
    return Data(patches[:-1_000], patches[-1_000:], testing, scale, dictionary)


# ---- Training and testing --------------------------------------------------------------------------------------------


def train(name: str, alpha: float, rate: float, data: Data, seed: int) -> Unroll:
    generator = torch.Generator().manual_seed(seed)
    net = NETWORKS[name](data.dictionary, alpha)
    rates = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "lr": rate},
        {"params": [p for p in net.parameters() if p.dim() < 2], "lr": 10 * rate},
    ]
    optimizer = torch.optim.Adam(rates)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batches = (choose(data.learning, BATCH, generator) for _ in iter(int, 1))
    fit(net, batches, Lasso(data.dictionary, alpha), num_steps=STEPS, optimizer=optimizer, scheduler=scheduler)
    return net


def best_rates(data: Data, bar: Any) -> dict[str, float]:
    chosen = {}
    for name in NETWORKS:
        found = {}
        for rate in RATES:
            net = train(name, SHOWN, rate, data, seed=0)
            with torch.no_grad():
                codes = net(data.validation)
            found[rate] = lasso_objective(data.dictionary, data.validation, codes, SHOWN).mean().item()
            bar.update()
        chosen[name] = min(found, key=found.__getitem__)
    return chosen


@torch.no_grad()
def reconstruct(encode: Encoder, data: Data, images: Tensor) -> tuple[Tensor, Tensor]:
    """The images through their codes, and the codes."""
    patches = tiles(images)
    mean = patches.mean(1, keepdim=True)
    codes = encode((patches - mean) / data.scale)
    return untiled(codes @ data.dictionary.T * data.scale + mean), codes


def record(encode: Encoder, data: Data, alpha: float) -> dict[str, float]:
    found, codes = reconstruct(encode, data, data.images)
    patches = tiles(data.images)
    y = (patches - patches.mean(1, keepdim=True)) / data.scale
    return {
        "psnr": -10 * (found - data.images).square().mean().log10().item(),
        "nonzero": (codes != 0).double().mean().item(),
        "objective": lasso_objective(data.dictionary, y, codes, alpha).mean().item(),
    }


def encoders(data: Data, alpha: float, rates: dict[str, float], seed: int, bar: Any) -> dict[str, Encoder]:
    def classical(num_iters: int) -> Encoder:
        return lambda y: fista(data.dictionary, y, alpha, num_iters=num_iters)

    found: dict[str, Encoder] = {f"FISTA, {LAYERS}": classical(LAYERS), "FISTA, 100": classical(100)}
    for name in NETWORKS:
        found[name] = train(name, alpha, rates[name], data, seed)
        bar.update()
    return found


# ---- Figures ---------------------------------------------------------------------------------------------------------


def plot_curves(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(11, 4.2))
    styles = {
        f"FISTA, {LAYERS}": ("0.5", "--"),
        "FISTA, 100": ("0.5", ":"),
        "LISTA": ("C0", "-"),
        "SC2Net": ("C2", "-"),
    }
    for axis, (source, runs) in zip(axes, results.items(), strict=True):
        for name, (color, line) in styles.items():
            x, y = (
                [statistics.median(run[alpha][name][what] for run in runs) for alpha in ALPHAS]
                for what in ("nonzero", "psnr")
            )
            axis.plot([100 * value for value in x], y, line, marker="o", ms=4, color=color, label=name)
        axis.set(title=source, xlabel="entries that are not 0, %", ylabel="PSNR, dB")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"written: {path.name}")


def plot_images(shown: dict[str, tuple[Data, dict[str, Encoder]]], path: Path, each: int = 4) -> None:
    from matplotlib import pyplot as plt

    names = [f"FISTA, {LAYERS}", "LISTA", "SC2Net"]
    figure, axes = plt.subplots(
        1 + 2 * len(names), 2 * each, figsize=(2 * each * 1.1 + 0.8, (1 + 2 * len(names)) * 1.12)
    )
    for block, (data, found) in enumerate(shown.values()):
        images = data.images[:each]
        for column in range(each):
            axes[0, block * each + column].imshow(images[column], cmap="gray", vmin=0, vmax=1)
        for index, name in enumerate(names):
            restored, _ = reconstruct(found[name], data, images)
            error = (restored - images).abs()
            for column in range(each):
                axes[1 + 2 * index, block * each + column].imshow(restored[column], cmap="gray", vmin=0, vmax=1)
                axis = axes[2 + 2 * index, block * each + column]
                axis.imshow(error[column], cmap="magma", vmin=0, vmax=0.3)
                psnr = -10 * error[column].square().mean().log10().item()
                axis.set_xlabel(f"{psnr:.1f} dB", fontsize=7, labelpad=2)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, label in enumerate(["original", *(text for name in names for text in (name, "error"))]):
        axes[row, 0].set_ylabel(label, fontsize=8)
    figure.suptitle(f"{' and '.join(shown)}, alpha = {SHOWN:g}; errors from 0 (black) to 0.3", fontsize=9)
    figure.tight_layout(pad=0.4, h_pad=0.3, w_pad=0.3, rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=140)
    print(f"written: {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with mnist.npz and cifar10_jpeg.npz")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    results: dict[str, list[dict[str, Any]]] = {}
    shown, rates = {}, {}
    trainings = len(SOURCES) * len(NETWORKS) * (len(RATES) + 3 * len(ALPHAS))
    with tqdm(total=trainings, smoothing=0.0) as bar:
        for source in SOURCES:
            results[source] = []
            for seed in range(3):
                data = prepare(source, arguments.data, seed)
                if seed == 0:
                    rates[source] = best_rates(data, bar)
                run: dict[float, Any] = {}
                for alpha in ALPHAS:
                    found = encoders(data, alpha, rates[source], seed, bar)
                    run[alpha] = {name: record(encode, data, alpha) for name, encode in found.items()}
                    if seed == 0 and alpha == SHOWN:
                        shown[source] = data, found
                results[source].append(run)
    for source, runs in results.items():
        rows = [
            [
                f"{name}, alpha {alpha:g}",
                *(
                    statistics.median(run[alpha][name][what] for run in runs)
                    for what in ("nonzero", "psnr", "objective")
                ),
            ]
            for alpha in ALPHAS
            for name in runs[0][alpha]
        ]
        table(rows, [f"{source}, median of 3 seeds", "not 0", "PSNR", "objective"])
        print()
    settings = {"atoms": ATOMS, "layers": LAYERS, "steps": STEPS, "batch": BATCH, "rates": rates}
    save("reconstruction", {**settings, "CPU seconds": time.process_time() - begin, "seeds": results})
    plot_curves(results, RESULTS / "reconstruction.png")
    plot_images(shown, RESULTS / "reconstruction_images.png")


if __name__ == "__main__":
    main()
