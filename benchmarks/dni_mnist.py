"""Claim: modules that are updated without waiting for backpropagation learn MNIST, nearly as well if conditioned.

Four fully connected layers, 784-256-256-256-10 with batch normalisation and ReLU. Each layer is a module of its own
with its own Adam (a cosine to 0), batches of 256; the last 5000 training images are for validation, by which rates and
synthesisers were chosen on a seed that is not reported.

backprop   the same layers, trained through
DNI        synthesisers with three hidden layers of 256 see the activation alone: to say where the loss would fall they
           must tell the classes apart as well as the network does. So it learns slowly beside them, at rates of 3e-5,
           3e-5, 1e-4 for 25 epochs; at 1e-3 they never catch up (23 % after six, with one hidden layer). The last
           layer, which has the true gradient, learns at 1e-3. Runs in the file that have a `recipe` are older
cDNI       affine synthesisers that see the labels too
cDNI, unlocked   layers do not even wait for the forward pass: each runs on a prediction of its input from the image.
           Batch statistics are taken anew on true activations before it is tested.

With a probability below 1 each layer skips its update at random. Wanted: cDNI at most 2.5 % test error and DNI at most
4 % at probability 1, and both learn at 0.2. Three seeds, one thread.

    python benchmarks/dni_mnist.py --data mnist.npz [--seeds 3] [--only DNI]

`--only` trains some methods, and takes the others from the file.

`--data` is a file (or a folder with a file mnist.npz) with arrays x (70000, 28, 28) and y.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save, spread, table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from unrolled.decoupled import DecoupledChain, LinearSynthesiser, MLPSynthesiser, Synthesiser

WIDTH, BATCH, VALIDATION = 256, 256, 5000
RATES = {  # of the four layers, and of what is learned beside them
    "backprop": (4 * (1e-3,), 0.0),
    "DNI": ((3e-5, 3e-5, 1e-4, 1e-3), 1e-3),
    "cDNI": (4 * (1e-3,), 3e-3),
    "cDNI, unlocked": (4 * (1e-3,), 3e-3),
}
EPOCHS = {"backprop": 6, "DNI": 25, "cDNI": 6, "cDNI, unlocked": 6}
RUNS = [
    *((kind, p) for kind in ("backprop", "DNI", "cDNI") for p in (1.0, 0.2, 0.05)),
    ("cDNI, unlocked", 1.0),
]


def layers() -> list[nn.Module]:
    sizes = [784, WIDTH, WIDTH, WIDTH]
    hidden = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return [*hidden, nn.Linear(WIDTH, 10)]


class Backpropagated(nn.Module):
    """The chain with `update` as `DecoupledChain` has it, by backpropagation."""

    def __init__(self, modules: list[nn.Module], optimizer: Any, probability: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*modules)
        self.optimizers = [optimizer(module.parameters()) for module in modules]
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def update(self, x: Tensor, target: Tensor, loss: Any) -> Tensor:
        self.layers.zero_grad()
        value = loss(self(x), target)
        value.backward()
        for optimizer in self.optimizers:
            if torch.rand(()) < self.probability:
                optimizer.step()
        return value.detach()


def build(kind: str, probability: float) -> Any:
    of_layers, rate_beside = RATES[kind]
    beside = functools.partial(torch.optim.Adam, lr=rate_beside)
    rates = iter(of_layers)

    def adam(parameters: Iterable[Tensor]) -> torch.optim.Adam:  # called once for each layer, in their order
        return torch.optim.Adam(parameters, lr=next(rates))

    if kind == "backprop":
        return Backpropagated(layers(), adam, probability)
    synthesiser: Synthesiser = (
        MLPSynthesiser(WIDTH, hidden=3 * (WIDTH,)) if kind == "DNI" else LinearSynthesiser(WIDTH, condition=10)
    )
    predictions = None
    if "unlocked" in kind:
        predictions = [nn.Sequential(nn.Linear(784, WIDTH), nn.ReLU()) for _ in range(3)]
    return DecoupledChain(
        layers(), synthesiser, adam, synthesiser_optimizer=beside, probability=probability, input_model=predictions
    )


def train(
    kind: str, probability: float, seed: int, data: dict[str, tuple[Tensor, Tensor]], epochs: int
) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = build(kind, probability)
    x, labels = data["train"]
    per_epoch = len(x) // BATCH
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(one, epochs * per_epoch) for one in net.optimizers]
    curve, begin = [], time.process_time()
    for _ in range(epochs):
        net.train()
        for part in torch.randperm(len(x))[: per_epoch * BATCH].split(BATCH):
            net.update(x[part], labels[part], F.cross_entropy)
            for scheduler in schedulers:
                scheduler.step()
        if "unlocked" in kind:
            settle(net, x)
        curve.append(wrong(net, *data["validation"]))
    seconds = time.process_time() - begin
    return {
        "kind": kind,
        "probability": probability,
        "seed": seed,
        "validation error by epoch": curve,
        "test error": wrong(net, *data["test"]),
        "cpu_seconds": seconds,
    }


@torch.no_grad()
def settle(net: nn.Module, x: Tensor) -> None:
    """Batch statistics of the activations that the layers have when they run one after another."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    for part in x[:10_000].split(1000):
        net(part)
    for norm in norms:
        norm.momentum = 0.1


@torch.no_grad()
def wrong(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    net.eval()
    return float((net(x).argmax(1) != labels).float().mean())


def load(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    with np.load(path / "mnist.npz" if path.is_dir() else path) as arrays:
        x = torch.from_numpy(arrays["x"].reshape(-1, 784).astype(np.float32)).div(255).sub(0.1307).div(0.3081)
        y = torch.from_numpy(arrays["y"].astype(np.int64))
    first = 60_000 - VALIDATION
    parts = {"train": slice(0, first), "validation": slice(first, 60_000), "test": slice(60_000, None)}
    return {name: (x[part], y[part]) for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # A layer that skips its first update has a schedule that is ahead of its optimiser, as it should.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    data = load(arguments.data)
    RESULTS.mkdir(exist_ok=True)
    runs: list[dict[str, Any]] = []
    # Seed by seed, so that an interrupted run leaves all methods with equally many.
    chosen = [run for run in RUNS if run[0] in arguments.only]
    if len(chosen) < len(RUNS):
        before = json.loads((RESULTS / "dni_mnist.json").read_text())["runs"]
        runs += [run for run in before if run["kind"] not in arguments.only]
    for seed, (kind, p) in tqdm([(seed, run) for seed in range(arguments.seeds) for run in chosen]):
        runs.append(train(kind, p, seed, data, EPOCHS[kind]))
        (RESULTS / "dni_partial.json").write_text(json.dumps(runs))
    (RESULTS / "dni_partial.json").unlink()
    result = judge(runs)
    save("dni_mnist", result)
    plot(result)


def judge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for kind, p in RUNS:
        own = [run for run in runs if run["kind"] == kind and run["probability"] == p]
        error = spread([100 * run["test error"] for run in own])
        cpu = sum(run["cpu_seconds"] for run in own) / len(own)
        rows.append({"method": kind, "probability": p, "test error, %": error, "CPU s": cpu})
    told = "{median:.2f} ({min:.2f} to {max:.2f})"
    table(
        [[r["method"], r["probability"], told.format(**r["test error, %"]), r["CPU s"]] for r in rows],
        list(rows[0]),
    )
    return {"epochs": EPOCHS, "batch": BATCH, "rates": RATES, "rows": rows, "runs": runs}


def plot(result: dict[str, Any]) -> None:
    """Validation error against epochs, median of the seeds, a panel for each probability."""
    from matplotlib.figure import Figure

    colours = {"backprop": "#000000", "DNI": "#D55E00", "cDNI": "#0072B2", "cDNI, unlocked": "#009E73"}  # Okabe and Ito
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    probabilities = sorted({run["probability"] for run in result["runs"]}, reverse=True)
    for axes, p in zip(figure.subplots(1, len(probabilities), sharey=True), probabilities):
        for kind, colour in colours.items():
            own = [run for run in result["runs"] if run["kind"] == kind and run["probability"] == p]
            if own:
                curves = 100 * np.array([run["validation error by epoch"] for run in own])
                axes.semilogy(
                    range(1, curves.shape[1] + 1), np.median(curves, 0), color=colour, linewidth=2, label=kind
                )
        axes.set_title(f"update probability {p:g}", fontsize=10)
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
    ticks = [1.5, 2, 3, 5, 10, 20, 40]
    figure.axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.axes[0].minorticks_off()
    figure.axes[0].set_ylabel("validation error, %")
    figure.axes[0].legend(frameon=False)
    figure.savefig(RESULTS / "dni_mnist.png", dpi=110)


if __name__ == "__main__":
    main()
