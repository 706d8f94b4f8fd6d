"""A CRF on top of a segmentation network, trained with it: sharper borders, end to end.

    python examples/segmentation.py                                    # coloured shapes made here
    python examples/segmentation.py --data camvid.npz --void 11        # labelled photographs

A small fully convolutional network, which sees an eighth of the resolution, learns to label pixels. Its labels have
blurred borders. A dense CRF draws the labels of pixels that are near and alike together, in three ways:

- none: the network alone;
- after: the CRF comes after the trained network; its four settings are those that did best on validation images;
- joint: network and CRF are trained on, end to end, through five mean-field iterations.

Joint training takes additional steps. The network alone gets as many, so that all three have had the same training.

`--data` takes an .npz archive with images `train_x`, `val_x`, `test_x` (N, height, width, 3), uint8, and their labels
`train_y`, `val_y`, `test_y` (N, height, width); `names` of the classes are optional. `--void` is the label of pixels
that are left out.

Writes `results.json` and, where matplotlib is installed, `segmentation.png` into the folder given by `--out`.
"""

import argparse
import copy
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from unrolled import fit
from unrolled.crf import Bilateral, Compatibility, CRFasRNN, Spatial

TRAIN_ITERS, TEST_ITERS = 5, 10  # mean-field iterations, as the authors of CRF-RNN have them
IGNORED = -100  # what cross_entropy leaves out
BATCH = 4


class Split(NamedTuple):
    images: torch.Tensor  # (N, 3, H, W), float, 0..255
    labels: torch.Tensor  # (N, H, W), IGNORED where void


class Data(NamedTuple):
    train: Split
    val: Split
    test: Split
    names: list[str]

    @property
    def num_classes(self):
        return len(self.names)


@dataclass(frozen=True)
class Schedule:
    """How to train: steps of the network, and additional ones with or without the CRF; width and rates of learning."""

    steps: int
    more_steps: int
    width: int = 16
    rate: float = 4e-3
    more_rate: float = 1e-3
    crf_rate: float = 5e-2
    theta_beta: float = 20.0  # in levels of 0..255, somewhat above the noise of the images
    balance: float = 0.5  # rare classes count for more in the loss, by this power of how rare they are
    brightness: float = 0.0  # training images are made darker or lighter by up to this factor

    @classmethod
    def for_photographs(cls):
        return cls(steps=900, more_steps=100, theta_beta=10.0, balance=0.0, brightness=0.4)


# ---- Images ----------------------------------------------------------------------------------------------------------


def shapes(height=96, width=128, count=(48, 12, 12)):
    """Discs, boxes and diamonds on a background, each in the colour of its class, more or less, under noise."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*size):
        return torch.rand(*size, generator=generator)

    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    colours = torch.tensor([[110, 120, 110], [200, 80, 70], [70, 100, 200], [210, 180, 60]]).float()

    def split(num_images):
        labels = torch.zeros(num_images, height, width, dtype=torch.long)
        images = torch.zeros(num_images, 3, height, width)
        for label, image in zip(labels, images):
            image[:] = (colours[0] + 30 * uniform(3))[:, None, None] + 40 * (y / height)
            for kind in torch.randint(1, 4, (6,), generator=generator).tolist():
                dy, dx = (y - height * uniform(1)).abs(), (x - width * uniform(1)).abs()
                radius = (0.08 + 0.12 * uniform(1)) * height
                distance = (dy.square() + dx.square()).sqrt(), torch.maximum(dy, 0.6 * dx), dy + dx
                inside = distance[kind - 1] < radius
                label[inside] = kind
                image[:, inside] = (colours[kind] + 50 * uniform(3) - 25)[:, None]
        noise = 14 * torch.randn(images.shape, generator=generator)
        return Split((images + noise).clamp(0, 255).round(), labels)

    return Data(*map(split, count), ["background", "disc", "box", "diamond"])


def load(path, void=None):
    """The three splits of an archive."""
    if not path.is_file():
        raise SystemExit(f"--data: {path} does not exist; an .npz archive with train_x, train_y, val_x, ... is needed.")
    with np.load(path) as arrays:
        wanted = [f"{part}_{kind}" for part in ("train", "val", "test") for kind in "xy"]
        missing = [key for key in wanted if key not in arrays]
        if missing:
            raise SystemExit(f"--data: {path} lacks {', '.join(missing)}; it has {', '.join(arrays)}.")
        given = {key: arrays[key] for key in wanted}
        names = [str(name) for name in arrays["names"]] if "names" in arrays else None
    splits = []
    for part in ("train", "val", "test"):
        x, y = given[f"{part}_x"], given[f"{part}_y"]
        if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != np.uint8 or y.shape != x.shape[:3]:
            raise SystemExit(
                f"--data: {part}_x must be (N, height, width, 3) in uint8 and {part}_y (N, height, width), got "
                f"{x.shape} in {x.dtype} and {y.shape}."
            )
        labels = torch.tensor(y).long()
        if void is not None:
            labels[labels == void] = IGNORED
        splits.append(Split(torch.tensor(x).permute(0, 3, 1, 2).float(), labels))
    num_classes = 1 + max(int(split.labels.max()) for split in splits)
    return Data(*splits, names[:num_classes] if names else [f"class {i}" for i in range(num_classes)])


# ---- Networks --------------------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """A fully convolutional network at an eighth of the resolution, with a CRF on top of it or without."""

    def __init__(self, num_classes, width=16, crf=None):
        super().__init__()
        self.net = nn.Sequential(
            self.block(3, width, stride=2),
            self.block(width, 2 * width, stride=2),
            self.block(2 * width, 4 * width, stride=2),
            self.block(4 * width, 4 * width, dilation=2),
            self.block(4 * width, 4 * width, dilation=4),
            nn.Conv2d(4 * width, num_classes, 1),
        )
        self.crf = crf

    @staticmethod
    def block(inputs, outputs, stride=1, dilation=1):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, images, num_iters=TRAIN_ITERS):
        coarse = self.net((images - 110) / 70)
        logits = interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return logits if self.crf is None else self.crf(logits, images, num_iters=num_iters)

    def with_crf(self, crf):
        """A copy of the network, under this CRF."""
        model = copy.deepcopy(self)
        model.crf = crf
        return model


@dataclass(frozen=True)
class Setting:
    """What one chooses of a CRF that is not trained; bandwidths in pixels and in levels of 0..255."""

    theta_alpha: float
    theta_beta: float
    bilateral: float
    spatial: float
    theta_gamma: float = 2.0

    def build(self, num_classes):
        kernels = (
            Bilateral(theta_alpha=self.theta_alpha, theta_beta=self.theta_beta, weight=self.bilateral),
            Spatial(theta_gamma=self.theta_gamma, weight=self.spatial),
        )
        return CRFasRNN(num_classes, kernels, TRAIN_ITERS, compatibility=Compatibility.LEARNED)


def settings(theta_beta):
    """Those to choose from."""
    weights = (0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (2.0, 1.0), (5.0, 3.0)
    alphas = 10.0, 20.0, 40.0
    return [Setting(theta_alpha, theta_beta, *pair) for theta_alpha, pair in itertools.product(alphas, weights)]


# ---- Training and scores ---------------------------------------------------------------------------------------------


def batches(split, generator, brightness=0.0):
    """Endless batches in random order; every other image, on average, is seen in a mirror."""
    while True:
        for rows in torch.randperm(len(split.images), generator=generator).split(BATCH):
            images, labels = split.images[rows], split.labels[rows]
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            if brightness > 0:
                gain = 1 + brightness * (2 * torch.rand(len(rows), 1, 1, 1, generator=generator) - 1)
                images = (gain * images).clamp(max=255)
            yield images, torch.where(mirrored[:, None, None], labels.flip(-1), labels)


def class_weights(labels, num_classes, balance):
    """Weights whose mean over the pixels is 1; all are 1 where `balance` is 0."""
    counts = torch.bincount(labels[labels != IGNORED], minlength=num_classes).float()
    weights = (counts.mean() / counts.clamp(min=1)) ** balance
    return weights * counts.sum() / (weights * counts).sum()


def train(model, data, schedule, num_steps, rate, seed, progress=True):
    """Adam on the cross entropy, in place; the rate falls to zero along a half cosine."""
    weights = class_weights(data.train.labels, data.num_classes, schedule.balance)

    def loss(model, batch):
        images, labels = batch
        return cross_entropy(model(images), labels, weights, ignore_index=IGNORED)

    groups = [{"params": model.net.parameters(), "lr": rate}]
    if model.crf is not None:
        groups.append({"params": model.crf.parameters(), "lr": schedule.crf_rate})
    optimizer = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    drawn = batches(data.train, torch.Generator().manual_seed(seed), schedule.brightness)
    fit(model, drawn, loss, num_steps=num_steps, optimizer=optimizer, scheduler=scheduler, progress=progress)
    return model


@torch.no_grad()
def predict(model, images, num_iters=TEST_ITERS):
    """The most probable class of every pixel."""
    model.eval()
    return torch.cat([model(some, num_iters).argmax(1) for some in images.split(BATCH)])


def scores(found, labels, num_classes):
    """Intersection over union of each class over all pixels, their mean, and the share of pixels that are right."""
    known = labels != IGNORED
    pairs = num_classes * labels[known] + found[known]
    confusion = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).double()
    hits = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - hits
    iou = hits / union.clamp(min=1)
    return {
        "mean_iou": iou[union > 0].mean().item(),
        "accuracy": (hits.sum() / confusion.sum()).item(),
        "iou": iou.tolist(),
    }


@torch.no_grad()
def choose(model, val, num_classes, theta_beta):
    """The setting of a CRF after this network that has the best mean IoU on validation images."""
    model.eval()
    parts = [(model(some), some) for some in val.images.split(BATCH)]

    def mean_iou(setting):
        crf = setting.build(num_classes)
        found = torch.cat([crf(*part, num_iters=TEST_ITERS).argmax(1) for part in parts])
        return scores(found, val.labels, num_classes)["mean_iou"]

    return max(settings(theta_beta), key=mean_iou)


class Comparison(NamedTuple):
    models: dict  # by name
    settings: dict  # of the CRFs after networks
    seconds: dict  # CPU time of each part


def compare(data, schedule, seed=0, progress=True):
    """Train the network, then compare what a CRF does after it and in it."""
    seconds = {}

    def timed(name, function, *arguments, **options):
        begin = time.process_time()
        result = function(*arguments, **options)
        seconds[name] = time.process_time() - begin
        return result

    torch.manual_seed(seed)
    few = Split(data.val.images[::2], data.val.labels[::2])  # enough to choose a setting by
    start = Segmenter(data.num_classes, schedule.width)
    timed("training", train, start, data, schedule, schedule.steps, schedule.rate, seed, progress)
    setting = timed("choosing", choose, start, few, data.num_classes, schedule.theta_beta)

    more = data, schedule, schedule.more_steps, schedule.more_rate, seed + 1000, progress
    longer, joint = copy.deepcopy(start), start.with_crf(setting.build(data.num_classes))
    timed("more steps", train, longer, *more)
    timed("joint training", train, joint, *more)
    after = timed("choosing again", choose, longer, few, data.num_classes, schedule.theta_beta)
    models = {
        "network": start,
        "network, more steps": longer,
        "CRF after network": start.with_crf(setting.build(data.num_classes)),
        "CRF after network, more steps": longer.with_crf(after.build(data.num_classes)),
        "joint": joint,
    }
    return Comparison(models, {"CRF after network": setting, "CRF after network, more steps": after}, seconds)


# ---- Reports ---------------------------------------------------------------------------------------------------------

SHOWN = {"network, more steps": "network", "CRF after network, more steps": "CRF after", "joint": "CRF, joint"}
COLOURS = [
    "#87b5e0",
    "#a65e4e",
    "#f5e663",
    "#7d6f8f",
    "#e69fb4",
    "#3f8f4f",
    "#e8862e",
    "#b8a07a",
    "#2b3f9e",
    "#d62728",
    "#17becf",
    "#8c564b",
    "#bcbd22",
    "#e377c2",
]


def report(rows):
    print(f"\n{'test images':30}  {'mean IoU':>8}  {'accuracy':>8}")
    for name, row in rows.items():
        print(f"{name:30}  {100 * row['mean_iou']:8.2f}  {100 * row['accuracy']:8.2f}")


def plot(data, found, rows, path, count=4):
    """Evenly spaced test images, the truth, and what each model makes of them."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    palette = np.array([to_rgb(COLOURS[i % len(COLOURS)]) for i in range(data.num_classes)] + [(0, 0, 0)])
    chosen = torch.linspace(0, len(data.test.images) - 1, count + 2).long().tolist()[1:-1]
    height, width = data.test.images.shape[-2:]
    columns = 2 + len(SHOWN)
    size = (2.5 * columns, 2.5 * count * height / width + 0.9)
    figure, axes = plt.subplots(count, columns, figsize=size, layout="constrained")
    for row, index in zip(axes, chosen):
        truth = data.test.labels[index]
        row[0].imshow(data.test.images[index].permute(1, 2, 0).byte())
        row[1].imshow(palette[torch.where(truth == IGNORED, data.num_classes, truth)])
        for axis, name in zip(row[2:], SHOWN):
            axis.imshow(palette[found[name][index]])
    titles = [f"{title}: mean IoU {100 * rows[name]['mean_iou']:.1f}" for name, title in SHOWN.items()]
    for axis, title in zip(axes[0], ["image", "truth", *titles]):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    patches = [Patch(color=colour, label=name) for colour, name in zip(palette, [*data.names, "void"])]
    if not any(bool((split.labels == IGNORED).any()) for split in data[:3]):
        patches.pop()
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 12), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz archive of images and labels, see above")
    parser.add_argument("--void", type=int, help="label of pixels that are left out")
    parser.add_argument("--out", type=Path, default=Path("segmentation"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.smoke:
        data = load(arguments.data, arguments.void) if arguments.data else shapes(48, 64, (24, 6, 8))
        schedule = Schedule(steps=150, more_steps=30, width=8)
    elif arguments.data:
        data, schedule = load(arguments.data, arguments.void), Schedule.for_photographs()
    else:
        data, schedule = shapes(), Schedule(steps=300, more_steps=60, width=8)
    height, width = data.train.images.shape[-2:]
    print(f"{len(data.train.images)} training images of {height} x {width}, {data.num_classes} classes")

    comparison = compare(data, schedule, arguments.seed)
    found = {name: predict(model, data.test.images) for name, model in comparison.models.items()}
    rows = {name: scores(labels, data.test.labels, data.num_classes) for name, labels in found.items()}
    chosen = {name: vars(setting) for name, setting in comparison.settings.items()}
    print("\nCRF after the network: ", chosen["CRF after network"])
    report(rows)

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    content = {"classes": data.names, "settings": chosen, "rows": rows}
    results.write_text(json.dumps(content | {"seconds": comparison.seconds}, indent=1) + "\n")
    print(f"\nwritten: {results}")
    plot(data, found, rows, arguments.out / "segmentation.png")


if __name__ == "__main__":
    main()
