"""Claim: from 3 to 10 layers a trained SC2Net has a lower Lasso objective than tied LISTA and LFISTA.

Which one: on whole images, SC2Net as it comes. On patches it is below both up to depth 4 only, and "SC2Net, relaxed" is
at every depth: it starts from relaxed ISTA and has gate biases of its own in every layer. On images that one is not
below at depth 3.

MNIST, 100 atoms, alpha 0.1, on 8x8 patches (mean 0, norm 1) and on whole images (norm 1). Every network is trained on
the objective for the same number of steps on the same batches, at the learning rate that gives the lowest objective on
validation data: one for depths up to 5 and one beyond, chosen from the same list for all, at depths 3 and 8 with seed
0. Test data are of the 10,000 test images. The gap is the mean of (F - F*) / F*, with F* of FISTA with restart in
float64, run to 1e-8. Three seeds: of the samples, the dictionary and the batches. One thread, CPU seconds.

    python benchmarks/sc2net.py --data FOLDER [--task patches|images|gates]

FOLDER holds mnist.npz: x (70000, 28, 28), the test images last. The task "gates" compares, on patches, the ways to
start the gates.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import RESULTS, save, table
from torch import Tensor
from tqdm import tqdm

from unrolled import LFISTA, LISTA, Unroll, fit
from unrolled.demo.data import choose, learn_dictionary
from unrolled.losses import Lasso
from unrolled.solvers import fista, ista, lasso_objective
from unrolled.sparse import CentredGates, SC2Net, SigmoidGates
from unrolled.sparse.adaptive import AdaptiveISTA

ATOMS, ALPHA, STEPS, BATCH, SIDE = 100, 0.1, 400, 64, 8
RATES = (1e-3, 2e-3, 4e-3)  # of the matrices; vectors learn ten times as fast
CHOICE = {3: range(1, 6), 8: range(6, 11)}  # rates are chosen at these depths for those

# All layers share everything but, in two of them, the biases of the gates or the gates.
OWN_BIASES = ("weight", "inhibition", "gate_weight", "gate_inhibition", "log_theta")
NETWORKS: dict[str, Callable[[Tensor, int], Unroll]] = {
    "LISTA": lambda D, K: LISTA(D, K, alpha=ALPHA, tied=True),
    "LFISTA": lambda D, K: LFISTA(D, K, alpha=ALPHA, tied=True),
    "SC2Net": lambda D, K: SC2Net(D, K, alpha=ALPHA),
    "SC2Net, relaxed": lambda D, K: SC2Net(D, K, alpha=ALPHA, gates=CentredGates(relaxation=1.5), tied=OWN_BIASES),
    "SC2Net, scalar gates": lambda D, K: SC2Net(D, K, alpha=ALPHA, gates=CentredGates(scalar=True)),
    "SC2Net, published gates": lambda D, K: SC2Net(D, K, alpha=ALPHA, gates=SigmoidGates()),
    "AdaptiveISTA": lambda D, K: AdaptiveISTA(D, K, alpha=ALPHA),
}
TASKS = {
    "patches": ("LISTA", "LFISTA", "SC2Net", "SC2Net, relaxed", "SC2Net, scalar gates", "AdaptiveISTA"),
    "images": ("LISTA", "LFISTA", "SC2Net", "SC2Net, relaxed"),
    "gates": ("SC2Net", "SC2Net, published gates"),
}
DEPTHS = {"patches": range(1, 11), "images": (3, 6, 10), "gates": (3, 5, 10)}


class Data(NamedTuple):
    learning: Tensor  # (20000, m)
    validation: Tensor  # (1000, m)
    testing: Tensor  # (2000, m)
    dictionary: Tensor  # (m, 100)


def mnist(folder: Path | None) -> np.ndarray:
    """(70000, 28, 28), the last 10,000 to test on."""
    path = None if folder is None else folder / "mnist.npz" if folder.is_dir() else folder
    if path is None or not path.is_file():
        raise SystemExit(f"--data: a folder with mnist.npz is needed (x: (70000, 28, 28) uint8), got {folder}.")
    with np.load(path) as arrays:
        return arrays["x"]


def samples(task: str, images: np.ndarray, count: int, generator: torch.Generator) -> Tensor:
    """`count` random images of norm 1, or patches of mean 0 and norm 1 with some structure."""
    chosen = torch.randint(len(images), (3 * count,), generator=generator)
    x = torch.from_numpy(images)[chosen].float() / 255
    if task == "images":
        x = x[:count].flatten(1)
        return x / x.norm(dim=1, keepdim=True)
    row, column = torch.randint(x.shape[1] - SIDE + 1, (2, len(x), 1, 1), generator=generator)
    index = torch.arange(SIDE)
    x = x[torch.arange(len(x))[:, None, None], row + index[:, None], column + index].flatten(1)
    x = x - x.mean(1, keepdim=True)
    norm = x.norm(dim=1, keepdim=True)
    kept = norm[:, 0] > 0.5
    return (x[kept] / norm[kept])[:count]


def prepare(task: str, x: np.ndarray, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    learning = samples(task, x[:50_000], 20_000, generator)
    validation = samples(task, x[50_000:60_000], 1_000, generator)
    testing = samples(task, x[60_000:], 2_000, generator)
    return Data(learning, validation, testing, learn_dictionary(learning[:3_000], ATOMS, ALPHA, passes=2, seed=seed))


def train(name: str, depth: int, rate: float, data: Data, seed: int) -> tuple[Unroll, float]:
    """The trained network, and the CPU seconds that it took."""
    generator = torch.Generator().manual_seed(seed)
    net = NETWORKS[name](data.dictionary, depth)
    rates = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "lr": rate},
        {"params": [p for p in net.parameters() if p.dim() < 2], "lr": 10 * rate},
    ]
    optimizer = torch.optim.Adam(rates)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batches = (choose(data.learning, BATCH, generator) for _ in iter(int, 1))
    loss = Lasso(data.dictionary, ALPHA)
    return net, fit(net, batches, loss, num_steps=STEPS, optimizer=optimizer, scheduler=scheduler).seconds


@torch.no_grad()
def objective(codes: Tensor, data: Data, y: Tensor) -> Tensor:
    return lasso_objective(data.dictionary.double(), y.double(), codes.double(), ALPHA)


def choose_rates(task: str, data: Data, bar: Any) -> dict[str, dict[int, float]]:
    """For every network the rate of every depth, on validation data."""
    chosen: dict[str, dict[int, float]] = {name: {} for name in TASKS[task]}
    for name in TASKS[task]:
        for depth, served in CHOICE.items():
            found = {}
            for rate in RATES:
                net, _ = train(name, depth, rate, data, seed=0)
                with torch.no_grad():
                    found[rate] = objective(net(data.validation), data, data.validation).mean().item()
                bar.update()
            chosen[name] |= dict.fromkeys(served, min(found, key=found.__getitem__))
    return chosen


def run(task: str, data: Data, rates: dict[str, dict[int, float]], seed: int, bar: Any) -> dict[str, Any]:
    D, y = data.dictionary, data.testing
    best = objective(fista(D.double(), y.double(), ALPHA, num_iters=10_000, restart=True, tol=1e-8), data, y)

    def record(codes: Tensor) -> dict[str, float]:
        value = objective(codes, data, y)
        return {
            "gap": ((value - best) / best).mean().item(),
            "objective": value.mean().item(),
            "nonzeros": (codes != 0).sum(1).double().mean().item(),
        }

    rows: dict[str, Any] = {name: {} for name in ("ISTA", "FISTA", *TASKS[task])}
    for depth in DEPTHS[task]:
        rows["ISTA"][depth] = record(ista(D, y, ALPHA, num_iters=depth))
        rows["FISTA"][depth] = record(fista(D, y, ALPHA, num_iters=depth))
        for name in TASKS[task]:
            net, seconds = train(name, depth, rates[name][depth], data, seed)
            with torch.no_grad():
                codes = net(y)
            size = sum(parameter.numel() for parameter in net.parameters())
            rows[name][depth] = record(codes) | {"parameters": size, "training seconds": seconds}
            bar.update()
    return {"best objective": best.mean().item(), "networks": rows}


def median(runs: list[dict[str, Any]], name: str, depth: int) -> float:
    return statistics.median(run["networks"][name][depth]["gap"] for run in runs)


def report(task: str, runs: list[dict[str, Any]]) -> None:
    networks, depths = runs[0]["networks"], DEPTHS[task]
    rows = [
        [name, networks[name][10].get("parameters", 0), *(median(runs, name, depth) for depth in depths)]
        for name in networks
    ]
    table(rows, [f"{task}: gap, median of 3 seeds", "parameters at 10", *map(str, depths)])
    if task != "gates":
        for name in TASKS[task][2:]:
            below = [k for k in depths if median(runs, name, k) < min(median(runs, o, k) for o in ("LISTA", "LFISTA"))]
            print(f"{name} below LISTA and LFISTA at depths {below}")


def plot(task: str, runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.2))
    depths = DEPTHS[task]
    for index, name in enumerate(name for name in runs[0]["networks"] if name != "ISTA"):
        values = [[run["networks"][name][depth]["gap"] for depth in depths] for run in runs]
        untrained = name == "FISTA"
        color = "0.5" if untrained else f"C{index - 1}"
        axis.fill_between(depths, np.min(values, 0), np.max(values, 0), color=color, alpha=0.15, lw=0)
        style = {"ls": "--", "label": "FISTA, not trained"} if untrained else {"marker": "o", "ms": 3, "label": name}
        axis.plot(depths, np.median(values, 0), color=color, **style)
    axis.set(yscale="log", xlabel="layers or iterations", ylabel="$(F - F^*) / F^*$", xticks=list(depths))
    axis.set_title(f"MNIST, {task}: objective above the Lasso's minimum", fontsize=11)
    axis.set_ylim(top=0.3)
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2]
    axis.set_yticks([], minor=True)
    axis.set_yticks([tick for tick in ticks if tick > axis.get_ylim()[0]])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"written: {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with mnist.npz, or that file")
    parser.add_argument("--task", choices=list(TASKS), default="patches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, begin = arguments.task, time.process_time()
    x = mnist(arguments.data)
    data = [prepare("images" if task == "images" else "patches", x, seed) for seed in range(3)]
    trainings = len(TASKS[task]) * (len(CHOICE) * len(RATES) + len(data) * len(DEPTHS[task]))
    with tqdm(total=trainings, desc=task, smoothing=0.0) as bar:
        rates = choose_rates(task, data[0], bar)
        runs = [run(task, data[seed], rates, seed, bar) for seed in range(3)]
    report(task, runs)
    settings = {"atoms": ATOMS, "alpha": ALPHA, "steps": STEPS, "batch": BATCH, "rates": rates}
    save(f"sc2net_{task}", {**settings, "CPU seconds": time.process_time() - begin, "seeds": runs})
    if task != "gates":
        plot(task, runs, RESULTS / f"sc2net_{task}.png")


if __name__ == "__main__":
    main()
