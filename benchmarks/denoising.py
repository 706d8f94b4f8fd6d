"""Claim: TNRD's shipped weights denoise as well as the published ones at a small part of BM3D's time.

PSNR is the mean over the images of a set; noise is not clipped, the output is. Three noise seeds: median and range.
BM3D (PyPI `bm3d`, its profile 'np', float64) takes seconds an image: every fourth image of BSD68, one noise seed, and
TNRD on exactly these beside it. Times are CPU seconds on one thread, calls interleaved, the median. `growth` draws
time against pixels, `lookup` holds the table of radial basis functions against their sum. The published figures are
those of the README of cszn/DnCNN (BSD68) and of VLOGroup's denoising-variationalnetwork (5x5).

    python benchmarks/denoising.py quality --sigma 25 --data FOLDER
    pip install bm3d      # under a licence of its own, see there
    python benchmarks/denoising.py bm3d --data FOLDER
    python benchmarks/denoising.py lookup
    python benchmarks/denoising.py growth
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, interleaved, ratio, save, spread, table
from torch import Tensor
from tqdm import tqdm

from unrolled.image import TNRD, _weights
from unrolled.metrics.image import psnr, ssim
from unrolled.shrinkage.radial_basis import RadialBasis
from unrolled.solvers.denoising import dct_shrinkage

SEEDS = (0, 1, 2)
COLUMNS = ["method", "Set12", "BSD68", "published BSD68"]
PUBLISHED = {  # dB on BSD68
    "BM3D": {15: 31.07, 25: 28.57, 50: 25.62},
    "TNRD 5x5": {25: 28.78},
    "TNRD 7x7": {15: 31.42, 25: 28.92, 50: 25.97},
}

Denoiser = Callable[[Tensor], Tensor]


def images(folder: Path, name: str) -> list[Tensor]:
    """(1, 1, H, W) each, in 0..1."""
    with np.load(folder / f"{name}.npz") as arrays:
        return [torch.from_numpy(arrays[key]).float()[None, None] / 255 for key in arrays.files]


def noisy(clean: list[Tensor], sigma: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + 7)
    return [image + sigma / 255 * torch.randn(image.shape, generator=generator) for image in clean]


@torch.no_grad()
def quality(denoise: Denoiser, clean: list[Tensor], sigma: float, seed: int) -> tuple[float, float]:
    """Mean PSNR, mean SSIM."""
    found = [denoise(image).clamp(0, 1) for image in noisy(clean, sigma, seed)]
    pairs = list(zip(found, clean))
    return (
        statistics.mean(psnr(a, b).item() for a, b in pairs),
        statistics.mean(ssim(a, b).item() for a, b in pairs) if seed == 0 else float("nan"),
    )


def trained() -> dict[str, dict[int, TNRD]]:
    """The networks that there are weights for."""
    nets: dict[str, dict[int, TNRD]] = {}
    for path in sorted(_weights.FOLDER.glob("tnrd_*.npz")):
        _, size, sigma = path.stem.split("_")
        noise = int(sigma.removeprefix("sigma"))
        nets.setdefault(f"TNRD {size}", {})[noise] = TNRD.pretrained(noise, filter_size=int(size.split("x")[0]))
    return nets


def bm3d_denoiser(sigma: float) -> Denoiser:
    import bm3d

    return lambda image: torch.from_numpy(bm3d.bm3d(image[0, 0].double().numpy(), sigma / 255))[None, None].float()


def compare(folder: Path, sigma: int) -> list[dict[str, Any]]:
    """The networks that are trained for this noise, and the classical method that all of them were."""
    sets = {name: images(folder, name) for name in ("set12", "bsd68")}
    methods: dict[str, Denoiser] = {"untrained": lambda image: dct_shrinkage(image, sigma)}
    methods |= {method: nets[sigma] for method, nets in trained().items() if sigma in nets}
    rows = []
    for method, denoise in tqdm(methods.items()):
        row: dict[str, Any] = {"method": method, "sigma": sigma}
        for name, clean in sets.items():
            found = [quality(denoise, clean, sigma, seed) for seed in (SEEDS[:1] if method == "untrained" else SEEDS)]
            row[name] = spread([db for db, _ in found])
            row[f"{name}_ssim"] = found[0][1]
        row["published_bsd68"] = PUBLISHED.get(method, {}).get(sigma)
        rows.append(row)
    return rows


def against_bm3d(folder: Path, net: TNRD) -> dict[str, Any]:
    """The same 17 images and noise for both, and the time for one of 180 x 180."""
    clean = images(folder, "bsd68")[::4]
    theirs = bm3d_denoiser(25)
    begin = time.process_time()
    found = {"BM3D": quality(theirs, clean, 25, 1)[0]}
    seconds = (time.process_time() - begin) / len(clean)
    found["TNRD 5x5"] = quality(net, clean, 25, 1)[0]
    small = noisy([clean[0][..., :180, :180]], 25, 0)[0]
    times = interleaved({"BM3D": lambda: theirs(small), "TNRD 5x5": inference(net, small)}, repeats=5)
    return {
        "bsd68_every_4th": found,
        "bm3d_seconds_a_bsd68_image": seconds,
        "seconds_180x180": {name: spread(values) for name, values in times.items()},
        "bm3d_over_tnrd": ratio(times, "BM3D", "TNRD 5x5"),
    }


def inference(net: TNRD, image: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return net(image)

    return call


def lookup() -> dict[str, Any]:
    """The table of radial basis functions against the sum, for 24 channels of 180 x 180."""
    shrink = RadialBasis(24, -3, radius=310.0, curve=lambda x: x * torch.exp(-((x / 67.5) ** 4) / 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        shrink.weight += 10 * torch.randn(shrink.weight.shape, generator=generator)
        x = 80 * torch.randn(1, 24, 180, 180, generator=generator)
        exact = torch.cat([shrink.exact(part) for part in x.split(20, -2)], -2)
        error = (shrink(x) - exact).abs().max() / (exact.max() - exact.min())
        times = interleaved(
            {"sum": lambda: [shrink.exact(part) for part in x.split(20, -2)], "table": lambda: shrink(x)}, repeats=5
        )
    return {
        "error_of_range": error.item(),
        "seconds": {name: spread(values) for name, values in times.items()},
        "sum_over_table": ratio(times, "sum", "table"),
    }


def growth(net: TNRD) -> list[dict[str, float]]:
    """CPU seconds against the side of a square image; BM3D where it is there and the image small."""
    rows = []
    for side in tqdm((64, 128, 256, 512, 1024)):
        image = torch.rand(1, 1, side, side)
        functions: dict[str, Callable[[], Any]] = {"TNRD 5x5": inference(net, image)}
        if importlib.util.find_spec("bm3d") and side <= 256:
            theirs = bm3d_denoiser(25)
            functions["BM3D"] = lambda theirs=theirs, image=image: theirs(image)
        times = interleaved(functions, repeats=3)
        rows.append({"pixels": side**2, **{name: statistics.median(values) for name, values in times.items()}})
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name in ("BM3D", "TNRD 5x5"):
        points = [(row["pixels"], row[name]) for row in rows if name in row]
        if points:
            axes.loglog(*zip(*points), "o-", label=name)
    axes.set(xlabel="pixels", ylabel="CPU seconds, one thread")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "bm3d", "lookup", "growth"))
    parser.add_argument("--data", type=Path, help="folder with set12.npz and bsd68.npz")
    parser.add_argument("--sigma", type=int, default=25, help="noise, for quality")
    args = parser.parse_args()
    if args.data is None and args.part in ("quality", "bm3d"):
        parser.error("--data is needed")
    torch.set_num_threads(1)
    if args.part == "quality":
        rows = compare(args.data, args.sigma)
        cells = [[r["method"], *(f"{r[k]['median']:.2f}" for k in ("set12", "bsd68"))] for r in rows]
        table([[*cell, row["published_bsd68"] or "-"] for cell, row in zip(cells, rows)], COLUMNS)
        save(f"denoising_sigma{args.sigma}", {"seeds": len(SEEDS), "published": PUBLISHED, "rows": rows})
        return
    if args.part == "lookup":
        found = lookup()
        print(f"error {found['error_of_range']:.1e} of the range, {found['sum_over_table']:.0f} times faster")
        save("denoising_lookup", found)
        return
    net = TNRD.pretrained(25)
    if args.part == "bm3d":
        if not importlib.util.find_spec("bm3d"):
            raise SystemExit("bm3d is not installed: pip install bm3d")
        found = against_bm3d(args.data, net)
        names = ("BM3D", "TNRD 5x5")
        psnrs, times = found["bsd68_every_4th"], found["seconds_180x180"]
        table([[name, f"{psnrs[name]:.2f}", times[name]["median"]] for name in names], ["method", "BSD68/4", "s"])
        print(f"BM3D takes {found['bm3d_over_tnrd']:.0f} times as long")
        save("denoising_bm3d", found)
        return
    rows = growth(net)
    table([[row["pixels"], row["TNRD 5x5"], row.get("BM3D", "-")] for row in rows], ["pixels", "TNRD 5x5", "BM3D"])
    draw(rows, RESULTS / "denoising_growth.png")
    save("denoising_growth", {"rows": rows})


if __name__ == "__main__":
    main()
