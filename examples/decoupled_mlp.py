"""Four layers that do not wait for each other: a classifier trained by decoupled neural interfaces, in a minute.

    python examples/decoupled_mlp.py
    python examples/decoupled_mlp.py --data mnist.npz       # arrays x (images, height, width) and y

The same layers learn handwritten digits five times: by backpropagation; by synthetic gradients that see the activation
alone (DNI); by ones that see the label too (cDNI); by the latter with each layer updated one time in five only; and
with layers that do not even wait for their inputs, but run on predictions of them. In all but the first, a layer is
updated as soon as its own forward is done. The last images are for testing; nothing is chosen by them.

Writes `results.json` and, where matplotlib is installed, `decoupled_mlp.png` into the folder given by `--out`.
"""

import argparse
import functools
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from unrolled.decoupled import DecoupledChain, LinearSynthesiser, MLPSynthesiser

WIDTH, BATCH = 64, 64
adam = functools.partial(torch.optim.Adam, lr=2e-3)


def load(path):
    """Images as rows with mean 0 and variance 1, and labels; the last sixth is for testing."""
    if path is None:
        x, y = load_digits(return_X_y=True)
    else:
        if not path.exists():
            raise SystemExit(f"--data: {path} does not exist")
        with np.load(path) as arrays:
            if not {"x", "y"} <= {*arrays.files}:
                raise SystemExit(f"--data: {path} has arrays {', '.join(arrays.files)}; x (images) and y are needed")
            x, y = arrays["x"], arrays["y"]
    x = torch.from_numpy(x.reshape(len(x), -1).astype(np.float32))
    y = torch.from_numpy(y.astype(np.int64))
    first = len(x) * 5 // 6
    x = (x - x[:first].mean()) / x[:first].std()
    return (x[:first], y[:first]), (x[first:], y[first:])


def layers(inputs, classes):
    sizes = [inputs, WIDTH, WIDTH, WIDTH]
    hidden = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return [*hidden, nn.Linear(WIDTH, classes)]


def methods(inputs, classes):
    """By name: a network, and a function that makes one update of it."""
    cdni = LinearSynthesiser(WIDTH, condition=classes)
    plain = nn.Sequential(*layers(inputs, classes))
    optimizer = adam(plain.parameters())

    def backprop(x, y):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()

    chains = {
        "DNI": DecoupledChain(layers(inputs, classes), MLPSynthesiser(WIDTH), adam),
        "cDNI": DecoupledChain(layers(inputs, classes), cdni, adam),
        "cDNI, one update in 5": DecoupledChain(layers(inputs, classes), cdni, adam, probability=0.2),
        "cDNI, predicted inputs": DecoupledChain(
            layers(inputs, classes),
            cdni,
            adam,
            input_model=[nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU()) for _ in range(3)],
        ),
    }
    updates = {name: functools.partial(chain.update, loss=F.cross_entropy) for name, chain in chains.items()}
    return {"backpropagation": (plain, backprop)} | {name: (chains[name], updates[name]) for name in chains}


@torch.no_grad()
def accuracy(net, x, y):
    net.eval()
    right = float((net(x).argmax(1) == y).float().mean())
    net.train()
    return right


@torch.no_grad()
def settle(net, x):
    """Batch statistics anew: layers that learned on predicted inputs are tested on true ones."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    net(x)
    for norm in norms:
        norm.momentum = 0.1


def train(net, update, training, test, epochs):
    """Test accuracy after every epoch."""
    x, y = training
    curve = []
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(BATCH):
            update(x[part], y[part])
        settle(net, x[:10_000])
        curve.append(accuracy(net, *test))
    return curve


def plot(curves, path):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#000000", "#E69F00", "#0072B2", "#56B4E9", "#009E73"]  # of Okabe and Ito
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for (name, curve), colour in zip(curves.items(), colours):
        axes.semilogy(range(1, len(curve) + 1), [100 * (1 - a) for a in curve], color=colour, linewidth=2, label=name)
    axes.set(xlabel="epoch", ylabel="test error, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz file with arrays x and y, such as MNIST's")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("decoupled_mlp"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    training, test = load(arguments.data)
    epochs = 4 if arguments.smoke else arguments.epochs
    print(f"{len(training[0])} images to learn from, {len(test[0])} to test on")
    print(f"{'':24}  {'test accuracy':>13}  {'CPU seconds':>11}")
    curves, seconds = {}, {}
    for name, (net, update) in methods(training[0].shape[1], int(training[1].max()) + 1).items():
        begin = time.process_time()
        curves[name] = train(net, update, training, test, epochs)
        seconds[name] = time.process_time() - begin
        print(f"{name:24}  {curves[name][-1]:13.4f}  {seconds[name]:11.1f}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    results.write_text(json.dumps({"epochs": epochs, "accuracy": curves, "seconds": seconds}, indent=1) + "\n")
    print(f"written: {results}")
    plot(curves, arguments.out / "decoupled_mlp.png")


if __name__ == "__main__":
    main()
