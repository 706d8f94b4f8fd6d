"""Claim: 16 layers code 1000 signals six times faster than OMP, and seventy times faster than the Lasso.

The claim is measured at 250 x 500, noiseless, 10 % nonzeros: HyperLISTA, which is not trained, and ALISTA after
seconds of training, against OMP with a few atoms to spare, OMP up to a residual of zero, and the Lasso at a small
weight. The error of ALISTA is below those of the first OMP and of the Lasso. The second OMP, in float64, is exact.

Then the time of a forward pass against the size of the problem (n atoms, m = n/2), the number of signals and the
number of layers, beside FISTA and OMP. A forward pass takes as long trained as untrained, so no network is trained
there. OMP looks for as many atoms as the codes have nonzeros, 0.1 n; it is left out where it takes longer than 20 s.

Float32, one thread, CPU seconds, three seeds, of which the median counts.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save, spread, table
from sklearn.decomposition import sparse_encode
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import orthogonal_mp
from torch import Tensor

from unrolled import LISTA, solvers
from unrolled.metrics import recovery_report
from unrolled.problems import SparseRecovery
from unrolled.recipes import train
from unrolled.sparse import ALISTA, HyperLISTA

SEEDS = range(3)
SIZES = (500, 1000, 2000, 4000)
BATCHES = (64, 512, 4096)
LAYERS = (4, 8, 16, 32, 64)
BASE = {"n": 500, "batch": 128, "K": 16}
PATIENCE = 20.0  # seconds
OMP = "OMP (scikit-learn)"

Solver = Callable[[Tensor], Tensor]


def fista(D: Tensor, num_iters: int) -> Solver:
    step_size = 1 / solvers.lipschitz(D)  # once for all signals, as the networks do
    return lambda y: solvers.fista(D, y, 0.1, num_iters=num_iters, step_size=step_size)


def encoder(D: Tensor, **options: Any) -> Solver:
    """scikit-learn's sparse coding; it computes the Gram matrix in every call."""
    components = np.ascontiguousarray(D.T.numpy())

    def encode(y: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", RuntimeWarning)  # OMP that stops early, the residual being 0
            return torch.from_numpy(sparse_encode(y.numpy(), components, **options)).to(y)

    return encode


METHODS: dict[str, Callable[[Tensor, int], Solver]] = {
    "LISTA, published": lambda D, K: LISTA(D, K, alpha=0.1),
    "LISTA, factored": lambda D, K: LISTA(D, K, alpha=0.1, factored=True),
    "ALISTA": ALISTA,
    "HyperLISTA": HyperLISTA,
    "FISTA": fista,
    OMP: lambda D, K: encoder(D, algorithm="omp", n_nonzero_coefs=D.shape[1] // 10),
}


# ---- Scaling ---------------------------------------------------------------------------------------------------------


def sweep(name: str, setting: str, values: tuple[int, ...]) -> dict[int, list[float]]:
    """Seconds of one method for each value of n, batch or K, up to where it takes longer than `PATIENCE`."""
    found = {}
    for value in values:
        n, batch, K = (BASE | {setting: value}).values()
        D = SparseRecovery(n // 2, n).dictionary
        solve = METHODS[name](D, K)
        few = SparseRecovery(dictionary=D).validation(8).y
        solve(few)  # the first call of all is slower
        if measure(solve, few) * batch / len(few) > PATIENCE and name == OMP:
            break
        found[value] = [measure(solve, SparseRecovery(dictionary=D, seed=seed).test(batch).y) for seed in SEEDS]
    return found


@torch.no_grad()
def measure(solve: Solver, y: Tensor) -> float:
    begin = time.process_time()
    solve(y)
    return time.process_time() - begin


def scaling() -> dict[str, dict[str, dict[int, list[float]]]]:
    """Seconds by quantity, method and value."""
    results: dict[str, dict[str, dict[int, list[float]]]] = {}
    for setting, values in (("n", SIZES), ("batch", BATCHES), ("K", LAYERS)):
        # OMP has no layers.
        results[setting] = {name: sweep(name, setting, values) for name in METHODS if (name, setting) != (OMP, "K")}
        others = ", ".join(f"{key} = {value}" for key, value in BASE.items() if key != setting)
        print(f"\nseconds against {setting} ({others}, m = n/2), median of {len(SEEDS)} seeds")
        rows = [
            [name, *(statistics.median(found[value]) if value in found else "" for value in values)]
            for name, found in results[setting].items()
        ]
        table(rows, ["", *map(str, values)])
    return results


def plot(results: dict[str, dict[str, dict[int, list[float]]]]) -> None:
    try:
        from unrolled.plot import scaling as draw
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    titles = {"n": "atoms n, with m = n/2", "batch": "signals", "K": "layers K"}
    panels = {
        titles[setting]: {
            name: (list(found), [statistics.median(seconds) for seconds in found.values()])
            for name, found in methods.items()
        }
        for setting, methods in results.items()
    }
    draw(panels, ylabel="CPU seconds, one thread").savefig(RESULTS / "scaling.png", dpi=110)


# ---- The claim -------------------------------------------------------------------------------------------------------


def claim(seed: int) -> dict[str, dict[str, Any]]:
    """The three figures of each method, and its seconds for 1000 signals."""
    problem = SparseRecovery(250, 500, seed=seed)
    D = problem.dictionary
    y, x = problem.test(1000)
    alista = ALISTA(D)
    history = train(alista, problem, effort=0.5)
    methods = {
        "HyperLISTA, not trained": HyperLISTA(D),
        "ALISTA, trained": alista,
        "ALISTA, its first 12 layers": alista[:12],
        "OMP, 60 atoms": encoder(D, algorithm="omp", n_nonzero_coefs=60),
        "OMP, to a residual of 0": omp_to_zero(D),
        "Lasso, alpha 1e-3": encoder(D, algorithm="lasso_cd", alpha=1e-3, max_iter=1000),
    }
    rows: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for name, solve in methods.items():
            solve(y[:20])  # the first call is slower
            begin = time.process_time()
            found = solve(y)
            seconds = time.process_time() - begin
            report = recovery_report(found, x)
            rows[name] = {
                "NMSE dB": report.nmse_db,
                "per sample dB": report.per_sample_nmse_db,
                "recovered": report.fraction_recovered,
                "seconds": seconds,
            }
    rows["ALISTA, trained"]["training seconds"] = history.seconds
    return rows


def omp_to_zero(D: Tensor) -> Solver:
    """OMP that stops where a signal is explained: the sooner, the fewer nonzeros its code has."""
    atoms = D.double().numpy()

    def solve(y: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            codes = orthogonal_mp(atoms, y.double().numpy().T, tol=1e-8, precompute=True)
        return torch.from_numpy(codes.T).to(y)

    return solve


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    runs = [claim(seed) for seed in SEEDS]
    columns = ["NMSE dB", "per sample dB", "recovered", "seconds", "training seconds"]
    print("1000 signals, 250 x 500, 16 layers, noiseless, mean of 3 seeds")
    table(
        [
            [name, *(statistics.mean(run[name][c] for run in runs) if c in runs[0][name] else "" for c in columns)]
            for name in runs[0]
        ],
        ["", *columns],
    )
    networks = ("HyperLISTA, not trained", "ALISTA, trained", "ALISTA, its first 12 layers")
    ratios = {
        f"{net} against {rival}": spread([run[rival]["seconds"] / run[net]["seconds"] for run in runs])
        for net in networks
        for rival in runs[0]
        if rival not in networks
    }
    print()
    table([[name, *values.values()] for name, values in ratios.items()], ["times faster", "median", "least", "most"])
    results = scaling()
    save("scaling", {"claim": {"seeds": runs, "times faster": ratios}, "scaling": {"base": BASE, "seconds": results}})
    plot(results)


if __name__ == "__main__":
    main()
