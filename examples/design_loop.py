"""Design a network for sparse coding as a lens is designed: simulate, name what falls short, correct, optimise, again.

    python examples/design_loop.py

Starts from 16 iterations of ISTA on 8 x 8 patches of scikit-learn's photographs, and follows its own layer reports.
They say what helps the classical solver, momentum or longer steps. Then every layer gets parameters of its own and is
trained. From there on the reports say which layers are worth less than what there is to spare, until the network is as
short as it can be at the error of 16 iterations of FISTA.

The network learns from one part of a photograph and is judged by another; the figures printed in the end are of the
other photograph. A network of the same length that is trained from scratch, in as many steps, is printed beside it.

Writes `results.json`, the last report as `report.html` and, where matplotlib is installed, `design_loop.png` and
`report.png` into the folder given by `--out`.
"""

import argparse
import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from sklearn.decomposition import MiniBatchDictionaryLearning
from sklearn.feature_extraction.image import extract_patches_2d

from unrolled import LISTA, fit
from unrolled.losses import Lasso
from unrolled.report import AddMomentum, Design, Drop, FISTATheory, ISTATheory, LayerReport, Rules, Scale, Untie

SIZE = 8  # pixels along the side of a patch
ALPHA = 0.5  # weight of the l1 norm; patches have pixels of variance 1, on average


# ---- Patches ---------------------------------------------------------------------------------------------------------


def load_patches(options):
    """Patches to learn from, to judge the design by, and to test on: (count, 64) each."""
    first, second = (image.mean(-1) for image in load_sample_images().images)
    row = 3 * len(first) // 4
    areas = (first[:row], options.num_train), (first[row:], options.num_judge), (second, options.num_test)
    sets = [patches(image, count, seed) for seed, (image, count) in enumerate(areas)]
    scale = sets[0].std()
    return [torch.tensor(y / scale, dtype=torch.float32) for y in sets]


def patches(image, count, seed):
    """Patches without their means, flat ones left out."""
    y = extract_patches_2d(image, (SIZE, SIZE), max_patches=2 * count, random_state=seed).reshape(-1, SIZE * SIZE)
    y = y - y.mean(1, keepdims=True)
    return y[y.std(1) > 0.1 * y.std()][:count]


def learn_dictionary(y, num_atoms):
    """(64, num_atoms), atoms of norm 1 as columns."""
    model = MiniBatchDictionaryLearning(
        num_atoms, alpha=ALPHA, max_iter=1, batch_size=256, fit_algorithm="cd", random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # codes need not be exact while the dictionary is still moving
        atoms = model.fit(y.numpy()).components_
    dictionary = torch.tensor(atoms.T, dtype=torch.float32)
    norms = dictionary.norm(dim=0)
    return dictionary[:, norms > 1e-6] / norms[norms > 1e-6]


def endless(y, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield y[torch.randint(len(y), (batch_size,), generator=generator)]


# ---- The loop --------------------------------------------------------------------------------------------------------


class Bench:
    """Where networks are trained and tested."""

    def __init__(self, dictionary, y, y_test, seed, batch_size=128):
        self.dictionary, self.y_test, self.seed = dictionary, y_test, seed
        self.batches = endless(y, batch_size, seed)
        self.loss = Lasso(dictionary, ALPHA)
        self.steps = 0

    def trainer(self, num_steps):
        def train(net):
            self.steps += num_steps
            return fit(net, self.batches, self.loss, num_steps=num_steps)

        return train

    def gap(self, net, momentum=True):
        """The relative gap to the optimum on the test patches, in dB."""
        theory = (FISTATheory if momentum else ISTATheory)(self.dictionary, ALPHA)
        return LayerReport(net, self.y_test, theory, sensitivity=False, power_iters=0).quality


def run_loop(bench, y_judge, num_layers, options):
    """The design, and the gap that it must not exceed: that of FISTA, as long as the design is at the start."""
    D = bench.dictionary
    fista = LISTA(D, num_layers, alpha=ALPHA, tied=True, momentum=True, factored=True)
    goal = LayerReport(fista, y_judge, FISTATheory(D, ALPHA), sensitivity=False, power_iters=0).quality
    net = LISTA(D, num_layers, alpha=ALPHA, tied=True, factored=True)
    rules = Rules(stalling=0.9)  # 16 layers are few: each shall take a tenth off the distance
    design = Design(net, y_judge, ISTATheory(D, ALPHA), rules=rules, num_probes=8, power_iters=10)

    # The classical solver: take what helps without any training, then give every layer parameters of its own.
    while (suggestion := first(design.report(), AddMomentum, Scale)) and suggestion.effect < -0.5:
        design.apply(suggestion)
    design.apply(first(design.report(), Untie) or Untie(), "to be trained, each layer for its place")
    design.optimise(bench.trainer(options.first_steps))

    # What is better than the goal may be spent. A layer that is worth less than that is redundant; where none is, see
    # whether training makes up for the one that is worth least.
    while len(design.net) > 1:
        spare = max(goal - design.report().quality, 0.0)
        report = design.report(replace(rules, redundant_db=spare))
        suggestion, steps, why = first(report, Drop), options.steps, ""
        if suggestion is None:
            cheapest = int(report.value("removal").argmin())
            suggestion, steps, why = (
                Drop(cheapest),
                options.last_steps,
                "worth least, though more than there is to spare",
            )
        kept = copy.deepcopy(design)
        design.apply(suggestion, why)
        design.optimise(bench.trainer(steps))
        if design.report().quality > goal:
            return kept, goal
    return design, goal


def first(report, *kinds):
    """The best suggestion of some kinds; None where there is none."""
    return next((s for s in report.suggest() if isinstance(s.correction, kinds)), None)


def from_scratch(bench, num_layers):
    """A network of the same length, trained in as many steps as the design took."""
    net = LISTA(bench.dictionary, num_layers, alpha=ALPHA, momentum=True, factored=True)
    other = Bench(bench.dictionary, None, bench.y_test, bench.seed)
    other.batches = bench.batches
    other.trainer(bench.steps)(net)
    return net


def compare(bench, design, num_layers):
    """Test figures by network: layers, and gap in dB."""
    D, short = bench.dictionary, len(design.net)
    ista = LISTA(D, num_layers, alpha=ALPHA, tied=True, factored=True)
    rows = {f"ISTA, {num_layers} iterations": (num_layers, bench.gap(ista, momentum=False))}
    for count in (short, num_layers):
        fista = LISTA(D, count, alpha=ALPHA, tied=True, momentum=True, factored=True)
        rows[f"FISTA, {count} iterations"] = (count, bench.gap(fista))
    rows["the design"] = (short, bench.gap(design.net))
    rows["as long, trained from scratch"] = (short, bench.gap(from_scratch(bench, short)))
    return {name: {"layers": layers, "gap_db": gap} for name, (layers, gap) in rows.items()}


# ---- Output ----------------------------------------------------------------------------------------------------------


def plot(design, goal, folder):
    """The gap against the number of layers, change by change; and the last report."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there are no pictures: pip install matplotlib")
        return
    matplotlib.use("Agg")
    draw_log([entry._asdict() for entry in design.log], goal).savefig(folder / "design_loop.png", dpi=110)
    quantities = ["decrease", "step", "threshold", "zeros", "lipschitz", "removal"]
    design.report().plot(quantities).savefig(folder / "report.png", dpi=100)


def draw_log(log, goal):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    layers, gaps = (np.array([entry[name] for entry in log]) for name in ("layers", "after"))
    trained = np.array([entry["what"] == "optimise" for entry in log])
    axes.plot(layers, gaps, color="#6b6b6b", linewidth=1, zorder=1)
    axes.plot(layers[~trained], gaps[~trained], "x", color="#d55e00", label="corrected")
    axes.plot(layers[trained], gaps[trained], "o", color="#0072b2", label="trained")
    axes.axhline(goal, color="#6b6b6b", linestyle="--", linewidth=1, label="the goal: FISTA, as long as at the start")
    axes.invert_xaxis()
    axes.set_xlabel("layers")
    axes.set_ylabel("relative gap to the optimum, dB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("design_loop"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="of the training batches")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = options_of(arguments.smoke)

    y, y_judge, y_test = load_patches(options)
    dictionary = learn_dictionary(y, options.num_atoms)
    bench = Bench(dictionary, y, y_test, arguments.seed)
    design, goal = run_loop(bench, y_judge, options.layers, options)
    print(design)
    print()
    print(design.report())
    rows = compare(bench, design, options.layers)
    print(f"\nrelative gap to the optimum of the Lasso on test patches, in dB; training took {bench.steps} steps")
    for name, row in rows.items():
        print(f"{name:32}{row['layers']:4}{row['gap_db']:9.2f}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    log = [entry._asdict() for entry in design.log]
    results = {"goal_db": goal, "log": log, "reasons": design.reasons, "rows": rows, "steps": bench.steps}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    design.report().save_html(arguments.out / "report.html")
    plot(design, goal, arguments.out)
    print(f"\nwritten: {arguments.out}")


def options_of(smoke):
    if smoke:
        return argparse.Namespace(
            num_train=1000, num_judge=64, num_test=64, num_atoms=80, layers=5, first_steps=60, steps=25, last_steps=25
        )
    return argparse.Namespace(
        num_train=20_000,
        num_judge=256,
        num_test=1000,
        num_atoms=128,
        layers=16,
        first_steps=300,
        steps=100,
        last_steps=300,
    )


if __name__ == "__main__":
    main()
