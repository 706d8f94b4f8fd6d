"""Sparse codes as features in a scikit-learn pipeline: handwritten digits, a few lines, no data to download.

    python examples/digits_features.py
    python examples/digits_features.py --data digits.npz      # your own: arrays X (samples, features) and y

A logistic regression learns to tell digits apart three times: from their pixels, from the exact sparse codes of
scikit-learn's SparseCoder, and from those of SparseEncoder, a network that was trained to find them in 16 layers. Both
encoders use the same dictionary. `C` and so on are fixed beforehand; the test images are looked at once.

Writes `results.json` and, where matplotlib is installed, `features.png` into the folder given by `--out`.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import SparseCoder
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from unrolled.estimators import SparseEncoder

ALPHA = 0.2  # weight of the l1 norm, for pixels from 0 to 1
C = 10.0  # of the logistic regression


def load(path):
    """Samples as rows, scaled to at most 1, and their labels."""
    if path is None:
        X, y = load_digits(return_X_y=True)
        return X / 16, y
    if not path.exists():
        raise SystemExit(f"--data: {path} does not exist")
    with np.load(path) as arrays:
        if not {"X", "y"} <= {*arrays.files}:
            raise SystemExit(
                f"--data: {path} has arrays {', '.join(arrays.files)}; X (samples, features) and y are needed"
            )
        X, y = arrays["X"], arrays["y"]
    X = X.reshape(len(X), -1).astype(float)
    return X / np.abs(X).max(), y


def timed(function, *arguments):
    begin = time.process_time()
    return function(*arguments), time.process_time() - begin


def measure(transform, split):
    """Accuracy on the test samples, and the time that all features took."""
    X_train, X_test, y_train, y_test = split
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        (train, test), seconds = timed(lambda: (transform(X_train), transform(X_test)))
        model = LogisticRegression(C=C, max_iter=1000).fit(train, y_train)
    return {"accuracy": model.score(test, y_test), "seconds": seconds}, test


def plot(encoder, X, codes, exact, path):
    """The most used atoms, some samples as the network sees them, and a code beside the exact one."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    side = int(X.shape[1] ** 0.5)
    if side**2 != X.shape[1]:
        print("samples are no square images, so there is no picture")
        return
    blue, orange = "#0072b2", "#d55e00"  # of Okabe and Ito: told apart by colour-blind readers too
    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))

    most = np.argsort(-np.abs(codes).sum(0))[:100]
    axes = left.subplots()
    axes.imshow(mosaic(encoder.components_[most], side), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_axis_off()
    axes.set_title(f"the {len(most)} most used of {len(encoder.components_)} atoms", loc="left", fontsize=10)

    top, bottom = right.subfigures(2, 1, height_ratios=(1, 1.15))
    count = 10
    pictures = np.concatenate([X[:count], encoder.inverse_transform(codes[:count])])
    axes = top.subplots()
    axes.imshow(mosaic(pictures, side, count, each=False), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title("test images, and what their codes make of them", loc="left", fontsize=10)

    axes = bottom.subplots()
    order = np.argsort(-np.abs(exact[0]))[:15]
    axes.bar(np.arange(len(order)) - 0.2, exact[0][order], 0.4, color=orange, label="SparseCoder, exact")
    axes.bar(np.arange(len(order)) + 0.2, codes[0][order], 0.4, color=blue, label="SparseEncoder")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_title("the features of the first one: its 15 largest coefficients", loc="left", fontsize=10)
    axes.set_xlabel("atoms, in the order of the exact code")
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"written: {path}")


def mosaic(rows, side, across=10, *, each=True):
    """Pictures in a grid with gaps; `each` scaled to its own largest entry, or all as they are."""
    down = -(-len(rows) // across)
    grid = np.full((down * (side + 1) - 1, across * (side + 1) - 1), np.nan)
    for index, row in enumerate(rows):
        top, left = ((side + 1) * place for place in divmod(index, across))
        grid[top : top + side, left : left + side] = row.reshape(side, side) / (np.abs(row).max() if each else 1)
    return grid


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz file with arrays X and y")
    parser.add_argument("--out", type=Path, default=Path("digits_features"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    X, y = load(arguments.data)
    split = train_test_split(X, y, test_size=0.3, stratify=y, random_state=0)
    options = {"n_components": 256, "dict_max_iter": 30, "max_iter": 300}
    if arguments.smoke:
        options = {"n_components": 64, "dict_max_iter": 10, "max_iter": 60, "n_iters": 8}
    encoder = SparseEncoder(**options, alpha=ALPHA, dtype="float32", random_state=0, verbose=True)
    _, fitting = timed(encoder.fit, split[0])
    atoms = encoder.components_.astype(float)
    coder = SparseCoder(atoms, transform_algorithm="lasso_cd", transform_alpha=ALPHA).fit(X)

    rows = {}
    rows["pixels"], _ = measure(lambda X: X, split)
    rows["SparseCoder"], exact = measure(coder.transform, split)
    rows["SparseEncoder"], codes = measure(encoder.transform, split)
    print(f"\n{len(split[0])} samples to learn from, {len(split[1])} to test on; {len(atoms)} atoms")
    print(f"{'features':14}  {'accuracy':>8}  {'CPU seconds':>11}")
    for name, row in rows.items():
        print(f"{name:14}  {row['accuracy']:8.4f}  {row['seconds']:11.3f}")
    print(f"dictionary and network took {fitting:.1f} CPU seconds to learn")

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    results.write_text(json.dumps({"alpha": ALPHA, "fit_seconds": fitting, "features": rows}, indent=1) + "\n")
    print(f"written: {results}")
    plot(encoder, split[1], codes, exact, arguments.out / "features.png")


if __name__ == "__main__":
    main()
