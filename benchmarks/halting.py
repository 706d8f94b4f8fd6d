"""Claim: a LISTA that learns when to stop needs fewer iterations on average for the same error.

Codes of 100 atoms, 50 measurements, 40 dB. What makes a signal hard is how many nonzeros its code has. Three problems:

even              each code's share of nonzeros is drawn evenly from 1 to 15 per cent
two kinds         half of the codes have 2 per cent of nonzeros, half 12 per cent, in expectation
two kinds, tied   the same codes, for a recurrent network: 24 iterations with one set of parameters, 400 updates at once

Everything is measured on 4,000 fresh signals, by NMSE (sum of squared errors over sum of squared codes, in dB) against
the mean number of iterations used:

fixed          one network for each depth K, trained by itself on the error after its K layers
cut short      one network trained on the errors of all its layers, cut after k of them for all signals alike
tolerance      that network, stopped by `Tolerance(rtol)` for several rtol
halting        a network that began as that one, with `Halting`, trained further on `ExpectedLoss` for several weights
best possible  the network of `cut short`, stopped where it would be best if the code were known (nobody can)

The first phase trains a LISTA of 12 untied layers on the mean error of all of them, so that each layer is an answer.
The second trains it again for as long: with `ExpectedLoss` for `halting`, and as before for what is cut short, stopped
by a tolerance or stopped where it is best. `fixed` has the updates of both phases. Three seeds, one thread.

The tied network halts from its first update on; what is cut short or stopped by a tolerance is another one, trained on
the errors of all its layers. All have the same number of updates.

    python benchmarks/halting.py [--steps 600] [--seeds 3] [--jobs 1] [--only "two kinds"]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from _common import RESULTS, save, spread, table
from torch import Tensor, nn
from tqdm import tqdm

from unrolled import LISTA, Tolerance, Trace, fit
from unrolled.functional import normalize_columns
from unrolled.losses import CodeError
from unrolled.stopping import ExpectedLoss, Halting, Settling

M, N, LAYERS, ALPHA, BATCH = 50, 100, 12, 0.1, 128
SNR = 40.0
# Borders between groups of signals by the share of their nonzeros, to tell who uses how many iterations.
TWO = [0.01, 0.07, 0.15]
GROUPS = {"even": [0.01 + 0.02 * k for k in range(8)], "two kinds": TWO, "two kinds, tied": TWO}
TIED, TIED_STEPS, TIED_DEPTHS, TIED_WEIGHTS = 24, 400, (6, 9, 12, 18, 24), (0.2, 0.1, 0.05)
DEPTHS = (3, 6, 9, 12)
WEIGHTS = (2.0, 0.6, 0.2)
RTOLS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)


class Signals:
    """Codes of differing density, their measurements, as many as asked for."""

    def __init__(self, problem: str, seed: int) -> None:
        self.problem = problem
        self.dictionary = normalize_columns(torch.randn(M, N, generator=torch.Generator().manual_seed(seed)))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        density = torch.rand(count, 1, generator=generator)
        density = 0.01 + 0.14 * density if self.problem == "even" else torch.where(density < 0.5, 0.02, 0.12)
        x = torch.randn(count, N, generator=generator) * (torch.rand(count, N, generator=generator) < density)
        y = x @ self.dictionary.T
        noise = torch.randn(count, M, generator=generator) * y.std(1, keepdim=True) * 10 ** (-SNR / 20)
        return y + noise, x, density

    def batches(self, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.draw(BATCH, generator)[:2]


class EveryLayer(nn.Module):
    """The mean error of all layers."""

    def forward(self, net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([each(found, batch).mean() for found in net.iterates(batch[0])]).mean()


def each(found: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (found - batch[1]).square().sum(-1)


def trained(net: LISTA, problem: Signals, loss: Any, num_steps: int, seed: int, lr: float = 1e-3) -> LISTA:
    groups = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "lr": lr},
        {"params": [p for p in net.parameters() if p.dim() < 2], "lr": 10 * lr},
    ]
    optimizer = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    batches = problem.batches(1000 + seed)
    fit(net, batches, loss, num_steps=num_steps, optimizer=optimizer, scheduler=scheduler, seed=seed)
    return net


@torch.no_grad()
def measured(net: LISTA, y: Tensor, x: Tensor) -> dict[str, Any]:
    with Trace(net) as trace:
        found = net(y)
    used = trace.num_iters if isinstance(trace.num_iters, Tensor) else torch.full((len(y),), trace.num_iters)
    error = (found - x).square().sum(-1)
    return {"iterations": float(used.double().mean()), "nmse": decibels(error, x), "used": used}


def decibels(error: Tensor, x: Tensor) -> float:
    return float(10 * (error.sum() / x.square().sum()).log10())


@torch.no_grad()
def best_possible(net: LISTA, y: Tensor, x: Tensor) -> list[dict[str, float]]:
    """For prices of an iteration: every signal stops where its own error plus its own price is least."""
    errors = torch.stack([(found - x).square().sum(-1) for found in net.iterates(y)], -1)
    points = []
    for price in torch.logspace(-4, 0.5, 24):
        best = (errors + price * torch.arange(1, len(net) + 1)).argmin(-1)
        error = errors.gather(-1, best[:, None])
        points.append({"iterations": float(best.double().mean()) + 1, "nmse": decibels(error, x)})
    return points


def run(name: str, seed: int, num_steps: int) -> dict[str, Any]:
    if name.endswith("tied"):
        return run_tied(name, seed)
    begin = time.process_time()
    problem = Signals(name, seed)
    y, x, density = problem.draw(4000, torch.Generator().manual_seed(777 + seed))
    rows: dict[str, list[dict[str, Any]]] = {}

    def network(layers: int) -> LISTA:
        return LISTA(problem.dictionary, layers, alpha=ALPHA)

    def plain(point: dict[str, Any], **known: Any) -> dict[str, Any]:
        return known | {name: value for name, value in point.items() if name != "used"}

    rows["fixed"] = []
    for depth in DEPTHS:
        # As many updates as the halting network gets in both of its phases.
        net = trained(network(depth), problem, CodeError(), 2 * num_steps, seed)
        rows["fixed"].append(plain(measured(net, y, x), depth=depth))
    shared = trained(network(LAYERS), problem, EveryLayer(), num_steps, seed)
    rows["halting"], by_density = [], []
    for weight in WEIGHTS:
        net = copy.deepcopy(shared)
        net.stop = Halting(Settling(0.1))
        trained(net, problem, ExpectedLoss(each, weight=weight), num_steps, seed)
        point = measured(net, y, x)
        rows["halting"].append(plain(point, weight=weight, relative=float(net.stop.head.relative.detach())))
        which = torch.bucketize(density.flatten(), torch.tensor(GROUPS[name][1:-1]))
        groups = range(len(GROUPS[name]) - 1)
        by_density.append([float(point["used"][which == group].double().mean()) for group in groups])
    # The same training without halting, so that what is cut or stopped by a tolerance has seen as much.
    more = trained(copy.deepcopy(shared), problem, EveryLayer(), num_steps, seed)
    rows["cut short"] = [plain(measured(more[:depth], y, x), depth=depth) for depth in range(1, LAYERS + 1)]
    rows["tolerance"] = []
    for rtol in RTOLS:
        more.stop = Tolerance(rtol)
        rows["tolerance"].append(plain(measured(more, y, x), rtol=rtol))
    more.stop = None
    rows["best possible"] = best_possible(more, y, x)
    seconds = time.process_time() - begin
    return {
        "problem": name,
        "seed": seed,
        "steps": num_steps,
        "rows": rows,
        "used by density": by_density,
        "cpu_seconds": seconds,
    }


def run_tied(name: str, seed: int) -> dict[str, Any]:
    begin = time.process_time()
    problem = Signals(name, seed)
    y, x, density = problem.draw(4000, torch.Generator().manual_seed(777 + seed))

    def network(layers: int, **options: Any) -> LISTA:
        return LISTA(problem.dictionary, layers, alpha=ALPHA, tied=True, **options)

    def point(net: LISTA, **known: Any) -> dict[str, Any]:
        return known | measured(net, y, x)

    fixed = [
        point(trained(network(depth), problem, CodeError(), TIED_STEPS, seed), depth=depth) for depth in TIED_DEPTHS
    ]
    halting = []
    for weight in TIED_WEIGHTS:
        net = network(TIED, stop=Halting(Settling(0.05)))
        halting.append(point(trained(net, problem, ExpectedLoss(each, weight=weight), TIED_STEPS, seed), weight=weight))
    hard = density.flatten() > TWO[1]
    by_density = [[float(p["used"][hard == kind].double().mean()) for kind in (False, True)] for p in halting]
    every = trained(network(TIED), problem, EveryLayer(), TIED_STEPS, seed)
    cut = [point(every[:depth], depth=depth) for depth in range(1, TIED + 1)]
    tolerance = []
    for rtol in RTOLS:
        every.stop = Tolerance(rtol)
        tolerance.append(point(every, rtol=rtol))
    every.stop = None
    rows = {"fixed": fixed, "halting": halting, "cut short": cut, "tolerance": tolerance}
    plain = {name: [{k: v for k, v in p.items() if k != "used"} for p in points] for name, points in rows.items()}
    return {
        "problem": name,
        "seed": seed,
        "steps": TIED_STEPS,
        "rows": plain | {"best possible": best_possible(every, y, x)},
        "used by density": by_density,
        "cpu_seconds": time.process_time() - begin,
    }


def at_equal_error(points: list[dict[str, Any]], nmse: float) -> float:
    """Iterations that a method needs for this NMSE, between its points in a straight line; NaN out of their range."""
    points = sorted(points, key=lambda point: point["iterations"])
    for low, high in itertools.pairwise(points):
        if high["nmse"] <= nmse <= low["nmse"]:
            share = (low["nmse"] - nmse) / max(low["nmse"] - high["nmse"], 1e-12)
            return low["iterations"] + share * (high["iterations"] - low["iterations"])
    return float("nan")


def judge(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `halting` uses, and what the others need for its error."""
    told = []
    for problem in GROUPS:
        own = [one for one in runs if one["problem"] == problem]
        for k in range(len(own[0]["rows"]["halting"]) if own else 0):
            points = [one["rows"]["halting"][k] for one in own]
            weight = points[0]["weight"]
            used = {key: spread([p[key] for p in points]) for key in ("iterations", "nmse")}
            needs = {
                other: [at_equal_error(one["rows"][other], p["nmse"]) for one, p in zip(own, points)]
                for other in ("fixed", "cut short", "tolerance")
            }
            told.append({"problem": problem, "weight": weight, **used, "needs": needs})
    table(
        [
            [
                f"{row['problem']}, {row['weight']:g}",
                "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["iterations"]),
                "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["nmse"]),
                *(", ".join(f"{n:.1f}" for n in needs) for needs in row["needs"].values()),
            ]
            for row in told
        ],
        ["weight", "mean iterations", "NMSE, dB", "fixed needs", "cut short needs", "tolerance needs"],
    )
    return told


def plot(runs: list[dict[str, Any]]) -> None:
    """Error against mean iterations, one panel a problem, one line a method and seed."""
    from matplotlib.figure import Figure

    colours = {"fixed": "#000000", "cut short": "#56B4E9", "tolerance": "#E69F00"}
    colours |= {"halting": "#D55E00", "best possible": "#999999"}  # of Okabe and Ito
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, problem in zip(figure.subplots(1, len(GROUPS)), GROUPS):
        for one in [one for one in runs if one["problem"] == problem]:
            for name, colour in colours.items():
                points = sorted((p["iterations"], p["nmse"]) for p in one["rows"][name])
                style = {"linestyle": ":"} if name == "best possible" else {"marker": "o", "markersize": 3}
                label = name if one["seed"] == 0 else None
                axes.plot(*zip(*points), color=colour, linewidth=1.3, label=label, **style)
        axes.set(xlabel="mean iterations used", ylabel="NMSE in dB", title=problem)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(RESULTS / "halting.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="updates in each of the two phases")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on a thread of its own")
    parser.add_argument("--only", choices=list(GROUPS), help="one of the problems")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    tasks = [(name, seed) for name in GROUPS for seed in range(arguments.seeds) if arguments.only in (None, name)]
    path = RESULTS / "halting.json"
    runs = json.loads(path.read_text())["runs"] if arguments.only and path.exists() else []
    runs = [one for one in runs if one["problem"] != arguments.only]  # the other problem's results stay
    with ProcessPoolExecutor(arguments.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(run, name, seed, arguments.steps) for name, seed in tasks]
        for job in tqdm(as_completed(jobs), total=len(jobs)):
            runs.append(job.result())
            runs.sort(key=lambda one: (list(GROUPS).index(one["problem"]), one["seed"]))
            # After every run, so that one that is interrupted leaves what it had.
            save("halting", {"summary": judge(runs), "runs": runs})
    plot(runs)


if __name__ == "__main__":
    main()
