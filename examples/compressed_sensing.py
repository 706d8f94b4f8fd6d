"""Compressed sensing: signals of 500 samples, from 250 random measurements of each.

    python examples/compressed_sensing.py --out compressed_sensing

Signals that are sums of some 50 cosines are sparse in the discrete cosine transform (DCT). A random matrix measures
half as many numbers as a signal has samples; the dictionary is that matrix times the inverse DCT, and the sparse code
of the measurements is the spectrum of the signal. Classical solvers and networks of 16 layers find it: HyperLISTA as it
is, ALISTA with two numbers a layer set by search and then trained, and LISTA-CPSS with a matrix in every layer.

The second part has no matrix at all: the dictionary is a convolution, the codes are spike trains, and Step-LISTA learns
16 step sizes from the signals alone.

Prints tables; writes `results.json` and, where matplotlib is installed, `compressed_sensing.png` and `spikes.png` into
the folder given by `--out`.
"""

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import scipy.fft
import torch
from sklearn.decomposition import sparse_encode

from unrolled import fit
from unrolled.losses import Lasso
from unrolled.metrics import nmse_db, recovery_report
from unrolled.operators import Boundary, Convolution
from unrolled.problems import SparseRecovery
from unrolled.recipes import greedy, train
from unrolled.solvers import fista, ista, lasso_objective
from unrolled.sparse import ALISTA, LISTACP, HyperLISTA, StepLISTA, SupportSelection

NUM_LAYERS = 16
ORANGE, BLUE, GREEN, PURPLE, GREY = "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#999999"  # of Okabe and Ito


# ---- Signals that are sparse in the DCT ------------------------------------------------------------------------------


def sensing(m, n):
    """A random matrix (m, n), and the dictionary: what it measures of each cosine."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(m, n, generator=generator) / math.sqrt(m)
    return matrix, matrix @ synthesize(torch.eye(n)).T


def synthesize(spectrum):
    """Signals (..., n) of their spectra, by the inverse of the orthogonal DCT."""
    return torch.from_numpy(scipy.fft.idct(spectrum.numpy(), norm="ortho"))


def omp(dictionary, y, num_atoms):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it stops early where a signal is already explained
        found = sparse_encode(y.numpy(), dictionary.T.numpy(), algorithm="omp", n_nonzero_coefs=num_atoms)
    return torch.from_numpy(found)


@torch.no_grad()
def best(solve, values, problem):
    """The value for which the solver has the least error on validation signals."""
    y, x = problem.validation(100)
    return min(values, key=lambda value: nmse_db(solve(y, value), x))


def methods(problem, effort):
    """By name: a function from measurements to spectra, or a network; and the seconds that its training took."""
    D = problem.dictionary
    n = D.shape[1]
    solvers = {
        "ISTA": (lambda y, alpha: ista(D, y, alpha, num_iters=NUM_LAYERS), (0.03, 0.1, 0.2, 0.4)),
        "FISTA": (lambda y, alpha: fista(D, y, alpha, num_iters=NUM_LAYERS), (0.03, 0.1, 0.2, 0.4)),
        "OMP": (lambda y, share: omp(D, y, int(share * n)), (0.1, 0.12, 0.14)),
    }
    found = {}
    for name, (solve, values) in solvers.items():
        value = best(solve, values, problem)
        found[name] = (lambda y, solve=solve, value=value: solve(y, value)), 0.0
    found["HyperLISTA, not trained"] = HyperLISTA(D, NUM_LAYERS), 0.0
    searched = ALISTA(D, NUM_LAYERS)
    begin = time.process_time()
    greedy(searched, problem, num_signals=400)
    found["ALISTA, searched"] = searched, time.process_time() - begin
    networks = {
        "ALISTA, trained": ALISTA(D, NUM_LAYERS),
        "LISTA-CPSS, trained": LISTACP(D, NUM_LAYERS, support_selection=SupportSelection()),
    }
    for name, net in networks.items():
        print(f"training {name.removesuffix(', trained')} ...")
        found[name] = net, train(net, problem, effort=effort).seconds
    return found


@torch.no_grad()
def recover(found, problem, num_signals):
    """The table, and the codes by name."""
    y, x = problem.test(num_signals)
    rows, codes = {}, {}
    for name, (solve, training) in found.items():
        solve(y[:10])  # the first call is slower
        begin = time.process_time()
        codes[name] = solve(y)
        report = recovery_report(codes[name], x)
        rows[name] = {
            "seconds": time.process_time() - begin,
            "training": training,
            "nmse_db": report.nmse_db,
            "per_sample_nmse_db": report.per_sample_nmse_db,
            "fraction_recovered": report.fraction_recovered,
        }
    return rows, codes


def print_table(rows, num_signals):
    print(f"\nspectra of {num_signals} test signals; recovered: to -60 dB; CPU seconds\n")
    print(f"{'':24}  {'NMSE':>8}  {'mean of dB':>10}  {'recovered':>9}  {'seconds':>7}  {'training':>8}")
    for name, row in rows.items():
        print(
            f"{name:24}  {row['nmse_db']:5.1f} dB  {row['per_sample_nmse_db']:7.1f} dB"
            f"  {100 * row['fraction_recovered']:7.1f} %  {row['seconds']:7.2f}  {row['training']:8.1f}"
        )


@torch.no_grad()
def layers(found, problem, num_signals):
    """NMSE in dB after each layer or iteration."""
    y, x = problem.test(num_signals)
    curves = {name: [nmse_db(codes, x) for codes in net.iterates(y)] for name, (net, _) in found.items() if is_net(net)}
    alphas = 0.03, 0.1, 0.2, 0.4
    alpha = best(lambda y, a: fista(problem.dictionary, y, a, num_iters=NUM_LAYERS), alphas, problem)
    curves["FISTA"] = [nmse_db(fista(problem.dictionary, y, alpha, num_iters=k), x) for k in range(1, NUM_LAYERS + 1)]
    return curves


def is_net(solve):
    return isinstance(solve, torch.nn.Module)


# ---- Spikes: a dictionary that is a convolution ----------------------------------------------------------------------


def waveforms(length):
    """Three shapes of norm 1, (1, 3, length): a decay, an oscillation, a biphasic pulse."""
    t = torch.arange(length) / length
    shapes = torch.stack(((-6 * t).exp(), (12 * math.pi * t / 2).sin() * (-3 * t).exp(), (2 * math.pi * t).sin()))
    return torch.nn.functional.normalize(shapes, dim=-1).unsqueeze(0)


def spike_trains(A, count, generator):
    """Signals (count, 1, size) with noise, and the spikes that they are made of, (count, 3, size)."""
    x = 1 + torch.rand(count, *A.in_shape, generator=generator)
    x = x * (torch.rand(x.shape, generator=generator) < 0.01)
    y = A(x)
    return y + 0.03 * torch.randn(y.shape, generator=generator), x


def spikes(options, size=256, alpha=0.1, num_layers=16):
    """Step-LISTA on spike trains: how far from the minimum of the Lasso, beside ISTA and FISTA."""
    A = Convolution(waveforms(32), in_shape=(3, size), boundary=Boundary.CIRCULAR)
    generator = torch.Generator().manual_seed(0)

    def signals():
        while True:
            yield spike_trains(A, 32, generator)[0]

    nets = {"Step-LISTA": StepLISTA(A, num_layers, alpha=alpha)}
    nets["Step-LISTA with momentum"] = StepLISTA(A, num_layers, alpha=alpha, momentum=True)
    for net in nets.values():
        fit(net, signals(), Lasso(A, alpha), num_steps=options.num_steps, seed=0)
    y, x = spike_trains(A, options.num_trains, torch.Generator().manual_seed(1))
    with torch.no_grad():
        least = lasso_objective(A, y, fista(A, y, alpha, num_iters=options.solver_iters), alpha)
        found = {
            f"ISTA, {num_layers} iterations": ista(A, y, alpha, num_iters=num_layers),
            f"FISTA, {num_layers} iterations": fista(A, y, alpha, num_iters=num_layers),
            **{f"{name}, {num_layers} layers": net(y) for name, net in nets.items()},
        }
        gaps = {
            name: ((lasso_objective(A, y, codes, alpha) - least).sum() / least.sum()).item()
            for name, codes in found.items()
        }
    return gaps, (y[0, 0], x[0], {name: codes[0] for name, codes in found.items()})


# ---- Pictures --------------------------------------------------------------------------------------------------------


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, axes, path):
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(f"written: {path}")


def plot_recovery(curves, matrix, problem, codes, path):
    """The error after each layer, and one signal with its recovery by FISTA and by ALISTA."""
    plt = pyplot()
    figure, axes = plt.subplot_mosaic(
        [["layers", "signal"], ["layers", "spectrum"]], figsize=(12, 5.6), layout="constrained", width_ratios=(1, 1.4)
    )
    axis = axes["layers"]
    colours = (GREEN, PURPLE, BLUE, "#56b4e9", ORANGE)
    for (name, curve), colour in zip(curves.items(), colours):
        axis.plot(range(1, len(curve) + 1), curve, "o-", color=colour, markersize=4, label=name)
    axis.set_xlabel("layer or iteration")
    axis.set_xticks(range(0, NUM_LAYERS + 1, 4))
    axis.set_title("error of the spectra, NMSE in dB", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=9, loc="lower left")

    x = problem.test(len(codes["FISTA"])).x[0]
    n = len(x)
    window = slice(0, n // 8)
    axis = axes["signal"]
    axis.plot(synthesize(x)[window], color=GREY, linewidth=5, alpha=0.6, label="true signal")
    for name, colour in (("FISTA", ORANGE), ("ALISTA, trained", BLUE)):
        error = nmse_db(synthesize(codes[name][0]), synthesize(x))
        label = f"{name}: {error:.0f} dB"
        axis.plot(synthesize(codes[name][0])[window], color=colour, linewidth=1.4, label=label)
    axis.set_title(f"one signal, from {len(matrix)} measurements of its {n} samples", loc="left", fontsize=10)
    axis.set(xlabel=f"sample (the first {n // 8})", xlim=(0, n // 8 - 1))
    axis.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.02))
    axis.margins(y=0.2)

    axis = axes["spectrum"]
    nonzero = x.nonzero().squeeze(1)
    axis.vlines(nonzero, 0, x[nonzero], color=GREY, linewidth=3, alpha=0.6, label="true")
    axis.plot(codes["FISTA"][0], ".", color=ORANGE, markersize=4, label="FISTA")
    axis.plot(nonzero, codes["ALISTA, trained"][0][nonzero], "x", color=BLUE, markersize=5, label="ALISTA, trained")
    axis.set_title("its spectrum: the sparse code", loc="left", fontsize=10)
    axis.set(xlabel="frequency", xlim=(-2, n + 1))
    axis.legend(frameon=False, fontsize=9, ncols=3)
    axis.margins(y=0.2)
    save(figure, axes.values(), path)


def plot_spikes(gaps, signal, path):
    """One signal, and where the spikes are, by waveform."""
    plt = pyplot()
    y, x, found = signal
    shown = {name: found[name] for name in found if name.startswith("FISTA") or "momentum" in name}
    figure, axes = plt.subplots(1 + len(shown), 1, figsize=(11, 6.2), layout="constrained", sharex=True)
    axes[0].plot(y, color="black", linewidth=1)
    axes[0].set_title("signal: three waveforms wherever there is a spike, and noise", loc="left", fontsize=10)
    for axis, (name, codes) in zip(axes[1:], shown.items()):
        for k, colour in enumerate((BLUE, ORANGE, GREEN)):
            at = x[k].nonzero().squeeze(1)
            axis.plot(at, x[k][at], "o", color=colour, fillstyle="none", markersize=9)
            at = (codes[k].abs() > 1e-3).nonzero().squeeze(1)
            axis.vlines(at, 0, codes[k][at], color=colour, linewidth=2, label=f"waveform {k + 1}")
        axis.set_title(f"{name}: {100 * gaps[name]:.2g} % above the minimum", loc="left", fontsize=10)
        axis.axhline(0, color=GREY, linewidth=0.6)
    axes[1].plot([], [], "o", color=GREY, fillstyle="none", markersize=9, label="true spike")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper right", frameon=False, fontsize=9, ncols=4)
    axes[-1].set_xlabel("sample")
    save(figure, axes, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("compressed_sensing"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    options = argparse.Namespace(
        m=250, n=500, num_signals=1000, effort=0.25, num_steps=300, num_trains=100, solver_iters=3000
    )
    if arguments.smoke:
        options = argparse.Namespace(
            m=60, n=120, num_signals=100, effort=0.02, num_steps=15, num_trains=5, solver_iters=300
        )

    torch.set_num_threads(1)  # so that seconds can be compared; scikit-learn's OMP has one, too
    matrix, dictionary = sensing(options.m, options.n)
    problem = SparseRecovery(dictionary=dictionary, sparsity=0.1)
    found = methods(problem, options.effort)
    rows, codes = recover(found, problem, options.num_signals)
    print_table(rows, options.num_signals)
    gaps, signal = spikes(options)
    print("\nspike trains: the Lasso objective above its minimum\n")
    for name, gap in gaps.items():
        print(f"{name:38}  {100 * gap:7.3f} %")

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    results.write_text(json.dumps({"recovery": rows, "spikes": gaps}, indent=1) + "\n")
    print(f"\nwritten: {results}")
    try:
        pyplot()
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    curves = layers(found, problem, options.num_signals)
    plot_recovery(curves, matrix, problem, codes, arguments.out / "compressed_sensing.png")
    plot_spikes(gaps, signal, arguments.out / "spikes.png")


if __name__ == "__main__":
    main()
