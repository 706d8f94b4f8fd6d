"""Claim: 16 trained layers leave at most a fifth of the Lasso gap of FISTA's 16 iterations, after 10 CPU s of training.

8x8 patches of mean 0 and norm 1, a learned 64x256 dictionary, alpha 0.1. All learning is on china.jpg; the gap, mean
of (F - F*) / F* over 2000 patches, is that of flower.jpg. F* is that of FISTA with restart in float64, run to 1e-9;
scikit-learn's converged coordinate descent is in the table beside it. Three seeds: of the patches, the dictionary and
the batches. Trained on the objective of all layers. One thread, CPU seconds.

    python benchmarks/lasso_gap.py [--sweep]

`--sweep` also trains the published form, and both without momentum.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from _common import save, table
from sklearn.decomposition import sparse_encode
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from unrolled import LISTA, fit
from unrolled.demo.data import choose, learn_dictionary, sample_photograph, unit_patches
from unrolled.losses import Lasso
from unrolled.solvers import fista, ista, lasso_objective
from unrolled.training import default_optimizer

ALPHA, K, STEPS, BATCH, SUPERVISION = 0.1, 16, 300, 128, 1.0


def train(net: LISTA, dictionary: Tensor, patches: Tensor, generator: torch.Generator) -> float:
    """Train on the objective; returns the CPU seconds."""
    batches = (choose(patches, BATCH, generator) for _ in iter(int, 1))
    optimizer = default_optimizer(net, lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loss = Lasso(dictionary, ALPHA, supervision=SUPERVISION)
    return fit(net, batches, loss, num_steps=STEPS, optimizer=optimizer, scheduler=scheduler).seconds


def timed(call: Any) -> tuple[Tensor, float]:
    begin = time.process_time()
    with torch.no_grad():
        result = call()
    return torch.as_tensor(result), time.process_time() - begin


def run(seed: int, sweep: bool) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)
    learning = choose(unit_patches(sample_photograph("china.jpg")), 10_000, generator)
    testing = choose(unit_patches(sample_photograph("flower.jpg")), 2_000, generator)
    dictionary = learn_dictionary(learning, 256, ALPHA, passes=3, seed=seed)
    exact, y = dictionary.double(), testing.double()
    best = lasso_objective(exact, y, fista(exact, y, ALPHA, num_iters=20_000, restart=True, tol=1e-9), ALPHA)

    def record(codes: Tensor, seconds: float) -> dict[str, float]:
        gap = (lasso_objective(exact, y, codes.double(), ALPHA) - best) / best
        return {"gap": gap.mean().item(), "nonzeros": (codes != 0).sum(1).double().mean().item(), "seconds": seconds}

    rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for max_iter in (10, 1000):
            encode = lambda n=max_iter: sparse_encode(
                testing.numpy(), dictionary.T.numpy(), algorithm="lasso_cd", alpha=ALPHA, max_iter=n
            )
            rows[f"scikit-learn lasso_cd, max_iter {max_iter}"] = record(*timed(encode))
    rows["ISTA 16"] = record(*timed(lambda: ista(dictionary, testing, ALPHA, num_iters=K)))
    for iterations in (16, 30, 50, 100):
        solve = lambda n=iterations: fista(dictionary, testing, ALPHA, num_iters=n)
        rows[f"FISTA {iterations}"] = record(*timed(solve))
    for momentum in (True, False) if sweep else (True,):
        for factored in (True, False) if sweep else (True,):
            net = LISTA(dictionary, K, alpha=ALPHA, momentum=momentum, factored=factored)
            seconds = train(net, dictionary, learning, generator)
            name = f"LISTA 16, {'factored' if factored else 'published'}{', momentum' if momentum else ''}"
            rows[name] = record(*timed(lambda net=net: net(testing))) | {"training seconds": seconds}
    for row in rows.values():
        row["of FISTA 16"] = row["gap"] / rows["FISTA 16"]["gap"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="train the other forms of LISTA as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(seed, arguments.sweep) for seed in range(3)]
    columns = ["gap", "of FISTA 16", "nonzeros", "seconds", "training seconds"]
    rows = []
    for name in runs[0]:
        medians = [statistics.median(run[name].get(column, float("nan")) for run in runs) for column in columns]
        worst = max(run[name]["of FISTA 16"] for run in runs)
        rows.append([name, *("" if value != value else value for value in medians), worst])
    table(rows, ["2000 patches, median of 3 seeds", *columns, "worst of FISTA 16"])
    save(
        "lasso_gap",
        {"alpha": ALPHA, "layers": K, "steps": STEPS, "batch": BATCH, "supervision": SUPERVISION, "seeds": runs},
    )


if __name__ == "__main__":
    main()
