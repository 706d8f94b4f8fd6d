"""What TNRD with another data term reaches: JPEG at quality 10 by projection, images enlarged twice by an operator.

Trained on Train400's first 384 images as for denoising (five stages, 5x5), three training seeds, on one thread. PSNR of
BSD68 and Set12, sides cut to multiples of 8; for enlarging, 2 pixels at the border are left out, as usual. JPEG is that
of grey images, rounded to bytes. Published figures of TNRD, from the README of cszn/DnCNN, are on other sets: what
compares is the gain over what one starts from.

    python benchmarks/tnrd_tasks.py --data FOLDER [jpeg] [zoom] [--steps 2500] [--seeds 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save, spread, table
from denoising import images
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from train_tnrd import HELD_OUT, STAGES

from unrolled import fit
from unrolled.image import TNRD, Downsampling, JPEGBox, quantisation_table
from unrolled.metrics.image import psnr
from unrolled.recipes.denoising import denoising_optimizer, noisy_crops

QUALITY, FACTOR, CROP = 10, 2, 64
PUBLISHED = {
    "jpeg": "TNRD 29.28 on Classic5, 29.15 on LIVE1",
    "zoom": "TNRD 36.86 on Set5, 32.51 on Set14, 31.40 on BSD100",
}

Observe = Callable[[Tensor], tuple[Tensor, ...]]  # of clean images: what the network is called with


def as_bytes(x: Tensor) -> Tensor:
    return (255 * x).round().clamp(0, 255) / 255


def jpeg(box: JPEGBox) -> Observe:
    return lambda clean: (as_bytes(box.compress(255 * clean) / 255),)


def reduced(operator: Downsampling) -> Observe:
    def observe(clean: Tensor) -> tuple[Tensor, ...]:
        small = as_bytes(operator(clean))
        return small, operator.enlarge(small)

    return observe


def untrained(task: str) -> tuple[TNRD, Observe]:
    """The network for crops, and what it sees of them."""
    if task == "jpeg":
        box = JPEGBox(quantisation_table(QUALITY))
        return TNRD(STAGES, sigma=10, projection=box), jpeg(box)
    operator = Downsampling(FACTOR, (1, CROP, CROP))
    return TNRD(STAGES, sigma=5, operator=operator), reduced(operator)


def batches(clean: Tensor, observe: Observe, seed: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    for _, x in noisy_crops(clean, 1.0, crop=CROP, seed=seed):
        yield observe(x), x


def squared_error(net: TNRD, batch: tuple[tuple[Tensor, ...], Tensor]) -> Tensor:
    return (255 * (net(*batch[0]) - batch[1])).square().mean()


def train(task: str, clean: Tensor, num_steps: int, seed: int) -> tuple[TNRD, float]:
    net, observe = untrained(task)
    optimizer = denoising_optimizer(net)
    begin = time.process_time()
    fit(
        net,
        batches(clean, observe, seed),
        squared_error,
        num_steps=num_steps,
        optimizer=optimizer,
        scheduler=CosineAnnealingLR(optimizer, num_steps),
        progress=True,
    )
    return net, time.process_time() - begin


@torch.no_grad()
def quality(task: str, net: TNRD | None, test: list[Tensor]) -> float:
    """Mean PSNR; without a network, of what one starts from."""
    found = []
    for image in test:
        height, width = (side // 8 * 8 for side in image.shape[-2:])
        clean = image[..., :height, :width]
        if task == "jpeg":
            observed, own = jpeg(JPEGBox(quantisation_table(QUALITY)))(clean), net
        else:
            operator = Downsampling(FACTOR, (1, height, width))
            observed, own = reduced(operator)(clean), None if net is None else net.with_operator(operator)
        out = observed[-1] if own is None else own(*observed)
        border = 0 if task == "jpeg" else FACTOR
        inner = (..., slice(border, height - border), slice(border, width - border))
        found.append(psnr(as_bytes(out)[inner], clean[inner]).item())
    return float(np.mean(found))


def measure(task: str, folder: Path, num_steps: int, seeds: int) -> dict[str, Any]:
    with np.load(folder / "train400.npz") as arrays:
        clean = torch.from_numpy(arrays["x"]).float().unsqueeze(1)[:-HELD_OUT] / 255
    tests = {name: images(folder, name.lower()) for name in ("BSD68", "Set12")}
    start = {name: quality(task, None, test) for name, test in tests.items()}
    classical = {name: quality(task, untrained(task)[0], test) for name, test in tests.items()}
    runs = []
    for seed in range(seeds):
        net, seconds = train(task, clean, num_steps, seed)
        runs.append({"seed": seed, "cpu_seconds": seconds} | {n: quality(task, net, test) for n, test in tests.items()})
    result = {"task": task, "steps": num_steps, "start": start, "untrained": classical, "runs": runs}
    result["trained"] = {name: spread([run[name] for run in runs]) for name in tests}
    rows = [
        [label, *(values[name] if isinstance(values[name], float) else values[name]["median"] for name in tests)]
        for label, values in (("start", start), ("untrained", classical), ("trained, median", result["trained"]))
    ]
    table(rows, [task, *tests])
    print(f"published: {PUBLISHED[task]}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[[], *PUBLISHED], default=[])
    parser.add_argument("--data", type=Path, required=True, help="folder with train400.npz, bsd68.npz, set12.npz")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for task in arguments.tasks or PUBLISHED:
        save(f"tnrd_{task}", measure(task, arguments.data, arguments.steps, arguments.seeds))


if __name__ == "__main__":
    main()
