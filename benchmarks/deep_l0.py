"""Claim: trained deep l0 encoders are better than iterative hard thresholding (IHT) at as many iterations.

Recovery: codes with exactly 5 nonzeros of 100, 50 measurements, 30 dB, 1000 fresh test signals. Encoders of 1 to 8
layers, each trained by itself on known codes, against IHT, IHT until it has settled and scikit-learn's OMP, both with
the true number of nonzeros. Support is the F1 score of the places of the nonzeros.

Digits: scikit-learn's digits, 70 % for learning, a dictionary of 128 atoms, codes with 10 nonzeros, 2 layers, logistic
regression on the codes. Encoders are trained without labels, on the codes of OMP, or end to end with a linear head.

Three seeds (dictionary, signals, split and training), one thread, CPU seconds. IHT's step size and price, and the
regression's C, are chosen on validation signals; so is the price of the encoder on digits, by the number of nonzeros.

    python benchmarks/deep_l0.py [part ...]     recovery, digits; default: both
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _common import RESULTS, save, table
from sklearn.datasets import load_digits
from sklearn.decomposition import sparse_encode
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm import tqdm

from unrolled import Unroll, solvers
from unrolled.demo.data import learn_dictionary
from unrolled.functional import normalize_columns, top_k_threshold
from unrolled.losses import CodeError
from unrolled.metrics import nmse_db
from unrolled.sparse import AnnealSlope, L0Encoder, MSparseEncoder
from unrolled.training import fit

SEEDS = (1, 2, 3)  # what is fixed below was tried out on seed 0
MEASUREMENTS, ATOMS, NONZEROS, SNR = 50, 100, 5, 30.0
DEPTHS, STEPS, BATCH = (1, 2, 4, 8), 500, 128
STEP_SIZES, PRICES = (None, 0.3, 0.5, 0.65, 0.8, 1.0), (0.01, 0.03, 0.1, 0.2)
SLOPE = 0.9
DIGIT_ATOMS, DIGIT_NONZEROS, DIGIT_LAYERS, DIGIT_STEPS = 128, 10, 2, 300
DIGIT_PRICES = (0.3, 1.0, 3.0)


# ---- Training --------------------------------------------------------------------------------------------------------


def train(model: nn.Module, batches: Any, loss: Any, num_steps: int, rate: float) -> float:
    """Adam with a cosine, ten times the rate and more for thresholds; returns the CPU seconds."""
    groups = [
        {"params": [p for name, p in model.named_parameters() if not name.endswith("log_theta")], "lr": rate},
        {"params": [p for name, p in model.named_parameters() if name.endswith("log_theta")], "lr": 2e-2},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    callbacks = []
    if any(isinstance(module, L0Encoder) for module in model.modules()):
        callbacks.append(AnnealSlope(int(0.9 * num_steps), start=SLOPE))
    run = fit(model, batches, loss, num_steps=num_steps, optimizer=optimizer, scheduler=scheduler, callbacks=callbacks)
    return run.seconds


def layered(net: Unroll, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The squared error of every layer, each weighing 0.3 of the next."""
    y, x = batch
    errors = [(code - x).square().sum(-1).mean() for code in net.iterates(y)]
    return torch.stack([0.3 ** (len(errors) - 1 - k) * error for k, error in enumerate(errors)]).sum()


# ---- Recovery --------------------------------------------------------------------------------------------------------


def draw(D: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signals and codes with exactly NONZEROS nonzeros."""
    places = top_k_threshold(torch.rand(count, ATOMS, generator=generator), NONZEROS) != 0
    x = torch.randn(count, ATOMS, generator=generator) * places
    y = x @ D.T
    scale = y.std(-1, correction=0, keepdim=True) * 10 ** (-SNR / 20)
    return y + scale * torch.randn(y.shape, generator=generator), x


def recovery(seed: int, bar: tqdm) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    D = normalize_columns(torch.randn(MEASUREMENTS, ATOMS, generator=generator))
    trial, truth = draw(D, 500, generator)
    y, x = draw(D, 1000, generator)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(D, BATCH, generator)

    def best(solve: Callable[..., Tensor], options: list[dict[str, Any]]) -> dict[str, Any]:
        scores = [nmse_db(solve(D, trial, **option).nan_to_num(1e9, 1e9, -1e9), truth) for option in options]
        return options[scores.index(min(scores))]

    rows = {}
    steps = [{"step_size": step, "sparsity": NONZEROS} for step in STEP_SIZES]
    priced = [{"step_size": step, "alpha": price} for step in STEP_SIZES for price in PRICES]
    for K in DEPTHS:
        own = {"num_iters": K}
        rows[f"IHT, step 1/L, {K}"] = score(timed(lambda: solvers.iht(D, y, NONZEROS, num_iters=K)), x)  # noqa: B023
        for name, solve, options in (("IHT", solvers.iht, steps), ("IHT by price", solvers.iht_penalized, priced)):
            chosen = best(solve, [option | own for option in options])
            rows[f"{name}, {K}"] = score(timed(lambda: solve(D, y, **chosen)), x) | {"chosen": chosen}  # noqa: B023
        nets = {
            "L0Encoder": (L0Encoder(D, K, alpha=0.02, step_size=0.4, slope=SLOPE), 1e-3),
            "MSparseEncoder": (MSparseEncoder(D, K, sparsity=NONZEROS, step_size=0.65), 2e-3),
        }
        for name, (net, rate) in nets.items():
            seconds = train(net, batches(), layered, STEPS, rate)
            rows[f"{name}, {K}"] = score(timed(lambda: net(y)), x) | {"training seconds": seconds}  # noqa: B023
            bar.update()
    settled = best(solvers.iht, [option | {"num_iters": 1000, "tol": 1e-6} for option in steps])
    rows["IHT, settled"] = score(timed(lambda: solvers.iht(D, y, **settled)), x) | {"chosen": settled}
    rows["OMP"] = score(timed(lambda: omp(D, y, NONZEROS)), x)
    return rows


def omp(D: Tensor, y: Tensor, nonzeros: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a signal that is explained before it has all its nonzeros
        codes = sparse_encode(y.numpy(), D.T.contiguous().numpy(), algorithm="omp", n_nonzero_coefs=nonzeros)
    return torch.from_numpy(codes).to(y)


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    begin = time.process_time()
    with torch.no_grad():
        codes = call()
    return codes, time.process_time() - begin


def score(found: tuple[Tensor, float], x: Tensor) -> dict[str, Any]:
    codes, seconds = found
    hits = ((codes != 0) & (x != 0)).sum(1)
    f1 = 2 * hits / ((codes != 0).sum(1) + (x != 0).sum(1))
    return {
        "NMSE dB": nmse_db(codes, x),
        "support": f1.double().mean().item(),
        "nonzeros": (codes != 0).sum(1).double().mean().item(),
        "seconds per 1000": seconds,
    }


# ---- Digits ----------------------------------------------------------------------------------------------------------


def digits(seed: int, bar: tqdm) -> dict[str, dict[str, Any]]:
    data, labels = load_digits(return_X_y=True)
    split = train_test_split(data / 16, labels, test_size=0.3, random_state=seed, stratify=labels)
    y, y_test, label, label_test = (torch.from_numpy(part) for part in split)
    y, y_test = y.float(), y_test.float()
    trained, held = train_test_split(torch.arange(len(y)), test_size=0.25, random_state=seed, stratify=label)
    D = learn_dictionary(y, DIGIT_ATOMS, 0.2, passes=3, seed=seed)
    M, K = DIGIT_NONZEROS, DIGIT_LAYERS
    generator = torch.Generator().manual_seed(seed)

    def batches(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
        while True:
            chosen = torch.randint(len(y), (128,), generator=generator)
            yield tuple(part[chosen] for part in parts)

    def classify(codes: Any, test: Any) -> tuple[float, float]:
        """Accuracy on held out training digits, by which C is chosen, and on test digits."""
        size = codes.square().mean().sqrt()
        codes, test = (codes / size).double().numpy(), (test / size).double().numpy()
        accuracy = {}
        for C in (0.1, 1.0):
            model = LogisticRegression(C=C, max_iter=1000).fit(codes[trained], label[trained])
            accuracy[C] = model.score(codes[held], label[held])
        model = LogisticRegression(C=max(accuracy, key=accuracy.__getitem__), max_iter=1000).fit(codes, label)
        return max(accuracy.values()), model.score(test, label_test)

    def row(encode: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            codes, test = encode(y), encode(y_test)
        held_out, accuracy = classify(codes, test)
        figures = {"accuracy": accuracy, "held out": held_out, "nonzeros": (test != 0).sum(1).double().mean().item()}
        if test.shape[1] == DIGIT_ATOMS:
            residual = (y_test - test @ D.T).square().sum() / y_test.square().sum()
            figures["residual"] = residual.item()
        return figures

    def choose(options: list[dict[str, Any]]) -> dict[str, Any]:
        tried = [row(lambda z, o=option: solvers.iht(D, z, M, **o)) | {"chosen": option} for option in options]
        return max(tried, key=lambda one: one["held out"])

    def end_to_end(net: Unroll) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(net, nn.Linear(DIGIT_ATOMS, 10))

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        seconds = train(model, batches(y, label), loss, DIGIT_STEPS, 2e-3)
        bar.update()
        return row(net) | {"training seconds": seconds}

    L = float(solvers.lipschitz(D))
    step_sizes = [scale / L for scale in (1, 2, 4)]
    rows = {"pixels": row(lambda z: z)}
    rows[f"IHT, {K}"] = choose([{"num_iters": K, "step_size": step} for step in step_sizes])
    rows["IHT, settled"] = choose([{"num_iters": 500, "tol": 1e-6}])
    rows["OMP"] = row(lambda z: omp(D, z, M))
    net = MSparseEncoder(D, K, sparsity=M)
    seconds = train(net, batches(y, omp(D, y, M)), CodeError(), DIGIT_STEPS, 2e-3)
    rows[f"MSparseEncoder on OMP's codes, {K}"] = row(net) | {"training seconds": seconds}
    rows[f"MSparseEncoder end to end, {K}"] = end_to_end(MSparseEncoder(D, K, sparsity=M))
    tried = [end_to_end(L0Encoder(D, K, alpha=price, slope=SLOPE)) | {"price": price} for price in DIGIT_PRICES]
    allowed = [one for one in tried if one["nonzeros"] <= M] or [min(tried, key=lambda one: one["nonzeros"])]
    rows[f"L0Encoder end to end, {K}"] = max(allowed, key=lambda one: one["held out"])
    return rows


# ---- Output ----------------------------------------------------------------------------------------------------------


def plot(runs: list[dict[str, dict[str, Any]]]) -> None:
    """Error and support against layers, the mean of the seeds, and OMP and settled IHT as levels."""
    try:
        from matplotlib.figure import Figure

        from unrolled.plot import COLOURS
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2),
        ("NMSE dB", "support"),
        ("NMSE in dB, lower is better", "support found (F1)"),
        strict=True,
    ):
        mean = lambda name: statistics.mean(run[name][column] for run in runs)  # noqa: B023
        lines = ("MSparseEncoder", "L0Encoder", "IHT", "IHT by price", "IHT, step 1/L")
        styles = ("-", "-", "--", "--", "--")
        for name, colour, style in zip(lines, (*COLOURS[:2], COLOURS[0], COLOURS[1], "#6b6b6b"), styles, strict=True):
            values = [mean(f"{name}, {K}") for K in DEPTHS]
            axes.plot(DEPTHS, values, style, color=colour, marker="o", markersize=4, linewidth=2, label=name)
        for name, style in (("OMP", ":"), ("IHT, settled", "-.")):
            axes.axhline(mean(name), color="#222222", linestyle=style, linewidth=1.2, label=name)
        axes.set(xlabel="layers or iterations", ylabel=label, xscale="log", xticks=DEPTHS)
        axes.set_xticks(DEPTHS, [str(K) for K in DEPTHS])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, handlelength=3)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "deep_l0_recovery.png", dpi=110)


def show(title: str, runs: list[dict[str, dict[str, Any]]], columns: list[str], worst: Callable[..., float]) -> None:
    rows = []
    for name in runs[0]:
        means = [statistics.mean(run[name][c] for run in runs) if c in runs[0][name] else "" for c in columns]
        rows.append([name, *means, worst(run[name][columns[0]] for run in runs)])
    print(f"\n{title}, mean of {len(runs)} seeds")
    table(rows, ["", *columns, f"worst {columns[0]}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="recovery, digits; default: both")
    parts = parser.parse_args().parts or ["recovery", "digits"]
    if not set(parts) <= {"recovery", "digits"}:
        parser.error(f"the parts are recovery and digits, got {', '.join(parts)}")
    torch.set_num_threads(1)
    if "recovery" in parts:
        begin = time.process_time()
        with tqdm(total=len(SEEDS) * 2 * len(DEPTHS), desc="trainings") as bar:
            runs = [recovery(seed, bar) for seed in SEEDS]
        columns = ["NMSE dB", "support", "nonzeros", "seconds per 1000", "training seconds"]
        show(f"recovery, m = {MEASUREMENTS}, n = {ATOMS}, {NONZEROS} nonzeros, {SNR:g} dB", runs, columns, max)
        save("deep_l0_recovery", {"CPU seconds": time.process_time() - begin, "seeds": runs})
        plot(runs)
    if "digits" in parts:
        begin = time.process_time()
        with tqdm(total=len(SEEDS) * (1 + len(DIGIT_PRICES)), desc="trainings") as bar, threadpool_limits(1):
            runs = [digits(seed, bar) for seed in SEEDS]
        columns = ["accuracy", "nonzeros", "residual", "training seconds"]
        show(f"digits, {DIGIT_ATOMS} atoms, {DIGIT_NONZEROS} nonzeros", runs, columns, min)
        save("deep_l0_digits", {"CPU seconds": time.process_time() - begin, "seeds": runs})


if __name__ == "__main__":
    main()
