"""Claim: dense mean-field inference agrees with pydensecrf, takes less time, and grows linearly.

The same problem for both: a photograph, random smooth logits, Gaussian kernel 3 pixels with weight 3, bilateral kernel
160 pixels and 3 levels with weight 5, normalised after, Potts. Everything from logits and image to marginals is timed,
the building of both lattices too. One thread: CPU seconds. Two threads: wall seconds (pydensecrf knows one thread
only), which mean something on an idle machine alone. Calls are interleaved; two warm up, then the fastest of 8 counts.

"learned" has a matrix of weights a kernel (the default, which trains); "ours" one number a kernel, which is what
pydensecrf computes.

    pip install pydensecrf2
    python benchmarks/crf.py [--growth]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save, table
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from unrolled.crf import CRFasRNN, Weights

SIZES = ((320, 480), (500, 500))
ITERATIONS = (5, 10)
CLASSES = 21
GROWTH = {
    "pixels": [((h, h * 3 // 2), CLASSES, 5) for h in (80, 160, 240, 320, 480, 640)],
    "classes": [((240, 360), classes, 5) for classes in (2, 5, 10, 21, 42, 84)],
    "iterations": [((240, 360), CLASSES, iterations) for iterations in (1, 2, 5, 10, 20)],
}


def problem(photo: str, size: tuple[int, int], classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits (1, L, H, W) and image (1, 3, H, W), whole numbers in 0..255."""
    image = torch.tensor(load_sample_image(photo)).permute(2, 0, 1)[None].float()
    image = interpolate(image, size=size, mode="bilinear", antialias=True).round().clamp(0, 255)
    coarse = 3 * torch.randn(1, classes, size[0] // 20, size[1] // 20, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, size=size, mode="bilinear").contiguous(), image


@torch.no_grad()
def ours(net: CRFasRNN, logits: Tensor, image: Tensor, iterations: int) -> Tensor:
    return net(logits, image, num_iters=iterations)[0].softmax(0)


def theirs(logits: Tensor, image: Tensor, iterations: int) -> Tensor:
    import pydensecrf.densecrf as dcrf

    classes, height, width = logits.shape[1:]
    crf = dcrf.DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy((-logits[0]).flatten(1).numpy())
    pixels = image[0].permute(1, 2, 0).contiguous().byte().numpy()
    crf.addPairwiseGaussian(sxy=3, compat=3, normalization=dcrf.NORMALIZE_AFTER)
    crf.addPairwiseBilateral(sxy=160, srgb=3, rgbim=pixels, compat=5, normalization=dcrf.NORMALIZE_AFTER)
    return torch.from_numpy(np.array(crf.inference(iterations))).reshape(classes, height, width)


def fastest(
    functions: dict[str, Callable[[], Any]], clock: Callable[[], float], repeats: int = 8, warm_up: int = 2
) -> dict[str, float]:
    """Seconds of each function, called in turn: the least of the repeats after the warm-up."""
    best = dict.fromkeys(functions, float("inf"))
    for k in range(warm_up + repeats):
        for name, function in functions.items():
            begin = clock()
            function()
            if k >= warm_up:
                best[name] = min(best[name], clock() - begin)
    return best


def compare(repeats: int, threads_to_time: list[int]) -> dict[str, Any]:
    nets = {"ours": CRFasRNN(CLASSES, weights=Weights.SCALAR), "learned": CRFasRNN(CLASSES)}
    agreement: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    for size in tqdm(SIZES, desc="agreement"):
        for photo in ("china.jpg", "flower.jpg"):
            for seed in range(3):
                logits, image = problem(photo, size, CLASSES, seed)
                expected, found = theirs(logits, image, 10), ours(nets["ours"], logits, image, 10)
                gap = (found - expected).abs()
                labels = (found.argmax(0) == expected.argmax(0)).double().mean()
                agreement.append(
                    {"size": size, "photo": photo, "seed": seed, "labels": labels.item(), "mean": gap.mean().item()}
                    | {"max": gap.max().item()}
                )
    plans = [(threads, size) for threads in threads_to_time for size in SIZES]
    for threads, size in tqdm(plans, desc="time"):
        torch.set_num_threads(threads)
        logits, image = problem("china.jpg", size, CLASSES, seed=0)
        for iterations in ITERATIONS:
            calls = {name: partial(ours, net, logits, image, iterations) for name, net in nets.items()}
            calls["pydensecrf"] = partial(theirs, logits, image, iterations)
            seconds = fastest(calls, time.process_time if threads == 1 else time.perf_counter, repeats)
            times.append({"threads": threads, "size": size, "iterations": iterations, **seconds})
    torch.set_num_threads(1)
    return {"agreement": agreement, "times": times}


def measure_point(size: tuple[int, int], classes: int, iterations: int) -> None:
    """Print CPU seconds of a call, forward and with backward, and the memory that a forward takes, as JSON."""
    torch.set_num_threads(1)
    net = CRFasRNN(classes)
    logits, image = problem("china.jpg", size, classes, seed=0)
    ours(net, *problem("china.jpg", (40, 60), classes, seed=0), iterations)  # libraries are loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours(net, logits, image, iterations)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    def backward() -> None:
        net(logits, image, num_iters=iterations).square().mean().backward()

    calls = {"forward": lambda: ours(net, logits, image, iterations), "backward": backward}
    seconds = fastest(calls, time.process_time, repeats=4)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({**seconds, "forward MB": memory, "backward MB": peak}))


def growth() -> dict[str, Any]:
    """Each point in a process of its own, so that its peak memory is its own."""
    found: dict[str, Any] = {}
    for name, points in GROWTH.items():
        found[name] = []
        for (height, width), classes, iterations in tqdm(points, desc=f"growth with {name}"):
            numbers = map(str, (height, width, classes, iterations))
            run = subprocess.run([sys.executable, __file__, "--point", *numbers], capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
            x = {"pixels": height * width, "classes": classes, "iterations": iterations}[name]
            found[name].append({name: x, **json.loads(run.stdout)})
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.2), sharey="row", constrained_layout=True)
    for column, (name, points) in enumerate(found.items()):
        x = [point[name] / (1000 if name == "pixels" else 1) for point in points]
        for row, (keys, unit) in enumerate(((("forward", "backward"), "CPU s"), (("forward MB", "backward MB"), "MB"))):
            axis = axes[row, column]
            for key, label, color in zip(keys, ("forward", "forward + backward"), ("#2a6f97", "#e07a2f")):
                axis.plot(x, [point[key] for point in points], "o-", ms=4, color=color, label=label)
            axis.set(ylim=(0, None), xlim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
            if row:
                axis.set_xlabel("thousand pixels" if name == "pixels" else name)
            if column == 0:
                axis.set_ylabel(unit)
    axes[0, 0].legend(frameon=False)
    fixed = ("21 classes, 5 iterations", "240x360, 5 iterations", "240x360, 21 classes")
    for axis, title in zip(axes[0], fixed):
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    print(f"written: {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--growth", action="store_true", help="only time and memory against the sizes, and their plot")
    parser.add_argument("--point", type=int, nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.point:
        height, width, classes, iterations = arguments.point
        measure_point((height, width), classes, iterations)
        return
    if arguments.growth:
        found = growth()
        save("crf_growth", found)
        plot(found, RESULTS / "crf_growth.png")
        return
    if find_spec("pydensecrf") is None:
        sys.exit("pydensecrf is not installed, so there is nothing to compare with: pip install pydensecrf2")
    result = compare(arguments.repeats, arguments.threads)
    print("\nagreement of the marginals after 10 iterations, worst of 2 photographs x 3 seeds")
    rows = []
    for size in SIZES:
        here = [entry for entry in result["agreement"] if entry["size"] == size]
        worst = min(e["labels"] for e in here), max(e["mean"] for e in here), max(e["max"] for e in here)
        rows.append((f"{size[0]}x{size[1]}", f"{worst[0]:.6f}", *worst[1:]))
    table(rows, ("size", "labels", "mean |dQ|", "max |dQ|"))
    for threads in arguments.threads:
        unit = "CPU ms" if threads == 1 else "wall ms"
        print(f"\n{threads} thread{'s' if threads > 1 else ''}, {unit}, {CLASSES} classes")
        rows = []
        for entry in result["times"]:
            if entry["threads"] == threads:
                base = entry["pydensecrf"]
                label = f"{entry['size'][0]}x{entry['size'][1]}"
                milliseconds = [round(1e3 * entry[name]) for name in ("pydensecrf", "ours", "learned")]
                ratios = [f"{entry[name] / base:.2f}" for name in ("ours", "learned")]
                rows.append((label, entry["iterations"], *milliseconds, *ratios))
        table(rows, ("image", "iterations", "pydensecrf", "ours", "learned", "ours / p.", "learned / p."))
    save("crf", {"repeats": arguments.repeats, **result})


if __name__ == "__main__":
    main()
