"""A classifier that is a dozen examples: a boundary tree of handwritten digits, in features that were learned for it.

    python examples/boundary_tree.py                     # scikit-learn's digits, nothing to download; a minute
    python examples/boundary_tree.py --data digits.npz   # your own: arrays x (n, height, width) and y
    python examples/boundary_tree.py --smoke             # seconds

A boundary tree keeps the examples that it would otherwise get wrong; a new image walks from the root to ever nearer
examples, and the last one gives its class. On pixels that takes hundreds of examples. Then a small network learns
features through the tree, in which a dozen examples do. Two half-moons show the same in a plane.

Writes `results.json` and, where matplotlib is installed, `boundary_tree.png`, `boundary_tree_walks.png` and
`boundary_tree_moons.png` into the folder given by `--out`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits, make_moons
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from unrolled.neighbours import BoundaryTree, DifferentiableBoundaryTree
from unrolled.recipes.neighbours import train_boundary_tree


def load(path):
    """Images (n, height, width) with values from 0 to 1, and labels from 0."""
    if path is None:
        data = load_digits()
        return torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)
    if not path.exists():
        raise SystemExit(f"--data: {path} does not exist")
    with np.load(path) as arrays:
        if not {"x", "y"} <= {*arrays.files} or arrays["x"].ndim != 3:
            raise SystemExit(f"--data: arrays x (n, height, width) and y are needed, {path} has {arrays.files}")
        x, y = arrays["x"].astype(np.float32), arrays["y"]
    return torch.from_numpy(x / np.abs(x).max()), torch.from_numpy(np.unique(y, return_inverse=True)[1])


def encoder(inputs, width, outputs, dropout=0.0):
    nn = torch.nn
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(width, outputs),
    )


def noisy(x, generator):
    return x + 0.15 * torch.randn(x.shape, generator=generator)


def error(found, labels):
    return 100 * float((torch.as_tensor(found) != labels).double().mean())


def learn(x, y, *, num_rebuilds, seed):
    """A tree of images."""
    torch.manual_seed(seed)
    net = DifferentiableBoundaryTree(encoder(x[0].numel(), 128, 20, dropout=0.2), int(y.max()) + 1)
    options = {"tree_samples": min(500, len(x) // 2), "steps_per_tree": 12, "augment": noisy, "seed": seed}
    train_boundary_tree(net, x, y, num_rebuilds=num_rebuilds, progress=True, **options)
    return net.eval()


def learn_moons(num_rebuilds):
    X, sides = make_moons(2000, noise=0.1, random_state=0)
    x, y = torch.tensor(X, dtype=torch.float32), torch.tensor(sides)
    torch.manual_seed(0)
    net = DifferentiableBoundaryTree(encoder(2, 100, 2), 2)
    train_boundary_tree(net, x[:1000], y[:1000], num_rebuilds=num_rebuilds, steps_per_tree=8, lr=3e-3, progress=True)
    return net.eval(), x, y


def draw(net, x, y, moons, out):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there are no pictures: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from unrolled.plot.trees import decision_boundary, tree_of_examples, walk_over_examples

    told = net.explain(x)
    longest = sorted(range(len(x)), key=lambda i: -len(told[i].nodes))
    # One that is right and has a long walk, one that is wrong, and one that the tree is least sure of.
    predicted = net.predict(x)
    right = next((i for i in longest if predicted[i] == y[i]), 0)
    wrong = next((i for i in longest if predicted[i] != y[i]), 1)
    unsure = min((i for i in range(len(x)) if i not in (right, wrong)), key=lambda i: max(told[i].classes))

    ax = tree_of_examples(net.parents, pictures=net.points, labels=net.labels, path=told[right].nodes)
    ax.set_title(
        f"all {net.num_nodes} examples that classify,\nand the walk of one test image", fontsize=10, loc="left"
    )
    save(ax.figure, out / "boundary_tree.png")

    figure, panels = plt.subplots(3, 1, figsize=(7.5, 6), layout="constrained")
    for ax, i, kind in zip(panels, (right, wrong, unsure), ("right", "wrong", "least sure")):
        one = told[i]
        titles = [
            f"{label}" if k == 0 else f"{label}  ({p:.2f})"
            for k, (label, p) in enumerate(zip(one.labels, one.probabilities))
        ]
        walk_over_examples(x[i], net.points[one.nodes], titles=titles, question=f"a {int(y[i])}", ax=ax)
        share = max(one.classes)
        ax.set_title(f"{kind}: called a {int(predicted[i])}, p = {share:.2f}", fontsize=10, loc="left")
    widest = max(ax.get_xlim() for ax in panels)
    for ax in panels:
        ax.set_xlim(widest)
        ax.set_anchor("W")
    save(figure, out / "boundary_tree_walks.png")

    flat, points, sides = moons
    raw = BoundaryTree().train(points[:1000], sides[:1000])
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for ax, tree, count in ((panels[0], raw, len(raw)), (panels[1], flat, flat.num_nodes)):

        def predict(places, tree=tree):
            return tree.predict(torch.tensor(places, dtype=torch.float32)).numpy()

        decision_boundary(predict, points[1000:1400], sides[1000:1400], nodes=tree.points, parents=tree.parents, ax=ax)
        name = "in the plane" if tree is raw else "in learned features"
        wrong_share = error(tree.predict(points[1000:]), sides[1000:])
        ax.set_title(f"tree {name}: {count} examples, {wrong_share:.1f} % error", fontsize=10, loc="left")
    save(figure, out / "boundary_tree_moons.png")


def save(figure, path):
    figure.savefig(path, dpi=100)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz file with arrays x (n, height, width) and y")
    parser.add_argument("--out", type=Path, default=Path("boundary_tree"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the training")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    x, y = load(arguments.data)
    rows = train_test_split(np.arange(len(x)), test_size=0.28, stratify=y, random_state=arguments.seed)
    (x_train, x_test), (y_train, y_test) = ([values[part] for part in rows] for values in (x, y))
    pixels, pixels_test = x_train.flatten(1), x_test.flatten(1)

    raw = BoundaryTree().train(pixels, y_train)
    nearest = KNeighborsClassifier(1).fit(pixels, y_train)
    net = learn(x_train, y_train, num_rebuilds=40 if arguments.smoke else 400, seed=arguments.seed)
    moons = learn_moons(10 if arguments.smoke else 100)
    results = {
        "tree on pixels": {"examples": len(raw), "error": error(raw.predict(pixels_test), y_test)},
        "nearest neighbour": {"examples": len(pixels), "error": error(nearest.predict(pixels_test), y_test)},
        "tree on learned features": {"examples": net.num_nodes, "error": error(net.predict(x_test), y_test)},
    }
    print(f"\n{len(x_train)} images to learn from, {len(x_test)} to test\n")
    print(f"{'':26}  {'examples':>8}  {'error %':>8}")
    for name, row in results.items():
        print(f"{name:26}  {row['examples']:8d}  {row['error']:8.2f}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    results["moons"] = {
        "examples": moons[0].num_nodes,
        "error": error(moons[0].predict(moons[1][1000:]), moons[2][1000:]),
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {arguments.out / 'results.json'}")
    draw(net, x_test, y_test, moons, arguments.out)


if __name__ == "__main__":
    main()
