"""What a network did, in a few hundred numbers a sample: read it back, compare it, throw half of it away.

    python examples/sketch.py --out sketch

First an unrolled network, LISTA on handwritten digits. The objective, residual, support and change of all 16 layers go
into one vector of 256 numbers a sample, and come out again to rounding; also after half of the vector was erased. With
a quarter left there are more unknowns than numbers, and what is read is a rough estimate.

Then any network: a classifier of digits whose three hidden layers are sketched by hooks. Digits whose sketches are
alike were treated alike by the network. The nearest sketch, out of those of other digits, should be of the same digit.
How long does that last when more and more of the sketches is erased?

Prints both; writes `results.json` and, where matplotlib is installed, `sketch.png` into the folder given by `--out`.
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from unrolled import LISTA
from unrolled.sketch import MatchedFilter, NetworkSketch, TraceSketch, similarity
from unrolled.solvers import lasso_objective

ALPHA, LAYERS, D = 0.1, 16, 256


def digits():
    """Pixels from 0 to 1, and labels."""
    X, labels = load_digits(return_X_y=True)
    return torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(labels)


# ---- The trace of an unrolled network --------------------------------------------------------------------------------


def trace(pixels, seed):
    """Sketch a call of LISTA; returns the true objectives (layers, batch), and what was read of them, by name."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = nn.functional.normalize(pixels[torch.randperm(len(pixels), generator=generator)[:128]].T, dim=0)
    net = LISTA(dictionary, LAYERS, alpha=ALPHA)
    y = pixels[torch.randperm(len(pixels), generator=generator)[:20]]

    true = []
    latest = [torch.zeros(len(y), 128)]

    def objective(x):
        true.append(lasso_objective(dictionary, y, x, ALPHA))
        return true[-1]

    def change(x):
        latest.append(x.clone())
        return (latest[-1] - latest[-2]).norm(dim=-1)

    metrics = {
        "objective": objective,
        "residual": lambda x: (y - x @ dictionary.T).norm(dim=-1),
        "support": lambda x: (x != 0).sum(-1),
        "change": change,
    }
    scales = {"objective": 2.0, "residual": 1.0, "support": 50.0, "change": 1.0}
    with TraceSketch.watch(net, metrics, d=D, seed=seed, scales=scales) as sketch, torch.no_grad():
        net(y)

    def objectives(part, decoder=None):
        return torch.stack([part.recover(t, decoder=decoder)["objective"] for t in range(LAYERS)])

    read = {
        f"all {D} numbers": objectives(sketch),
        f"half of them, {D // 2}": objectives(sketch.truncate(D // 2)),
        f"a quarter, {D // 4}": objectives(sketch.truncate(D // 4)),
        f"all {D}, matched filter": objectives(sketch, MatchedFilter()),
    }
    return torch.stack(true).double(), read, sketch.count("LISTAStep")


# ---- A classifier ----------------------------------------------------------------------------------------------------


def classifier(pixels, labels, seed, num_steps):
    torch.manual_seed(seed)
    layers = [
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(num_steps):
        chosen = torch.randint(len(pixels), (64,))
        loss = nn.functional.cross_entropy(net(pixels[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def nearest(alike, labels):
    """How often the most similar other sample has the same label."""
    alike = alike.clone().fill_diagonal_(-torch.inf)
    return (labels[alike.argmax(1)] == labels).double().mean().item()


def alike(vectors):
    """All cosines, without what all have in common."""
    return similarity(vectors[:, None], vectors, baseline=vectors.mean(0))


def plot(true, read, matrix, accuracy, pixels, path):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    left.plot(range(1, LAYERS + 1), true[:, 0], color="#6b6b6b", lw=5, alpha=0.4, label="true")
    for (name, values), style in zip(read.items(), ("-", "--", ":", ":")):
        left.plot(range(1, LAYERS + 1), values[:, 0], style, label=name)
    left.set_xlabel("layer")
    left.set_title("Objective of one digit, read from its sketch", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=7, ncols=2, loc="lower center")
    left.set_ylim(-12, 11)
    middle.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    middle.set_title("Similarity of sketches, digits 0 to 9 in order", loc="left", fontsize=10)
    middle.set_axis_off()
    right.semilogx(list(accuracy), list(accuracy.values()), "o-", label="sketches")
    right.axhline(pixels, color="#6b6b6b", ls=":", label="64 pixels")
    right.set_xlabel("numbers kept")
    right.set_title("Nearest neighbour is the same digit", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=64)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sketch"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    num_steps, count = (150, 200) if arguments.smoke else (600, 497)

    pixels, labels = digits()
    true, read, ran = trace(pixels, arguments.seed)
    errors = {name: (values - true).abs().max().item() for name, values in read.items()}
    print(f"{LAYERS} layers x 4 attributes; the largest error of an objective, which is {true.mean():.2f} on average")
    for name, error in errors.items():
        print(f"  {name:28}{error:10.2e}")
    print(f"  layers counted: {ran.mean():.6f}")

    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(arguments.seed))
    training, test = order[count:], order[:count]
    test = test[labels[test].argsort()]
    net = classifier(pixels[training], labels[training], arguments.seed, num_steps)
    with NetworkSketch(net, ["1", "3", "5"], d=2048, seed=arguments.seed) as sketch, torch.no_grad():
        right = (net(pixels[test]).argmax(1) == labels[test]).double().mean().item()
        hidden = net[:6](pixels[test])
    recovered = (sketch.recover("5") - hidden).abs().max().item()
    matrix = alike(sketch.vector)
    kept = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    accuracy = {k: nearest(alike(sketch.truncate(k).vector), labels[test]) for k in kept}
    baseline = nearest(alike(pixels[test]), labels[test])
    print(f"\n{count} test digits, of which the classifier gets {right:.1%} right")
    print(f"  its last hidden layer, read back from the sketch: largest error {recovered:.1e}")
    print(f"  nearest neighbour of the same digit, by pixels: {baseline:.1%}; by sketches of")
    for k, share in accuracy.items():
        print(f"  {k:8} numbers {share:8.1%}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {
        "objective": errors,
        "recovered": recovered,
        "classifier": right,
        "nearest": accuracy,
        "pixels": baseline,
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {arguments.out / 'results.json'}")
    plot(true, read, matrix, accuracy, baseline, arguments.out / "sketch.png")


if __name__ == "__main__":
    main()
