"""An algorithm of one's own, trained: total variation denoising of piecewise constant signals.

    python examples/own_algorithm.py --out own_algorithm

Ten iterations of a primal-dual solver become a network of ten layers with two numbers each, the weight of the total
variation and the step size. It learns from pairs of noisy and clean signals, and is compared with itself before
training and with the solver at the weight that suits these signals best, after ten iterations and after thousands.

Ten iterations carry information over ten samples at most, which no training changes: expect the trained network between
the solver stopped after ten iterations and the one that ran until nothing moved.

Prints a table over three seeds; writes `results.json` and, where matplotlib is installed, `own_algorithm.png` into the
folder given by `--out`.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import Step, Unroll, fit

LENGTH = 128  # samples of a signal
PEAK = 4.0  # clean signals lie between 0 and this
NOISE = 0.5  # standard deviation of the white Gaussian noise
NUM_LAYERS = 10
WEIGHTS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 2.0]  # of the total variation, to choose from


class State(NamedTuple):
    x: Tensor  # the signal, (batch, n)
    ahead: Tensor  # the signal, extrapolated
    dual: Tensor  # one variable for each jump, (batch, n - 1)


class TotalVariation(Step):
    """min_x 1/2 |x - y|^2 + lam sum_i |x_i+1 - x_i| by Chambolle and Pock's primal-dual iteration."""

    def __init__(self, lam=0.5, step=0.5):
        super().__init__()
        self.log_lam = nn.Parameter(torch.tensor(lam).log())  # logarithms: positive whatever is learned
        self.log_step = nn.Parameter(torch.tensor(step).log())

    def init(self, y):
        return State(y, y, torch.zeros_like(y[..., 1:]))

    def forward(self, state, y):
        step, lam = self.log_step.exp(), self.log_lam.exp()
        dual = (state.dual + 0.5 * state.ahead.diff()).clamp(-lam, lam)
        x = (state.x + step * (nn.functional.pad(dual, (1, 1)).diff() + y)) / (1 + step)
        return State(x, 2 * x - state.x, dual)

    def readout(self, state):
        return state.x


def draw(count, generator):
    """Pairs (noisy, clean): a new level in [0, PEAK] at each sample with probability 1/16."""
    jumps = torch.rand(count, LENGTH, generator=generator) < 1 / 16
    levels = PEAK * torch.rand(count, LENGTH, generator=generator)
    position = torch.where(jumps, torch.arange(LENGTH), 0).cummax(1).values  # of the latest jump
    clean = levels.gather(1, position)
    return clean + NOISE * torch.randn(count, LENGTH, generator=generator), clean


def endless(batch_size, generator):
    while True:
        yield draw(batch_size, generator)


def squared_error(net, batch):
    noisy, clean = batch
    return (net(noisy) - clean).square().mean()


@torch.no_grad()
def tuned(num_iters, batch):
    """The classical solver with the best of the weights for this batch."""
    nets = [Unroll(TotalVariation(lam), num_iters) for lam in WEIGHTS]
    return min(nets, key=lambda net: squared_error(net, batch).item())


def run(seed, options):
    """Train one network; returns the mean squared errors on the test signals, the nets, and one signal to look at."""
    generator = torch.Generator().manual_seed(seed)
    validation, test = draw(options.num_signals, generator), draw(options.num_signals, generator)

    trained = Unroll(TotalVariation(), NUM_LAYERS, tied=False)
    fit(trained, endless(64, generator), squared_error, num_steps=options.num_steps, seed=seed, progress=True)
    nets = {
        "untrained": Unroll(TotalVariation(), NUM_LAYERS),
        "tuned": tuned(NUM_LAYERS, validation),
        "trained": trained,
        "converged": tuned(options.solver_iters, validation),
    }
    with torch.no_grad():
        mse = {name: squared_error(net, test).item() for name, net in nets.items()}
    noisy, clean = test
    return {"noisy": (noisy - clean).square().mean().item(), **mse}, nets, (noisy[0], clean[0])


def learned(net, name):
    """The value of a positive parameter, kept as its logarithm, in every layer."""
    return [getattr(step, f"log_{name}").detach().exp().item() for step in net]


def report(errors, nets, options):
    """The table: mean squared error and PSNR of each method, averaged over the seeds, and the spread of the PSNR."""
    titles = {
        "noisy": "noisy",
        "untrained": f"untrained, {NUM_LAYERS} iterations, weight {learned(nets['untrained'], 'lam')[0]:g}",
        "tuned": f"solver, {NUM_LAYERS} iterations, best weight",
        "trained": f"trained, {NUM_LAYERS} iterations",
        "converged": f"solver, {options.solver_iters} iterations, best weight",
    }
    print(f"\n{len(errors)} seeds, {options.num_signals} test signals each; PSNR with peak {PEAK:g}\n")
    print(f"{'':38}  {'MSE':>8}  {'PSNR (dB)':>9}  {'lowest':>6}  {'highest':>7}")
    for name, title in titles.items():
        mse = torch.tensor([error[name] for error in errors], dtype=torch.float64)
        psnr = 10 * torch.log10(PEAK**2 / mse)
        print(f"{title:38}  {mse.mean():8.4f}  {psnr.mean():9.2f}  {psnr.min():6.2f}  {psnr.max():7.2f}")
    best = [
        f"{learned(nets[name], 'lam')[0]:g} for {nets[name].num_iters} iterations" for name in ("tuned", "converged")
    ]
    print(f"\nbest weights (last seed): {', '.join(best)}")
    print(f"the trained network has {sum(parameter.numel() for parameter in nets['trained'].parameters())} parameters")


def plot(nets, signal, path):
    """One test signal before and after, and what was learned in every layer."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    orange, blue, grey = "#d55e00", "#0072b2", "#999999"  # of Okabe and Ito: told apart by colour-blind readers too
    noisy, clean = signal
    figure, axes = plt.subplot_mosaic(
        [["untrained", "untrained", "lam"], ["trained", "trained", "step"]], figsize=(11, 5.6), layout="constrained"
    )
    for name, color in (("untrained", orange), ("trained", blue)):
        with torch.no_grad():
            x = nets[name](noisy)
        axis = axes[name]
        axis.plot(noisy, ".", color=grey, markersize=4, label="noisy")
        axis.plot(clean, color="black", linewidth=1, drawstyle="steps-mid", label="clean")
        axis.plot(x, color=color, linewidth=2, label=f"{name}, {NUM_LAYERS} iterations")
        axis.set_title(f"{name}: mean squared error {(x - clean).square().mean():.3f}", loc="left", fontsize=10)
        axis.set_ylabel("value")
        axis.set_ylim(noisy.min() - 0.2, noisy.max() + 1.6)
        axis.legend(loc="upper center", ncols=3, frameon=False, fontsize=9)
    axes["trained"].set_xlabel("sample")

    layers = range(1, NUM_LAYERS + 1)
    for name, title in (("lam", "weight of the total variation"), ("step", "step size (logarithmic)")):
        axis = axes[name]
        axis.plot(layers, learned(nets["untrained"], name), "--", color=orange, label="untrained")
        axis.plot(layers, learned(nets["trained"], name), "o-", color=blue, label="trained")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xticks(layers)
        axis.legend(frameon=False, fontsize=9)
    axes["lam"].set_ylim(bottom=0)
    axes["step"].set_yscale("log")
    axes["step"].set_xlabel("layer")
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("own_algorithm"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    options = argparse.Namespace(num_steps=600, num_signals=500, solver_iters=3000, seeds=range(3))
    if arguments.smoke:
        options = argparse.Namespace(num_steps=60, num_signals=100, solver_iters=100, seeds=range(1))

    errors = []
    for seed in options.seeds:
        mse, nets, signal = run(seed, options)
        errors.append(mse)
    report(errors, nets, options)

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    results.write_text(json.dumps({"mse": errors}, indent=1) + "\n")
    print(f"written: {results}")
    plot(nets, signal, arguments.out / "own_algorithm.png")


if __name__ == "__main__":
    main()
