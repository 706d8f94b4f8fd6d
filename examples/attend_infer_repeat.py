"""How many digits are there, and where? Learned from pictures alone, without a single label.

    python examples/attend_infer_repeat.py            # scikit-learn's digits on 24 x 24 canvases, within a minute
    python examples/attend_infer_repeat.py --seed 3

Scenes hold none, one or two handwritten digits at random places. AIR takes a scene apart object by object: its
iterations are objects, and it stops when everything is explained. Nothing tells it how many digits there are; it learns
that two windows explain two digits better than one does. The digits of the test scenes were never seen in training.

Writes `results.json` and, where matplotlib is installed, `air.png` into the folder given by `--out`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from unrolled import fit
from unrolled.scene import AIR, fraction_located, scenes

CANVAS, GLIMPSE = 24, 10
CLIP = 50.0  # of the gradient's norm
RATE = 1e-3


def digit_scenes(seed, count=20_000, test=2_000):
    """Scenes to learn from and scenes to test on, of different digits."""
    images = torch.as_tensor(load_digits().images / 16, dtype=torch.float32)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, rest = images[order[:1400]], images[order[1400:]]
    generator = torch.Generator().manual_seed(seed)
    return scenes(train, count, CANVAS, generator=generator), scenes(rest, test, CANVAS, generator=generator)


def build(estimator=None):
    """At most three objects are looked for: one more than there are."""
    return AIR(CANVAS, num_iters=3, glimpse=GLIMPSE, estimator=estimator)


def batches(x, size, generator):
    while True:
        yield x[torch.randint(len(x), (size,), generator=generator)]


def train(net, x, num_steps, seed, callbacks=(), progress=False):
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP) and None)
    generator = torch.Generator().manual_seed(seed)
    return fit(
        net,
        batches(x, 64, generator),
        AIR.loss,
        num_steps=num_steps,
        optimizer=optimizer,
        scheduler=scheduler,
        callbacks=callbacks,
        seed=seed,
        progress=progress,
    )


@torch.no_grad()
def measure(net, test):
    found = net.locate(test.x)
    return {
        "count accuracy": float((found.present.sum(-1) == test.number).double().mean()),
        "located within 2 px": fraction_located(found, test.centres),
        "reconstruction MSE": float((net(test.x) - test.x).square().mean()),
        "MSE of an empty canvas": float(test.x.square().mean()),
    }


def plot(net, test, path, columns=8):
    """Scenes with the windows that were found, what was understood of them, and dreams."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Scenes with 0, 1, 2, 2 ... digits, the first of each kind.
    kinds = [0, 1, 1, 1, 2, 2, 2, 2][:columns]
    queues = {kind: iter((test.number == kind).nonzero().flatten().tolist()) for kind in set(kinds)}
    chosen = [next(queues[kind]) for kind in kinds]
    x = test.x[chosen]
    found, understood = net.locate(x), net.reconstruct(x)
    dreams = net.sample(torch.tensor(kinds), torch.Generator().manual_seed(0))
    figure, axes = plt.subplots(3, len(kinds), figsize=(1.3 * len(kinds), 4.2), layout="constrained")
    for i in range(len(kinds)):
        for row, picture in enumerate((x[i, 0], understood[i, 0], dreams[i, 0])):
            axes[row, i].imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, CANVAS, CANVAS, 0))
            axes[row, i].set(xticks=[], yticks=[])
        for t in range(int(found.present[i].sum())):
            left, top, right, bottom = found.boxes[i, t].tolist()
            colour = ("#E69F00", "#56B4E9", "#009E73")[t]  # of Okabe and Ito: told apart by colour-blind readers too
            axes[0, i].add_patch(
                plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=2)
            )
    for row, name in enumerate(("found", "understood", "dreamt")):
        axes[row, 0].set_ylabel(name)
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="updates")
    parser.add_argument("--out", type=Path, default=Path("attend_infer_repeat"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    train_scenes, test = digit_scenes(arguments.seed, *((500, 100) if arguments.smoke else ()))
    torch.manual_seed(arguments.seed)
    net = build()
    before = measure(net, test)
    begin = time.process_time()
    history = train(net, train_scenes.x, 30 if arguments.smoke else arguments.steps, arguments.seed, progress=True)
    seconds = time.process_time() - begin
    after = measure(net, test)
    print(f"\n{len(history)} updates in {seconds:.0f} CPU seconds")
    for name in after:
        print(f"{name:24}  {before[name]:8.4f} -> {after[name]:8.4f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    results.write_text(json.dumps({"before": before, "after": after, "loss": history.loss, "seconds": seconds}))
    print(f"written: {results}")
    plot(net, test, arguments.out / "air.png")


if __name__ == "__main__":
    main()
