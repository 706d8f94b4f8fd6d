"""Claim: synthetic gradients that see the target match backpropagation, at the memory of one window.

Sparse codes of 100 entries from 50 measurements without noise, p = 0.1; LISTACP from ISTA on, squared error of the last
iterate, Adam with a cosine, gradients of the network clipped at norm 1, batches of 128. NMSE on 2000 test codes.

train   32 untied layers, windows of 8. Each strategy at its own best rate of 1e-3, 3e-3, 1e-2, chosen on the validation
        codes of seed 0; and all at 1e-3. Rates are those of matrices and synthesisers, thresholds learn at ten times
        that; with `--equal-rates` at the same, and synthesisers at 1e-3. Wanted: conditioned synthetic gradients at
        least 3 dB better than Truncated at 1e-3, within 0.5 dB of Backprop at best rates; unconditioned ones within
        1 dB of Truncated. "Slow" are those whose layers before the last window, which learn from nothing but
        estimates, learn at a hundredth of the rate. `--only` runs some strategies and takes the others from the file.
memory  Peak bytes that autograd holds for backward (parameters left out, each storage counted once) and CPU time of
        forward + backward, for 32 untied and 96 tied layers. Wanted: synthetic / Backprop at most 1/8 at 96. The sums
        of gradients that windows keep until `loss.backward()` are counted apart: one copy of the parameters.

"Local loss" gives every window the loss of its own end: the rival that has nothing to learn but the network.
Checkpointed has Backprop's gradients (the largest relative difference is measured) and so its training.

    python benchmarks/synthetic.py [train] [memory] [--steps 1000] [--seeds 3]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import RESULTS, Meter, interleaved, save, spread, table
from torch import Tensor, nn
from tqdm import tqdm

from unrolled import LISTACP, Backprop, Checkpointed, Truncated, Unroll
from unrolled.decoupled import LinearSynthesiser, MLPSynthesiser, SyntheticGradients
from unrolled.metrics import nmse_db
from unrolled.problems import SparseRecovery
from unrolled.training.windowed import WindowedLoss

M, N, LAYERS, WINDOW, BATCH = 50, 100, 32, 8, 128
RATES = (1e-3, 3e-3, 1e-2)


# ---- Strategies: of a network, a function (y, x) -> loss, and the synthesisers that learn ----------------------------


def error(codes: Tensor, x: Tensor) -> Tensor:
    return (codes - x).square().sum(1).mean()


def plain(net: Unroll, strategy: Any) -> tuple[Callable[..., Tensor], nn.Module]:
    net.gradient = strategy
    return lambda y, x: error(net(y), x), nn.Module()


def synthetic(net: Unroll, synthesiser: Any) -> tuple[Callable[..., Tensor], nn.Module]:
    learner = SyntheticGradients(net, WINDOW, synthesiser)
    return lambda y, x: error(learner(y, target=x), x), learner.synthesisers


def from_signals(net: Unroll) -> tuple[Callable[..., Tensor], nn.Module]:
    """What the network's input tells beside its state, but not the target."""
    learner = SyntheticGradients(net, WINDOW, MLPSynthesiser(N, M, hidden=(256,)))
    return lambda y, x: error(learner(y, target=y), x), learner.synthesisers


def local(net: Unroll) -> tuple[Callable[..., Tensor], nn.Module]:
    loss = WindowedLoss(lambda net, batch: error(net(batch[0]), batch[1]), every=WINDOW)
    return lambda y, x: loss(net, (y, x)), nn.Module()


STRATEGIES: dict[str, Callable[[Unroll], tuple[Callable[..., Tensor], nn.Module]]] = {
    "Backprop": lambda net: plain(net, Backprop()),
    "Truncated(8)": lambda net: plain(net, Truncated(WINDOW)),
    "synthetic, conditioned": lambda net: synthetic(net, LinearSynthesiser(N, N, difference=True)),
    "synthetic, unconditioned": lambda net: synthetic(net, MLPSynthesiser(N, hidden=(256,))),
    "synthetic, from x and y": from_signals,
    "synthetic, unconditioned, slow": lambda net: synthetic(net, MLPSynthesiser(N, hidden=(256,))),
    "synthetic, from x and y, slow": from_signals,
    "local loss": local,
}
SLOW = 0.01


# ---- Training --------------------------------------------------------------------------------------------------------


def train(name: str, rate: float, seed: int, num_steps: int, equal_rates: bool = False) -> dict[str, Any]:
    torch.manual_seed(seed)
    problem = SparseRecovery(M, N, sparsity=0.1, seed=seed)
    net = LISTACP(problem.dictionary, LAYERS, alpha=0.1)
    loss, synthesisers = STRATEGIES[name](net)
    learning = list(net.parameters())
    slow = name.endswith("slow")
    groups = [{"params": list(synthesisers.parameters()), "lr": RATES[0] if equal_rates or slow else rate}]
    for layers, own in ((net[:-WINDOW], SLOW * rate if slow else rate), (net[-WINDOW:], rate)):
        parameters = list(layers.parameters())
        groups.append({"params": [p for p in parameters if p.dim() >= 2], "lr": own})
        groups.append({"params": [p for p in parameters if p.dim() < 2], "lr": own if equal_rates else 10 * own})
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    begin = time.process_time()
    for _, (y, x) in zip(range(num_steps), problem.batches(BATCH)):
        optimizer.zero_grad()
        loss(y, x).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        scheduler.step()
    seconds = time.process_time() - begin
    net.gradient = Backprop()
    with torch.no_grad():
        found = {part: nmse_db(net(y), x) for part, (y, x) in splits(problem).items()}
    return {
        "strategy": name,
        "rate": rate,
        "seed": seed,
        "cpu_seconds": seconds,
        **{k: float(v) for k, v in found.items()},
    }


def splits(problem: SparseRecovery) -> dict[str, Any]:
    return {"validation": problem.validation(2000), "test": problem.test(2000)}


def runs_of(
    name: str, num_steps: int, seeds: int, equal_rates: bool = False, tell: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Seed 0 at every rate; the others at the smallest one and at the one that is best on seed 0's validation codes."""
    runs = []
    for rate in RATES[:2] if equal_rates else RATES:
        runs.append(train(name, rate, 0, num_steps, equal_rates))
        tell()
    for seed in range(1, seeds):
        for rate in sorted({RATES[0], best_rate(runs)}):
            runs.append(train(name, rate, seed, num_steps, equal_rates))
            tell()
    return runs


def best_rate(runs: list[dict[str, Any]]) -> float:
    return min((run for run in runs if run["seed"] == 0), key=lambda run: run["validation"])["rate"]


def compare(num_steps: int, seeds: int, equal_rates: bool, only: list[str]) -> dict[str, Any]:
    names = only or list(STRATEGIES)
    with tqdm(total=len(names) * (len(RATES) + 2 * (seeds - 1))) as progress:
        runs = [run for name in names for run in runs_of(name, num_steps, seeds, equal_rates, progress.update)]
    if only:
        before = json.loads((RESULTS / f"{file_of(equal_rates)}.json").read_text())
        if (before["steps"], before["seeds"]) != (num_steps, seeds):
            raise SystemExit("--only needs a file of as many steps and seeds")
        runs += [run for run in before["runs"] if run["strategy"] not in only]
    return judge(runs, num_steps, seeds)


def file_of(equal_rates: bool) -> str:
    return "synthetic_equal_rates" if equal_rates else "synthetic"


def judge(runs: list[dict[str, Any]], num_steps: int, seeds: int) -> dict[str, Any]:
    rows = []
    for name in STRATEGIES:
        own = [run for run in runs if run["strategy"] == name]
        if not own:
            continue
        best = best_rate(own)
        rows.append(
            {
                "strategy": name,
                "NMSE dB at 1e-3": spread([run["test"] for run in own if run["rate"] == RATES[0]]),
                "best rate": best,
                "NMSE dB at best rate": spread([run["test"] for run in own if run["rate"] == best]),
                "ms a step": 1e3 * statistics.median(run["cpu_seconds"] for run in own) / num_steps,
            }
        )
    table([[told(value) if isinstance(value, dict) else value for value in r.values()] for r in rows], list(rows[0]))
    size = {"layers": LAYERS, "window": WINDOW, "batch": BATCH}
    return {"steps": num_steps, "seeds": seeds, **size, "rows": rows, "runs": runs}


def told(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def plot(result: dict[str, Any]) -> None:
    """NMSE against the learning rate on seed 0, and of every seed at a strategy's best rate."""
    from matplotlib.figure import Figure

    colours = dict(
        zip(STRATEGIES, ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#E69F00", "#999999", "#CC79A7", "#009E73"))
    )  # of Okabe and Ito
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in result["rows"]:
        name, colour = row["strategy"], colours[row["strategy"]]
        own = [run for run in result["runs"] if run["strategy"] == name]
        first = sorted((run["rate"], run["test"]) for run in own if run["seed"] == 0)
        axes.semilogx(*zip(*first), color=colour, linewidth=2, label=name)
        for run in own:
            filled = colour if run["rate"] == row["best rate"] else "none"
            axes.plot(run["rate"], run["test"], "o", markeredgecolor=colour, markerfacecolor=filled, markersize=6)
    axes.set_ylim(-24, 0)  # what diverged is above, see the table
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.set(xlabel="learning rate (lines: seed 0; filled: best rate)", ylabel="test NMSE, dB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "synthetic.png", dpi=110)


# ---- Memory and time -------------------------------------------------------------------------------------------------


def window(net: Unroll, y: Tensor, x: Tensor) -> None:
    error(net[:WINDOW](y), x).backward()


def memory() -> dict[str, Any]:
    strategies = {**STRATEGIES, "Checkpointed(8)": lambda net: plain(net, Checkpointed(WINDOW))}
    rows = []
    for layers, tied in ((32, False), (96, True)):
        problem = SparseRecovery(M, N, sparsity=0.1, seed=0)
        y, x = next(problem.batches(BATCH))
        calls: dict[str, Callable[[], Any]] = {}
        peaks, gradients, kept = {}, {}, {}
        for name, strategy in strategies.items():
            net = LISTACP(problem.dictionary, layers, alpha=0.1, tied=tied)
            loss, _ = strategy(net)

            def call(loss: Any = loss, net: Any = net, y: Tensor = y, x: Tensor = x) -> None:
                net.zero_grad()
                loss(y, x).backward()

            peaks[name] = Meter(*net.parameters())(call)
            gradients[name] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]
            if name.startswith("Checkpointed"):  # the window that the backward pass runs once more is out of its sight
                net.gradient = Backprop()
                peaks[name] += Meter(*net.parameters())(functools.partial(window, net, y, x))
                net.gradient = Checkpointed(WINDOW)
            own = name.startswith(("synthetic", "local"))
            kept[name] = sum(p.nbytes for p in net.parameters()) if own else 0
            calls[name] = call
        seconds = interleaved(calls, 20)
        for name in strategies:
            pairs = zip(gradients[name], gradients["Backprop"])
            rows.append(
                {
                    "strategy": name,
                    "layers": layers,
                    "tied": tied,
                    "saved, kB": peaks[name] / 1000,
                    "of Backprop": peaks[name] / peaks["Backprop"],
                    "gradients kept, kB": kept[name] / 1000,
                    "forward + backward, CPU ms": 1e3 * statistics.median(seconds[name]),
                }
            )
            if name.startswith("Checkpointed"):
                largest = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)
                rows[-1]["gradient's largest relative difference from Backprop's"] = largest
    table([list(row.values())[:7] for row in rows], list(rows[0]))
    return {"window": WINDOW, "batch": BATCH, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], "train", "memory"], default=[])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--equal-rates", action="store_true", help="thresholds learn no faster than matrices")
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=[], help="strategies to train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    parts = arguments.parts or ["train", "memory"]
    if "train" in parts:
        result = compare(arguments.steps, arguments.seeds, arguments.equal_rates, arguments.only)
        save(file_of(arguments.equal_rates), result)
        if not arguments.equal_rates:
            plot(result)
    if "memory" in parts:
        save("synthetic_memory", memory())


if __name__ == "__main__":
    main()
