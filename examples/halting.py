"""A network that decides how long to think: LISTA with a learned number of layers for each signal.

    python examples/halting.py
    python examples/halting.py --weight 0.5       # dearer layers: fewer of them, and a larger error

Some signals are made of two atoms, others of fifteen. The first are decoded after a few layers, the others need all
twelve. A network of fixed depth treats them alike. Here each layer is followed by a decision, made by three learned
numbers: go on, or stop. Training weighs the error after n layers by the probability to stop there.

The table compares it with the same network cut after a fixed layer. Writes `results.json` and, where matplotlib is
installed, `halting.png` into the folder given by `--out`.
"""

import argparse
import json
from pathlib import Path

import torch

from unrolled import LISTA, Trace, fit
from unrolled.functional import normalize_columns
from unrolled.stopping import ExpectedLoss, Halting, Settling, outcomes

M, N, LAYERS = 50, 100, 12
DENSITY = (0.01, 0.15)  # share of nonzeros, from the easiest signals to the hardest


def draw(dictionary, count, generator):
    """Signals, their codes, and how dense each code is."""
    low, high = DENSITY
    density = low + (high - low) * torch.rand(count, 1, generator=generator)
    x = torch.randn(count, N, generator=generator) * (torch.rand(count, N, generator=generator) < density)
    return x @ dictionary.T, x, density.flatten()


def batches(dictionary, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(dictionary, 128, generator)[:2]


def error(found, batch):
    """Squared error of each signal's code."""
    return (found - batch[1]).square().sum(-1)


def every_layer(net, batch):
    return torch.stack([error(found, batch).mean() for found in net.iterates(batch[0])]).mean()


def train(dictionary, weight, num_steps):
    net = LISTA(dictionary, LAYERS, alpha=0.1)
    # First every layer learns to be an answer, then when to stop is learned with it.
    fit(net, batches(dictionary, 1), every_layer, num_steps=num_steps, seed=0, progress=True)
    net.stop = Halting(Settling(rtol=0.1))
    loss = ExpectedLoss(error, weight=weight)
    fit(net, batches(dictionary, 2), loss, num_steps=num_steps, seed=0, progress=True)
    return net


def decibels(found, x):
    return float(10 * ((found - x).square().sum() / x.square().sum()).log10())


def plot(density, used, cut, point, path):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(range(1, LAYERS + 1), cut, "o-", color="#56B4E9", markersize=4, label="all cut after the same layer")
    left.plot(*point, "o", color="#D55E00", label="each stops by itself")
    left.set(xlabel="mean layers used", ylabel="NMSE in dB")
    left.legend(frameon=False)
    right.scatter(100 * density, used + 0.6 * (torch.rand(len(used)) - 0.5), s=3, color="#D55E00", alpha=0.4)
    right.set(xlabel="nonzeros of the code, per cent", ylabel="layers used", ylim=(0, LAYERS + 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weight", type=float, default=0.1, help="of the divergence from the prior")
    parser.add_argument("--steps", type=int, default=800, help="updates in each of the two phases")
    parser.add_argument("--out", type=Path, default=Path("halting"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dictionary = normalize_columns(torch.randn(M, N, generator=torch.Generator().manual_seed(0)))
    with torch.enable_grad():
        net = train(dictionary, arguments.weight, 60 if arguments.smoke else arguments.steps)

    y, x, density = draw(dictionary, 2000, torch.Generator().manual_seed(3))
    with Trace(net) as trace:
        found = net(y)
    used = trace.num_iters.double()
    cut = [decibels(answer, x) for answer in outcomes(net, y).readouts]
    point = (float(used.mean()), decibels(found, x))
    print(f"\neach stops by itself: {point[0]:.2f} layers on average, {point[1]:.2f} dB")
    for k, value in enumerate(cut, 1):
        print(f"all cut after layer {k:2}: {value:6.2f} dB")
    easy, hard = density < 0.05, density > 0.11
    print(f"layers used by easy signals {used[easy].mean():.2f}, by hard ones {used[hard].mean():.2f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {
        "layers": point[0],
        "nmse_db": point[1],
        "cut_nmse_db": cut,
        "easy": float(used[easy].mean()),
        "hard": float(used[hard].mean()),
    }
    (arguments.out / "results.json").write_text(json.dumps(results))
    print(f"written: {arguments.out / 'results.json'}")
    plot(density, used, cut, point, arguments.out / "halting.png")


if __name__ == "__main__":
    main()
