"""Claim: KMeansNet finds what the best of many k-means runs finds, in a fraction of the time, whatever the seed.

digits   1797 images of 64 pixels. KMeansNet with 5 restarts, 10 seeds. Wanted: ACC >= 79, NMI >= 73.5, ARI >= 66, a
         standard deviation of at most 0.5 ACC over the seeds.
usps     9298 images of 256 pixels, raw; 5 seeds.
mnist    70000 images of 784 pixels, raw. Wanted: ACC >= 54.5, NMI >= 52, ARI >= 39.5 in at most 0.15 of the CPU time of
         KMeans(n_init=10), and an objective at most 0.5 % above the best of ten runs of spherical Lloyd.
stream   MNIST: fit on 1000 of the last 10000 images, then the first 60000 in batches of 256, in their order; scores of
         all 60000 by the centres at the end, and of each batch as it came, before the update. Everything but the first
         row on images of norm 1. Differences are those of paired seeds.

Training and test images are merged, as is usual for clustering. Restarts are chosen by the loss alone; labels serve for
the scores. The objective is the mean of 2 - 2 cos to the nearest centre, each on the sphere, for every method. One
thread, CPU seconds.

    python benchmarks/clustering.py [--data FOLDER] [--only digits usps mnist stream]

`--data` is a folder with mnist.npz and usps.npz, arrays x and y; without it only the digits run. A row for a
self-organising map (2 x 5 units) appears where the package minisom is importable. It also draws clustering_spread.png
beside the JSON: the digits' centres, and the accuracy of every method.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _clustering import load, scores, summary
from _common import RESULTS, save, table
from sklearn.cluster import KMeans, MiniBatchKMeans, SpectralClustering
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from unrolled.estimators.kmeans_net import KMeansNet
from unrolled.solvers.kmeans import kmeans_objective, kmeans_plus_plus, lloyd

try:
    from minisom import MiniSom
except ImportError:
    MiniSom = None

BATCH = 256
Rows = dict[str, list[dict[str, float]]]


def unit(X: Any) -> Any:
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def objective(X: Any, labels: Any) -> float:
    """Mean of 2 - 2 cos to the mean direction of the own cluster, which is the best centre on the sphere."""
    X = unit(X)
    sums = np.stack([X[labels == j].sum(0, dtype=np.float64) for j in np.unique(labels)])
    return 2 - 2 * float(np.linalg.norm(sums, axis=1).sum()) / len(X)


def spherical_lloyd(X: Any, seed: int, runs: int = 10) -> Any:
    """Labels of the best of ten runs of `solvers.lloyd` on the sphere, each until five iterations gain under 1e-4."""
    x = torch.from_numpy(unit(X))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(runs):
        part = x[torch.randperm(len(x), generator=generator)[:3000]]
        centres = kmeans_plus_plus(part, 10, generator=generator)
        before = torch.inf
        for _ in range(20):
            centres = lloyd(x, centres, spherical=True, num_iters=5)
            now = float(kmeans_objective(x, centres, spherical=True))
            if before - now < 1e-4 * now:
                break
            before = now
        found.append((now, (x @ centres.mT).argmax(1).numpy()))
    return min(found, key=lambda pair: pair[0])[1]


def spectral(X: Any, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the graph of neighbours is not connected
        return SpectralClustering(10, affinity="nearest_neighbors", random_state=seed).fit_predict(X)


def self_organising_map(X: Any, seed: int) -> Any:
    net = MiniSom(2, 5, X.shape[1], sigma=1.0, learning_rate=0.5, random_seed=seed)
    net.random_weights_init(X)
    net.train_random(X, 20 * len(X))
    return np.array([np.ravel_multi_index(net.winner(row), (2, 5)) for row in X])


def methods(part: str, slow_seeds: int) -> dict[str, tuple[int, Callable[[Any, int], Any]]]:
    """Name -> (number of seeds, labels by data and seed)."""
    many = 10 if part == "digits" else 5
    few = slow_seeds if part == "mnist" else many
    rows: dict[str, tuple[int, Callable[[Any, int], Any]]] = {
        "KMeansNet": (many, lambda X, seed: KMeansNet(10, random_state=seed).fit_predict(X)),
        "KMeansNet, one run": (many, lambda X, seed: KMeansNet(10, n_init=1, random_state=seed).fit_predict(X)),
        "KMeans, n_init=10": (few, lambda X, seed: KMeans(10, n_init=10, random_state=seed).fit_predict(X)),
        "KMeans, n_init=1": (many, lambda X, seed: KMeans(10, n_init=1, random_state=seed).fit_predict(X)),
        "MiniBatchKMeans, n_init=3": (
            many,
            lambda X, seed: MiniBatchKMeans(10, n_init=3, batch_size=1024, random_state=seed).fit_predict(X),
        ),
        "MiniBatchKMeans, unit length": (
            many,
            lambda X, seed: MiniBatchKMeans(10, n_init=3, batch_size=1024, random_state=seed).fit_predict(unit(X)),
        ),
        "spherical Lloyd, best of 10": (1 if part == "mnist" else 5, spherical_lloyd),
    }
    if part != "mnist":
        rows["KMeans, unit length, n_init=10"] = (
            few,
            lambda X, seed: KMeans(10, n_init=10, random_state=seed).fit_predict(unit(X)),
        )
        rows["KMeansNet, Euclidean"] = (
            many,
            lambda X, seed: KMeansNet(10, spherical=False, random_state=seed).fit_predict(X),
        )
    if part == "digits":
        rows["SpectralClustering"] = (3, spectral)
        if MiniSom is not None:
            rows["self-organising map, 2 x 5"] = (3, self_organising_map)
    return rows


def compare(part: str, X: Any, y: Any, slow_seeds: int = 3) -> dict[str, Any]:
    """Every method on every seed, in turn, so that a drift of the machine hits all alike."""
    chosen = methods(part, slow_seeds)
    found: Rows = {name: [] for name in chosen}
    most = max(count for count, _ in chosen.values())
    for seed in tqdm(range(most), desc=part):
        for name, (count, method) in chosen.items():
            if seed < count:
                begin = time.process_time()
                labels = method(X, seed)
                seconds = time.process_time() - begin
                found[name].append(scores(y, labels) | {"objective": objective(X, labels), "cpu_s": seconds})
    report(part, found)
    times = {name: [run["cpu_s"] for run in runs] for name, runs in found.items()}
    pairs = zip(times["KMeansNet"], times["KMeans, n_init=10"], strict=False)
    best = min(run["objective"] for run in found["spherical Lloyd, best of 10"])
    result = {
        "rows": {name: summary(runs) | {"seeds": len(runs)} for name, runs in found.items()},
        "time_against_kmeans": statistics.median(mine / theirs for mine, theirs in pairs),
        "objective_above_lloyd_percent": 100 * (max(run["objective"] for run in found["KMeansNet"]) / best - 1),
    }
    print(
        f"CPU time of KMeans(n_init=10): {result['time_against_kmeans']:.3f} of it; worst objective "
        f"{result['objective_above_lloyd_percent']:+.2f} % against spherical Lloyd's best of ten"
    )
    return result


def stream(X: Any, y: Any, seeds: int = 5) -> dict[str, Any]:
    train, labels = X[:60_000], y[:60_000]
    turned = unit(train)
    found: Rows = {}

    def note(name: str, answer: Any) -> None:
        found.setdefault(name, []).append(scores(labels, answer))

    for seed in tqdm(range(seeds), desc="stream"):
        first = X[60_000 + np.random.RandomState(seed).permutation(10_000)[:1000]]
        note("fixed: KMeans(n_init=10), raw", KMeans(10, n_init=10, random_state=seed).fit(first).predict(train))
        fixed = KMeans(10, n_init=10, random_state=seed).fit(unit(first))
        note("fixed: KMeans(n_init=10)", fixed.predict(turned))
        batches = MiniBatchKMeans(10, init=fixed.cluster_centers_, n_init=1, random_state=seed).fit(unit(first))
        note("MiniBatchKMeans.partial_fit, at the end", followed(batches, turned)[1])
        net = KMeansNet(10, random_state=seed).fit(first)
        note("fixed: KMeansNet", net.predict(train))
        for step in (0.1, 0.02):
            model = copy.deepcopy(net).set_params(step_size=step)
            passing, end = followed(model, train)
            note(f"KMeansNet.partial_fit, step {step}, as it came", passing)
            note(f"KMeansNet.partial_fit, step {step}, at the end", end)
    report("stream", found)
    base = found["fixed: KMeansNet"]
    gains = {
        name: summary([{key: run[key] - other[key] for key in run} for run, other in zip(runs, base)])
        for name, runs in found.items()
        if name != "fixed: KMeansNet"
    }
    versus = zip(found["KMeansNet.partial_fit, step 0.1, at the end"], found["MiniBatchKMeans.partial_fit, at the end"])
    against = summary([{key: run[key] - other[key] for key in run} for run, other in versus])
    print("\nPaired gains over fixed centres (KMeansNet fitted on the 1000), mean +- sd:")
    table(
        [
            [name, *(f"{g[key]['mean']:+.2f} +- {g[key]['sd']:.2f}" for key in ("acc", "nmi", "ari"))]
            for name, g in gains.items()
        ],
        ["", "ACC", "NMI", "ARI"],
    )
    print(
        "step 0.1 at the end, against MiniBatchKMeans:",
        {k: f"{v['mean']:+.2f} +- {v['sd']:.2f}" for k, v in against.items()},
    )
    return {
        "rows": {name: summary(runs) for name, runs in found.items()},
        "gains_over_fixed": gains,
        "gain_over_minibatch": against,
        "published": {"k-means": [48.52, 46.75, 31.25], "TELL": [54.59, 50.80, 38.33]},
    }


def followed(model: Any, X: Any) -> tuple[Any, Any]:
    """Labels of each batch before the update with it, and of all of X after the last."""
    passing = []
    for start in range(0, len(X), BATCH):
        batch = X[start : start + BATCH]
        passing.append(model.predict(batch))
        model.partial_fit(batch)
    return np.concatenate(passing), model.predict(X)


def report(title: str, found: Rows) -> None:
    keys = list(next(iter(found.values()))[0])
    print(f"\n{title}: mean +- standard deviation over the seeds")
    rows = []
    for name, runs in found.items():
        cells = []
        for key in keys:
            digits = {"objective": 4}.get(key, 2)
            value = summary(runs)[key]
            cells.append(f"{value['mean']:.{digits}f} +- {value['sd']:.{digits}f}")
        rows.append([name, len(runs), *cells])
    table(rows, ["method", "seeds", *keys])


def picture(done: dict[str, Any]) -> None:
    """The centres of the digits as images; and of every method the mean and the range of its accuracy."""
    from matplotlib.figure import Figure

    shown = [part for part in ("digits", "usps", "mnist") if part in done]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.2])
    model = KMeansNet(10, random_state=0).fit(load_digits().data)
    for axis, centre in zip(left.subplots(5, 2).flat, model.cluster_centers_):
        axis.imshow(centre.reshape(8, 8), cmap="gray_r")
        axis.set_axis_off()
    left.suptitle("the rows of W / 2, on the digits", fontsize=10)
    names = [name for name in done[shown[-1]]["rows"] if all(name in done[part]["rows"] for part in shown)]
    for k, (axis, part) in enumerate(zip(right.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown)):
        for place, name in enumerate(reversed(names)):
            acc = done[part]["rows"][name]["acc"]
            color = "#b3541e" if name.startswith("KMeansNet") else "#33415c"
            axis.plot([acc["min"], acc["max"]], [place, place], color=color, linewidth=2, alpha=0.5)
            axis.plot([acc["mean"]], [place], "o", color=color)
        axis.set_title(part, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        if k == 0:
            axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=9)
    right.supxlabel("accuracy in %: mean and range over the seeds", fontsize=10)
    figure.savefig(RESULTS / "clustering_spread.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with mnist.npz and usps.npz")
    parser.add_argument("--only", nargs="+", choices=("digits", "usps", "mnist", "stream"))
    parser.add_argument("--slow-seeds", type=int, default=3, help="of KMeans(n_init=10) on MNIST, a minute each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)  # NumPy's and scikit-learn's, too
    parts = arguments.only or ["digits", *(["usps", "mnist", "stream"] if arguments.data else [])]
    if {*parts} - {"digits"} and not arguments.data:
        parser.error("all parts but the digits need --data")
    path = RESULTS / "clustering.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    done = {part: before[part] for part in ("digits", "usps", "mnist", "stream") if part in before}
    for part in parts:
        if part == "digits":
            X, y = load_digits(return_X_y=True)
            done[part] = compare(part, X.astype(np.float32), y)
        elif part == "stream":
            done[part] = stream(*load(arguments.data, "mnist"))
        else:
            done[part] = compare(part, *load(arguments.data, part), arguments.slow_seeds)
        save("clustering", done)
    picture(done)


if __name__ == "__main__":
    main()
