"""Claims: memory does not grow with the iterations where it should not, and which gradients point where.

The iteration is proximal gradient for the elastic net, tied, with W and theta learned:
x+ = soft((1 - rho / (L + rho)) x + W (y - A x), theta), W = A' / (L + rho), theta = 0.05 / (L + rho), A 50 x 100 with
columns of norm 1, codes with p = 0.1, loss = squared error of the last iterate. It contracts by about
1 - rho / (L + rho).

scaling    Peak bytes that autograd holds for backward (parameters left out, each storage counted once) and CPU time of
           forward + backward, T = 8 ... 1024, batch 128, float32, rho = 0.3. Of Checkpointed, autograd keeps the
           states; every window that its backward pass computes again is measured by itself and added to the states
           that are kept by then, and the largest sum counts. Not counted: what
           Implicit's solver holds while it runs (Anderson(5): 12 vectors of the size of the state), and the sums of
           gradients that windows keep until `backward()` (one copy of the parameters).
checkpoint Wanted at T = 96: Checkpointed / Backprop at most 1/8 of the bytes and 1.7 of the time, equal gradients.
direction  Cosine with, and distance from, the gradient of Backprop through T = 400 in float64, batch 32, for
           rho = 0.3, 0.1 and 0.03; the contraction that the guard measured, and whether it warned. Wanted: Neumann's
           100 terms within 0.02 at rho = 0.3; one step of negative cosine and a warning at rho = 0.03.
sweep      The cosine of short gradients against contraction, T = 1500.

    python benchmarks/gradients.py [scaling] [checkpoint] [direction] [sweep]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _common import RESULTS, Meter, interleaved, save, table
from torch import Tensor, nn
from tqdm import tqdm

from unrolled import LISTA, Backprop, Checkpointed, Step, Truncated, Unroll
from unrolled._tree import leaves
from unrolled.decoupled import LinearSynthesiser, SyntheticGradients
from unrolled.functional import soft_threshold
from unrolled.gradient import Anderson, GradientWarning, Implicit, Neumann, Phantom, contraction_factor
from unrolled.training.windowed import WindowedLoss

M, N = 50, 100
LENGTHS = (8, 16, 32, 64, 96, 128, 256, 512, 1024)
WINDOW = 8
SEEDS = range(3)
PARTS = ("scaling", "checkpoint", "direction", "sweep")


class ElasticNet(Step):
    """Proximal gradient for the elastic net, as above."""

    def __init__(self, A: Tensor, rho: float) -> None:
        super().__init__()
        lipschitz = torch.linalg.matrix_norm(A, 2) ** 2
        self.A = A
        self.keep = 1 - rho / (lipschitz + rho)
        self.weight = nn.Parameter(A.mT / (lipschitz + rho))
        self.theta = nn.Parameter(0.05 / (lipschitz + rho))

    def init(self, y: Tensor) -> Tensor:
        return y.new_zeros(len(y), N)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return soft_threshold(self.keep * x + (y - x @ self.A.mT) @ self.weight.mT, self.theta)


def problem(seed: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = nn.functional.normalize(torch.randn(M, N, generator=generator, dtype=dtype), dim=0)
    chosen = torch.rand(batch, N, generator=generator) < 0.1
    x = torch.randn(batch, N, generator=generator, dtype=dtype) * chosen
    return A, x @ A.mT, x


def squared_error(net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (net(batch[0]) - batch[1]).square().sum(1).mean()


def energy(net: Any, y: Tensor) -> Tensor:
    return net(y).square().sum()


def backward(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def peak_bytes(run: Callable[[], Tensor], net: Unroll, y: Tensor, *others: Tensor) -> int:
    """Of one forward and backward pass."""
    own = (y, *others, *net.parameters(), *(b for b in vars(net[0]).values() if isinstance(b, Tensor)))
    peak = Meter(*own)(lambda: run().backward())
    strategy = net.gradient
    if isinstance(strategy, Checkpointed):
        # What a window holds that runs again in the backward pass is out of the meter's sight. By then the states after
        # its own have been let go of.
        step, starts = net[0], strategy.starts(len(net))
        state = sum(leaf.nbytes for leaf in leaves(step.init(step.prepare(y))))
        net.gradient = Backprop()
        again = starts if strategy.every is None else [*starts, len(net)]  # the last window of the former is not
        for kept, (start, stop) in enumerate(itertools.pairwise(again), 1):
            part = net[: stop - start]
            window = Meter(*own)(lambda part=part: part(y).square().sum().backward())
            peak = max(peak, kept * state + window)
        net.gradient = strategy
    return peak


# ---- Memory and time against T ---------------------------------------------------------------------------------------


def contenders(A: Tensor, length: int, y: Tensor, x: Tensor) -> dict[str, tuple[Unroll, Callable[[], Tensor]]]:
    """Name -> a network and what computes its loss."""

    def net(strategy: Any) -> Unroll:
        return Unroll(ElasticNet(A, 0.3), length, gradient=strategy)

    strategies = {
        "Backprop": Backprop(),
        "Checkpointed": Checkpointed(),
        f"Truncated({WINDOW})": Truncated(WINDOW),
        f"Phantom({WINDOW}, 0.5)": Phantom(WINDOW, 0.5),
        "Implicit, Anderson": Implicit(1e-5, 500, Anderson()),
        "Implicit, Neumann": Implicit(1e-5, 500, Neumann()),
    }
    found: dict[str, tuple[Unroll, Callable[[], Tensor]]] = {}
    for name, strategy in strategies.items():
        one = net(strategy)
        found[name] = one, partial(squared_error, one, (y, x))
    windowed, loss = net(Backprop()), WindowedLoss(squared_error, WINDOW)
    found[f"WindowedLoss({WINDOW})"] = windowed, lambda: loss(windowed, (y, x))
    base = net(Backprop())
    synthetic = SyntheticGradients(base, WINDOW, LinearSynthesiser(N, N, difference=True))
    found[f"synthetic gradients ({WINDOW})"] = base, lambda: (synthetic(y, target=x) - x).square().sum(1).mean()
    return found


def scaling() -> dict[str, Any]:
    rows = []
    A, y, x = problem(0, 128, torch.float32)
    for length in tqdm(LENGTHS, desc="scaling"):
        calls: dict[str, Callable[[], Any]] = {}
        peaks = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradientWarning)  # T = 8 has not converged, of course
            for name, (net, loss) in contenders(A, length, y, x).items():
                peaks[name] = peak_bytes(loss, net, y, x)
                calls[name] = partial(backward, loss)
            seconds = interleaved(calls, 5 if length > 128 else 15)
        for name in calls:
            rows.append(
                {
                    "strategy": name,
                    "T": length,
                    "peak kB": peaks[name] / 1000,
                    "of Backprop": peaks[name] / peaks["Backprop"],
                    "CPU ms": 1e3 * statistics.median(seconds[name]),
                    "lowest ms": 1e3 * min(seconds[name]),
                    "highest ms": 1e3 * max(seconds[name]),
                    "time of Backprop": statistics.median(
                        a / b for a, b in zip(seconds[name], seconds["Backprop"], strict=True)
                    ),
                }
            )
    table([list(row.values()) for row in rows if row["T"] in (8, 96, 1024)], list(rows[0]))
    return {"size": f"{M}x{N}", "batch": 128, "window": WINDOW, "rows": rows}


def checkpoint() -> dict[str, Any]:
    """LISTA in factors, 64x256, batch 64, float32, as benchmarks/memory.py has it; and the elastic net."""
    rows = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        D = nn.functional.normalize(torch.randn(64, 256), dim=0)
        A, signals, _ = problem(seed, 128, torch.float32)
        for system, untrained, y in (
            ("factored LISTA", LISTA(D, 96, alpha=0.1, tied=True, factored=True), torch.randn(64, 64)),
            ("elastic net", Unroll(ElasticNet(A, 0.3), 96), signals),
        ):
            nets = {}
            for strategy in (Backprop(), Checkpointed(), Checkpointed(6), Checkpointed(8), Checkpointed(10)):
                nets[str(strategy)] = copy.deepcopy(untrained)
                nets[str(strategy)].gradient = strategy
            losses = {name: partial(energy, net, y) for name, net in nets.items()}
            peaks = {name: peak_bytes(losses[name], net, y) for name, net in nets.items()}
            slopes = {name: torch.autograd.grad(losses[name](), list(net.parameters())) for name, net in nets.items()}
            calls = {name: partial(backward, loss) for name, loss in losses.items()}
            seconds = interleaved(calls, 15)
            for name in nets:
                pairs = list(zip(slopes[name], slopes["Backprop()"], strict=True))
                rows.append(
                    {
                        "system": system,
                        "strategy": name,
                        "seed": seed,
                        "peak kB": peaks[name] / 1000,
                        "of Backprop": peaks[name] / peaks["Backprop()"],
                        "CPU ms": 1e3 * statistics.median(seconds[name]),
                        "time of Backprop": statistics.median(
                            a / b for a, b in zip(seconds[name], seconds["Backprop()"], strict=True)
                        ),
                        "largest relative gradient error": max(
                            float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs
                        ),
                    }
                )
    table([list(row.values()) for row in rows], list(rows[0]))
    return {"T": 96, "rows": rows}


# ---- Direction -------------------------------------------------------------------------------------------------------


def gradient(strategy: Any, seed: int, rho: float, length: int) -> tuple[Tensor, bool]:
    """The gradient by W and theta together, and whether anybody was warned."""
    A, y, x = problem(seed, 32, torch.float64)
    net = Unroll(ElasticNet(A, rho), length, gradient=strategy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.autograd.grad(squared_error(net, (y, x)), list(net.parameters()))
    return torch.cat([part.flatten() for part in found]), bool(caught)


def contraction(seed: int, rho: float, length: int) -> float:
    A, y, _ = problem(seed, 32, torch.float64)
    with torch.no_grad():
        return float(contraction_factor(Unroll(ElasticNet(A, rho), length).iterates(y)).nan_to_num(0).max())


def compared(strategy: Any, exact: Tensor, seed: int, rho: float, length: int) -> dict[str, Any]:
    found, warned = gradient(strategy, seed, rho, length)
    return {
        "cosine": float(torch.cosine_similarity(found, exact, dim=0)),
        "relative error": float((found - exact).norm() / exact.norm()),
        "norm ratio": float(found.norm() / exact.norm()),
        # By theta alone, the last entry: the sign that an optimiser follows
        "theta's ratio": float(found[-1] / exact[-1]),
        "warned": warned,
    }


def direction() -> dict[str, Any]:
    make: dict[str, Callable[[], Any]] = {
        "Truncated(1)": lambda: Truncated(1),
        "Truncated(5)": lambda: Truncated(5),
        "Truncated(20)": lambda: Truncated(20),
        "Truncated(80)": lambda: Truncated(80),
        "Phantom(5, 0.5)": lambda: Phantom(5, 0.5),
        "Phantom(20, 0.5)": lambda: Phantom(20, 0.5),
        "Implicit, Neumann 20": lambda: Implicit(1e-12, 20, Neumann()),
        "Implicit, Neumann 100": lambda: Implicit(1e-12, 100, Neumann()),
        "Implicit, Neumann 400": lambda: Implicit(1e-12, 400, Neumann()),
        "Implicit, Anderson": lambda: Implicit(1e-6, 400, Anderson()),
        "Checkpointed(20)": lambda: Checkpointed(20),
    }
    rows = []
    for rho in tqdm((0.3, 0.1, 0.03), desc="direction"):
        for seed in SEEDS:
            exact, _ = gradient(Backprop(), seed, rho, 400)
            factor = contraction(seed, rho, 400)
            for name, new in make.items():
                row = compared(new(), exact, seed, rho, 400)
                rows.append({"strategy": name, "rho": rho, "seed": seed, "contraction": factor, **row})
    medians = [
        [name, rho, *(statistics.median(row[key] for row in chosen) for key in list(rows[0])[3:-1]),
         f"{sum(row['warned'] for row in chosen)} of {len(chosen)}"]
        for rho in (0.3, 0.1, 0.03)
        for name in make
        for chosen in [[row for row in rows if row["strategy"] == name and row["rho"] == rho]]
    ]  # fmt: skip
    table(medians, [key for key in rows[0] if key != "seed"])
    return {"T": 400, "rows": rows}


def sweep() -> dict[str, Any]:
    make: dict[str, Callable[[], Any]] = {
        "Truncated(1)": lambda: Truncated(1),
        "Truncated(20)": lambda: Truncated(20),
        "Phantom(20, 0.5)": lambda: Phantom(20, 0.5),
        "Implicit, Neumann 100": lambda: Implicit(1e-6, 100, Neumann()),
        "Implicit, Anderson": lambda: Implicit(1e-6, 1000, Anderson()),
    }
    length = 1500
    rows = []
    for rho in tqdm((3.0, 1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02), desc="sweep"):
        for seed in SEEDS:
            exact, _ = gradient(Backprop(), seed, rho, length)
            factor = contraction(seed, rho, length)
            for name, new in make.items():
                row = compared(new(), exact, seed, rho, length)
                rows.append({"strategy": name, "rho": rho, "seed": seed, "contraction": factor, **row})
    return {"T": length, "rows": rows}


# ---- Pictures --------------------------------------------------------------------------------------------------------

COLOURS = ("#000000", "#0072b2", "#d55e00", "#cc79a7", "#009e73", "#56b4e9", "#e69f00", "#999999")
MARKS = "osv^DPX*"


def draw_scaling(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    names = list(dict.fromkeys(row["strategy"] for row in result["rows"]))
    for axis, key, title in ((axes[0], "peak kB", "kB held for backward"), (axes[1], "CPU ms", "CPU ms a step")):
        for name, colour, mark in zip(names, COLOURS, MARKS):
            rows = [row for row in result["rows"] if row["strategy"] == name]
            axis.plot(
                [row["T"] for row in rows],
                [row[key] for row in rows],
                mark + "-",
                color=colour,
                markersize=4,
                label=name,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("iterations T")
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(RESULTS / "gradients_scaling.png", dpi=100)
    plt.close(figure)


def draw_sweep(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    names = list(dict.fromkeys(row["strategy"] for row in result["rows"]))
    ridges = list(dict.fromkeys(row["rho"] for row in result["rows"]))

    def median(key: str, rho: float, name: str) -> float:
        return statistics.median(row[key] for row in result["rows"] if row["rho"] == rho and row["strategy"] == name)

    for name, colour, mark in zip(names, COLOURS[1:], MARKS):
        axis.plot([median("cosine", rho, name) for rho in ridges], mark + "-", color=colour, markersize=5, label=name)
    factors = [median("contraction", rho, names[0]) for rho in ridges]
    axis.axvline(sum(factor <= 0.98 for factor in factors) - 0.5, color="black", linestyle=":", linewidth=1)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(ridges)), [f"{factor:.3f}\n{rho:g}" for factor, rho in zip(factors, ridges)], fontsize=8)
    axis.set_xlabel("contraction of the slowest sample, above the ridge rho; dotted: 0.98")
    axis.set_title("cosine with the exact gradient", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(RESULTS / "gradients_direction.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--draw", action="store_true", help="only draw the pictures again from the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.draw:
        for part in arguments.parts or PARTS:
            save(f"gradients_{part}", globals()[part]())
    for part, draw in (("scaling", draw_scaling), ("sweep", draw_sweep)):
        path = RESULTS / f"gradients_{part}.json"
        if path.exists():
            draw(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
