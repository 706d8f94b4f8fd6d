"""Claim: every network of the family, trained by one call, recovers sparse codes at or past the published figures.

Bernoulli(0.1)-Gaussian codes, 16 layers, 1000 fresh test signals, three seeds (dictionary, signals and training), one
thread, CPU seconds. Beside the networks stand ISTA, FISTA, AMP, OMP, the Lasso by coordinate descent, and the Lasso
debiased by least squares on its support. Where a rival has a parameter, it is chosen on 200 validation signals.

    python benchmarks/sparse_recovery.py [setting ...]     noiseless, snr40, snr20, condition, openl2o; default: all

Each setting takes minutes, writes a JSON and, for every network, the NMSE after each layer as a plot.
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
from _common import RESULTS, save, table
from sklearn.decomposition import sparse_encode
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from unrolled import Unroll, solvers
from unrolled.metrics import nmse_db, recovery_report
from unrolled.problems import SparseRecovery
from unrolled.recipes import greedy, train
from unrolled.sparse import (
    ALISTA,
    GLISTA,
    LAMP,
    LFISTA,
    LISTA,
    LISTACP,
    NAALISTA,
    HyperLISTA,
    StepLISTA,
    SupportSelection,
    TiLISTA,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "noiseless": {},
    "snr40": {"snr": 40.0},
    "snr20": {"snr": 20.0},
    "condition": {"condition_number": 50.0},
    "openl2o": {"m": 256, "n": 512},
}
SELECTION = SupportSelection()
NETWORKS: dict[str, Callable[[Tensor], Unroll]] = {
    "HyperLISTA, not trained": HyperLISTA,
    "ALISTA, greedy only": ALISTA,
    "ALISTA": ALISTA,
    "LISTA-CPSS": lambda D: LISTACP(D, support_selection=SELECTION),
    "TiLISTA": TiLISTA,
    "GLISTA": lambda D: GLISTA(D, support_selection=SELECTION),
    "NA-ALISTA": NAALISTA,
    "LAMP": LAMP,
    "LISTA": lambda D: LISTA(D, alpha=0.4),
    "LISTA-CP": LISTACP,
    "LFISTA": lambda D: LFISTA(D, alpha=0.4),
    "Step-LISTA": lambda D: StepLISTA(D, alpha=0.1),
}
EVERYWHERE = ("HyperLISTA, not trained", "ALISTA, greedy only", "ALISTA", "LISTA-CPSS", "GLISTA")


def networks(problem: SparseRecovery, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    y, x = problem.test(1000)
    rows = {}
    for name in names:
        torch.manual_seed(0)
        net = NETWORKS[name](problem.dictionary)
        begin = time.process_time()
        if name.endswith("greedy only"):
            greedy(net, problem)
        elif not name.endswith("not trained"):
            train(net, problem)
        seconds = time.process_time() - begin
        with torch.no_grad():
            layers = [nmse_db(codes, x) for codes in net.iterates(y)]
            begin = time.process_time()
            codes = net(y)
        rows[name] = figures(codes, x, time.process_time() - begin) | {"training seconds": seconds, "layers": layers}
    return rows


def rivals(problem: SparseRecovery) -> dict[str, dict[str, Any]]:
    """Classical solvers, each at the parameter with the least error on validation signals."""
    D = problem.dictionary
    n = D.shape[1]
    iterative = {
        "ISTA, 16": lambda y, alpha: solvers.ista(D, y, alpha, num_iters=16),
        "FISTA, 16": lambda y, alpha: solvers.fista(D, y, alpha, num_iters=16),
    }
    candidates: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
        **{name: (solve, (0.03, 0.1, 0.2, 0.4)) for name, solve in iterative.items()},
        "AMP, 16": (lambda y, threshold: solvers.amp(D, y, num_iters=16, threshold=threshold), (1.0, 1.1402, 1.3)),
        "AMP, 30": (lambda y, threshold: solvers.amp(D, y, num_iters=30, threshold=threshold), (1.0, 1.1402, 1.3)),
        "OMP": (lambda y, count: encode(D, y, algorithm="omp", n_nonzero_coefs=int(count * n)), (0.08, 0.1, 0.12)),
        "Lasso": (lambda y, alpha: encode(D, y, algorithm="lasso_cd", alpha=alpha), (1e-3, 1e-2, 3e-2, 0.1)),
        "Lasso, debiased": (
            lambda y, alpha: debiased(D, y, encode(D, y, algorithm="lasso_cd", alpha=alpha)),
            (1e-2, 3e-2, 0.1, 0.2),
        ),
    }
    trial, truth = problem.validation(200)
    y, x = problem.test(1000)
    rows = {}
    for name, (solve, values) in candidates.items():
        errors = [float(np.nan_to_num(nmse_db(solve(trial, value), truth), nan=np.inf)) for value in values]
        best = values[int(np.argmin(errors))]
        begin = time.process_time()
        codes = solve(y, best)
        rows[name] = figures(codes, x, time.process_time() - begin) | {"parameter": best}
    return rows


def encode(D: Tensor, y: Tensor, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return torch.from_numpy(sparse_encode(y.numpy(), D.T.numpy(), max_iter=1000, **options)).to(y)


def debiased(D: Tensor, y: Tensor, codes: Tensor) -> Tensor:
    """Least squares on the support that the Lasso found."""
    found = np.zeros(codes.shape)
    for row, signal, code in zip(found, y.double().numpy(), codes.numpy()):
        support = np.flatnonzero(code)
        row[support] = np.linalg.lstsq(D.double().numpy()[:, support], signal, rcond=None)[0]
    return torch.from_numpy(found).to(y)


def figures(codes: Tensor, x: Tensor, seconds: float) -> dict[str, Any]:
    report = recovery_report(codes, x)
    return {
        "NMSE dB": report.nmse_db,
        "per sample dB": report.per_sample_nmse_db,
        "recovered": report.fraction_recovered,
        "seconds per 1000": seconds,
    }


def plot(setting: str, runs: list[dict[str, dict[str, Any]]]) -> None:
    """The NMSE after each layer, one line a network: the median of the seeds."""
    try:
        from unrolled.plot import gap_curve
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    curves = {
        name: np.median([run[name]["layers"] for run in runs], axis=0).tolist()
        for name, row in runs[0].items()
        if "layers" in row
    }
    best = dict(sorted(curves.items(), key=lambda item: item[1][-1])[:6])
    power = {name: [10 ** (value / 10) for value in curve] for name, curve in best.items()}
    figure = gap_curve(power, xlabel="layer", ylabel="NMSE, relative squared error").figure
    figure.savefig(RESULTS / f"sparse_recovery_{setting}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", choices=list(SETTINGS), help="default: all")
    torch.set_num_threads(1)
    for setting in parser.parse_args().settings or SETTINGS:
        names = tuple(NETWORKS) if setting == "noiseless" else EVERYWHERE
        runs = []
        for seed in range(3):
            problem = SparseRecovery(**{"m": 250, "n": 500, **SETTINGS[setting]}, seed=seed)
            runs.append(networks(problem, names) | rivals(problem))
        columns = ["NMSE dB", "per sample dB", "recovered", "seconds per 1000", "training seconds"]
        rows = []
        for name in runs[0]:
            means = [statistics.mean(run[name][c] for run in runs) if c in runs[0][name] else "" for c in columns]
            rows.append([name, *means, max(run[name]["NMSE dB"] for run in runs)])
        print(f"\n{setting}: {SETTINGS[setting] or 'm = 250, n = 500'}, mean of 3 seeds")
        table(rows, ["", *columns, "worst NMSE"])
        save(f"sparse_recovery_{setting}", {"setting": SETTINGS[setting], "seeds": runs})
        plot(setting, runs)


if __name__ == "__main__":
    main()
