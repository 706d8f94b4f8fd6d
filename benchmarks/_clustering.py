"""What the clustering benchmarks share: scores of labels found against labels known, and the data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score


def accuracy(labels: Any, found: Any) -> float:
    """Percent of the samples whose cluster stands for their class, clusters and classes paired as is best."""
    counts = np.zeros((int(np.max(labels)) + 1, int(np.max(found)) + 1), dtype=np.int64)
    np.add.at(counts, (np.asarray(labels), np.asarray(found)), 1)
    return 100 * float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


def scores(labels: Any, found: Any) -> dict[str, float]:
    """Accuracy (acc), normalised mutual information (nmi, arithmetic) and adjusted Rand index (ari), in percent."""
    return {
        "acc": accuracy(labels, found),
        "nmi": 100 * float(normalized_mutual_info_score(labels, found)),
        "ari": 100 * float(adjusted_rand_score(labels, found)),
    }


def summary(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, sample standard deviation, least and greatest of every number that the runs report."""
    return {
        key: {
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            "min": min(values),
            "max": max(values),
        }
        for key in runs[0]
        for values in [[run[key] for run in runs]]
    }


def load(folder: Path, name: str) -> tuple[Any, Any]:
    """Rows (n, d) in float32 and labels of `name`.npz with arrays x and y; all of it, training and test together."""
    path = folder / f"{name}.npz"
    if not path.is_file():
        raise SystemExit(f"--data: there is no {path}; a file with arrays x and y is expected")
    with np.load(path, allow_pickle=False) as arrays:
        x, y = arrays["x"], arrays["y"]
        return x.reshape(len(x), -1).astype(np.float32), y.astype(np.int64)
