"""Abnormal events in video: what the sparse codes of normal walking cannot explain cheaply.

    python examples/abnormal_events.py --data ped2.npz   # UCSD Ped2, see docs/abnormal-events.md for the format
    python examples/abnormal_events.py --smoke           # a synthetic clip: dots that walk, and one that runs

Dictionaries of patches (speed, temporal difference, foreground, contours, at two scales) are learned on normal clips,
and an SC2Net for each learns to code them. A patch of a test clip scores by its sparse reconstruction cost
0.5 ||y - D x||^2 + alpha ||x||_1, the frame by its worst patch. No label is used but to draw the ROC curve.

Writes `results.json` and, where matplotlib is installed, `abnormal_events.png` and `abnormal_frames.png` into `--out`.
"""

import argparse
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from sklearn.decomposition import MiniBatchDictionaryLearning
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn import functional as F
from tqdm import tqdm

from unrolled import SC2Net, fit
from unrolled.losses import Lasso
from unrolled.solvers import lasso_objective
from unrolled.training import default_optimizer

STRIDE = 4  # pixels between the centres of neighbouring patches
LAYERS = 10
SMOOTHING = 4.5  # standard deviation of the Gaussian over a clip's frame scores, in frames; the same for all methods
HORIZON = -15  # row at which the straight line of speed against row would be 0, see the docs for how it was chosen
MOVED = 12  # grey levels (of 255) from the background that make a pixel foreground


# ---- Data ------------------------------------------------------------------------------------------------------------


@dataclass
class Video:
    train: list  # of normal clips (frames, height, width) uint8
    test: list
    labels: list  # of bool (frames,), one for each test clip
    masks: list  # of bool (frames, height, width)


def load(path):
    """The clips of `ped2.npz`: frames as differences in time modulo 256, which a running sum undoes."""
    path = path / "ped2.npz" if path.is_dir() else path
    if not path.exists():
        raise SystemExit(f"--data: {path} does not exist; give ped2.npz or the folder that holds it, or take --smoke")
    needed = ("train_delta", "test_delta", "train_start", "test_start", "test_label", "test_mask")
    with np.load(path) as z:
        missing = [key for key in needed if key not in z.files]
        if missing:
            raise SystemExit(f"--data: {path} has no array {', '.join(missing)}")
        train, test = (np.cumsum(z[f"{part}_delta"], axis=0, dtype=np.uint8) for part in ("train", "test"))
        start = z["test_start"][1:-1]
        return Video(
            np.split(train, z["train_start"][1:-1]),
            np.split(test, start),
            np.split(z["test_label"], start),
            np.split(z["test_mask"], start),
        )


def synthetic(seed=0, clips=4, frames=60):
    """Dark upright boxes that walk over a pale ground; in the second half of a test clip one is four times as fast."""
    rng = np.random.default_rng(seed)
    ground = 170 + 8 * ndimage.gaussian_filter(rng.standard_normal((80, 120)), 2)

    def clip(abnormal):
        x = np.tile(ground, (frames, 1, 1))
        mask = np.zeros(x.shape, bool)
        for walker in range(6 + abnormal):
            fast = walker == 6
            row, column = rng.uniform(35, 60), 0.0 if fast else rng.uniform(0, 120)
            speed = 1.4 if fast else rng.uniform(0.25, 0.4) * rng.choice((-1, 1))
            texture = 60 + 20 * rng.standard_normal((11, 5))
            for t in range(frames // 2 if fast else 0, frames):
                place = (column + speed * (t - fast * frames // 2)) % 112
                moved = ndimage.shift(np.pad(texture, ((0, 0), (0, 2))), (0, place % 1), order=1, mode="nearest")
                here = np.s_[t, int(row) : int(row) + 11, int(place) : int(place) + 7]
                x[here] = np.where(moved > 15, moved, x[here])
                mask[here] |= fast
        noisy = np.clip(x + rng.standard_normal(x.shape), 0, 255).astype(np.uint8)
        return noisy, mask

    train = [clip(False)[0] for _ in range(clips)]
    test, masks = zip(*(clip(True) for _ in range(2)), strict=True)
    return Video(train, list(test), [mask.any((1, 2)) for mask in masks], list(masks))


# ---- Features --------------------------------------------------------------------------------------------------------


def background(clips):
    """The median of every tenth frame: the camera does not move."""
    return np.median(np.concatenate([clip[::10] for clip in clips]), axis=0).astype(np.float32)


def blur(x, space, time=0.0):
    return ndimage.gaussian_filter(x, (time, space, space), truncate=2.5)


def lucas_kanade(clip, foreground, regularity=10.0):
    """Optical flow (u, v) in pixels a frame: least squares over a Gaussian window of 2.5 pixels and 3 frames.

    Only foreground pixels count, since the still edges behind would pull the flow to 0. The window is about as large
    as a pedestrian and lasts about a step, so that swinging legs average out.
    """
    x = blur(clip, 0.8)
    dt = np.gradient(x, axis=0) * foreground
    dy = np.gradient(x, axis=1) * foreground
    dx = np.gradient(x, axis=2) * foreground
    xx, xy, yy, xt, yt = (blur(a * b, 2.5, 3.0) for a, b in ((dx, dx), (dx, dy), (dy, dy), (dx, dt), (dy, dt)))
    xx, yy = xx + regularity, yy + regularity
    determinant = xx * yy - xy**2
    return (xy * yt - yy * xt) / determinant, (xy * xt - xx * yt) / determinant


def channels(clip, ground, every=1):
    """What patches are cut from, (frames, height, width) each; motion is divided by the perspective of its row."""
    clip = clip.astype(np.float32)
    difference = blur(clip - ground, 0.8)
    foreground = (np.abs(difference) > MOVED).astype(np.float32)
    u, v = lucas_kanade(clip, foreground)
    perspective = ((np.arange(clip.shape[1]) - HORIZON) / 60)[:, None]
    found = {
        "speed": np.hypot(u, v) / perspective,
        "change": np.abs(blur(np.gradient(clip, axis=0), 0.8)) / perspective,
        "foreground": foreground,
        "vertical edges": np.abs(np.gradient(difference, axis=2)) * foreground,
        "horizontal edges": np.abs(np.gradient(difference, axis=1)) * foreground,
    }
    return {name: torch.from_numpy(x[::every].astype(np.float32)) for name, x in found.items()}


@dataclass(frozen=True)
class View:
    """Patches of `size` x `size` cells, each the mean of `pool` x `pool` pixels, of some channels."""

    name: str
    channels: tuple
    pool: int
    size: int
    weight: float = 1.0

    def patches(self, features):  # -> (frames, rows, columns, channels * size * size)
        x = torch.stack([F.avg_pool2d(features[name][:, None], self.pool)[:, 0] for name in self.channels], 1)
        step = STRIDE // self.pool
        rows = (x.shape[2] - 1) // step + 1
        y = F.unfold(F.pad(x, [self.size // 2] * 4), self.size, stride=step)
        return y.mT.reshape(len(x), rows, -1, y.shape[1])


VIEWS = (
    View("speed, 10 px", ("speed",), 2, 5),
    View("change, 10 px", ("change",), 2, 5),
    View("foreground, 20 px", ("foreground",), 4, 5, weight=0.7),
    View("edges, 20 px", ("vertical edges", "horizontal edges"), 4, 5, weight=0.7),
)


class Patches:
    """Scaled patches of one view: all channels count alike, the mean square norm is 1; the still ones apart."""

    alpha = 0.1  # in units of the root mean square norm of a patch, which is 1

    def __init__(self, view, features):
        self.view = view
        y = torch.cat([view.patches(clip)[::4].flatten(0, 2) for clip in features])
        each = view.size**2
        mean_square = torch.stack([part.square().mean() for part in y.split(each, 1)])
        scale = mean_square.clamp_min(1e-12).rsqrt().repeat_interleave(each)
        energy = (y * scale).square().sum(1)
        moving = energy > 0.02 * y.shape[1]
        # The rates that networks are trained at suit signals of norm 1: with larger ones SC2Net's gates explode.
        norm = energy[moving].mean().sqrt()
        self.scale = scale / norm
        self.training = y[moving] * self.scale
        self.still = 0.02 * y.shape[1] / norm.item() ** 2

    def costs(self, features, cost):
        """Maps (frames, rows, columns) of cost(y); ||y||^2 / 2, that of the code 0, where next to nothing is."""
        y = self.view.patches(features) * self.scale
        flat = y.flatten(0, 2)
        total = flat.square().sum(1) / 2
        active = 2 * total > self.still
        if active.any():
            total[active] = cost(flat[active])
        return total.reshape(y.shape[:3]).numpy()


# ---- Methods ---------------------------------------------------------------------------------------------------------


def learn_dictionary(patches, num_atoms, seed):
    """(m, num_atoms), atoms of norm 1 as columns, by scikit-learn."""
    rng = np.random.default_rng(seed)
    y = patches.training.numpy()
    y = y[rng.permutation(len(y))[:6000]]
    start = y[rng.choice(len(y), num_atoms)]
    model = MiniBatchDictionaryLearning(
        num_atoms,
        alpha=patches.alpha,
        max_iter=2,
        batch_size=256,
        fit_algorithm="cd",
        dict_init=start / np.linalg.norm(start, axis=1, keepdims=True),
        max_no_improvement=None,
        tol=0.0,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        atoms = model.fit(y).components_
    # An atom that nothing used may have vanished; networks want none of norm 0.
    dead = np.linalg.norm(atoms, axis=1) < 1e-6
    atoms[dead] = start[dead]
    return torch.tensor((atoms / np.linalg.norm(atoms, axis=1, keepdims=True)).T, dtype=torch.float32).contiguous()


def train(net, dictionary, patches, num_steps, seed):
    """An encoder that has learned to minimise the objective, from patches of normal clips alone.

    They are multiplied by random factors from 1/2 to 4. Trained on the patches as they are, a network meets what is
    faster than all of them for the first time in the test, where its codes can be arbitrarily bad.
    """
    generator = torch.Generator().manual_seed(seed)
    y = patches.training

    def batches():
        while True:
            factor = 2 ** (3 * torch.rand(256, 1, generator=generator) - 1)
            yield factor * y[torch.randint(len(y), (256,), generator=generator)]

    optimizer = default_optimizer(net, lr=2e-3)
    fit(
        net,
        batches(),
        Lasso(dictionary, patches.alpha, supervision=1.0),
        num_steps=num_steps,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps),
    )
    return net


def reconstruction_cost(encode, dictionary, alpha):
    @torch.no_grad()
    def cost(y):
        return torch.cat([lasso_objective(dictionary, part, encode(part), alpha) for part in y.split(8192)])

    return cost


def smooth(maps):
    return [ndimage.gaussian_filter(m, (0, 0.5, 0.5)) for m in maps]


def calibrated(maps, held_out, weight):
    """In units of the 0.9 quantile of the highest cost in a frame, over normal clips that nothing was learned from."""
    peaks = np.concatenate([m.max((1, 2)) for m in smooth(held_out)])
    return [weight * m / np.quantile(peaks, 0.9) for m in maps]


def fuse(views):
    """The highest of the views' costs, patch by patch."""
    return smooth([np.maximum.reduce(maps) for maps in zip(*views, strict=True)])


# ---- Scores ----------------------------------------------------------------------------------------------------------


def frame_scores(maps, every=1):
    """The highest value of each frame, smoothed in time within a clip."""
    return [ndimage.gaussian_filter1d(m.max((1, 2)).astype(float), SMOOTHING / every) for m in maps]


def pixel_scores(maps, labels, masks):
    """For each frame, the threshold from which on it is no longer detected at pixel level.

    An abnormal frame is detected where at least 40 % of its abnormal pixels lie above the threshold, so by the 0.6
    quantile of the map inside the mask; a normal frame raises a false alarm where any pixel does.
    """
    scores = []
    for clip, label, mask in zip(maps, labels, masks, strict=True):
        times = [a // b for a, b in zip(mask.shape[1:], clip.shape[1:], strict=True)]
        for m, abnormal, where in zip(clip, label, mask, strict=True):
            inside = np.kron(m, np.ones(times))[where] if abnormal else m
            scores.append(np.quantile(inside, 0.6, method="higher") if abnormal else inside.max())
    return np.array(scores)


def evaluate(maps, labels, masks, every=1):
    truth = np.concatenate(labels)
    frame = frame_scores(maps, every)
    return {
        "frame_auc": float(roc_auc_score(truth, np.concatenate(frame))),
        "pixel_auc": float(roc_auc_score(truth, pixel_scores(maps, labels, masks))),
    }, frame


def frame_difference(clip, every=1):
    """The trivial score: absolute frame difference, mean of 3 frames x 7 x 7 pixels."""
    change = np.abs(np.diff(clip.astype(np.float32), axis=0, prepend=clip[:1].astype(np.float32)))
    return ndimage.uniform_filter(change, (3, 7, 7))[::every]


# ---- Pictures --------------------------------------------------------------------------------------------------------


def plot(video, every, results, curves, frames, maps, out):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there are no pictures: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = np.concatenate([label[::every] for label in video.labels])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(1, 2.2))
    for (name, score), color in zip(curves.items(), ("#0072b2", "#d55e00"), strict=True):
        false, true, _ = roc_curve(labels, np.concatenate(score))
        left.plot(false, true, color=color, label=f"{name}: {results[name]['frame_auc']:.3f}")
    left.plot((0, 1), (0, 1), ":", color="0.6")
    left.set(xlabel="false alarms", ylabel="abnormal frames found")
    left.set_title("frame-level ROC, with its area", loc="left", fontsize=10)
    left.legend(frameon=False, loc="lower right")
    score = np.concatenate(frames)
    time = np.arange(len(score)) * every
    right.plot(time, score, color="#0072b2", lw=1)
    right.fill_between(
        time, 0, 1, where=labels, transform=right.get_xaxis_transform(), color="#d55e00", alpha=0.18, lw=0
    )
    for edge in np.cumsum([len(frame) for frame in frames])[:-1]:
        right.axvline(edge * every, color="0.75", lw=0.6)
    right.set(xlabel="frame of the test clips, end to end", ylabel="score", xlim=(0, time[-1]))
    right.set_title("SC2Net's score; labelled abnormal frames shaded, clips parted by lines", loc="left", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "abnormal_events.png", dpi=130)

    # Of evenly spaced clips the frame that scores highest: chosen by score, not by label.
    chosen = np.unique(np.linspace(0, len(maps) - 1, 6).round().astype(int))
    rows = 1 + (len(chosen) > 3)
    figure, axes = plt.subplots(
        rows, -(-len(chosen) // rows), figsize=(12, 2.8 * rows + 0.6), layout="constrained", squeeze=False
    )
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, clip in zip(axes.flat, chosen, strict=False):
        t = int(frames[clip].argmax())
        image, mask = video.test[clip][t * every], video.masks[clip][t * every]
        height, width = image.shape
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        heat = ndimage.zoom(maps[clip][t], (height / maps[clip].shape[1], width / maps[clip].shape[2]), order=1)
        panel.imshow(heat, cmap="inferno", vmin=0.6, vmax=2.0, alpha=np.clip((heat - 0.6) / 1.4, 0, 0.65))
        if mask.any():
            panel.contour(mask, [0.5], colors="#56b4e9", linewidths=1.2)
        panel.set_title(f"clip {clip + 1}, frame {t * every}: score {frames[clip][t]:.2f}", loc="left", fontsize=9)
    figure.suptitle("highest-scoring frame of a clip; heat: cost; outlined: labelled abnormal", fontsize=10)
    figure.savefig(out / "abnormal_frames.png", dpi=130)
    print(f"written: {out / 'abnormal_events.png'}, {out / 'abnormal_frames.png'}")


# ---- The run ---------------------------------------------------------------------------------------------------------


def features_of(video, every, progress=True):
    """Channels of the training clips (to learn from), the held-out ones (to calibrate on) and the test clips."""
    ground = background(video.train)
    held = max(1, len(video.train) // 4)
    parts = video.train[:-held], video.train[-held:], video.test
    with tqdm(total=sum(map(len, parts)), desc="features", disable=not progress) as bar:
        found = []
        for part in parts:
            found.append([])
            for clip in part:
                found[-1].append(channels(clip, ground, every))
                bar.update()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="ped2.npz, or the folder that holds it")
    parser.add_argument("--out", type=Path, default=Path("abnormal_events"), help="folder for the results")
    parser.add_argument("--every", type=int, default=3, help="score every n-th frame; motion always uses all frames")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a tiny run on a synthetic clip")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.smoke:
        parser.error("--data PATH is missing: ped2.npz or its folder; or take --smoke, which needs no data")
    if arguments.every < 1:
        parser.error(f"--every must be at least 1, got {arguments.every}")
    torch.set_num_threads(1)
    if arguments.smoke:
        video, num_atoms, num_steps, views, every = synthetic(), 16, 20, VIEWS[::2], 3
    else:
        video, num_atoms, num_steps, views, every = load(arguments.data), 64, 800, VIEWS, arguments.every
    labels = [label[::every] for label in video.labels]
    masks = [mask[::every] for mask in video.masks]
    learn, held_out, test = features_of(video, every)

    per_view = []
    for view in tqdm(views, desc="dictionaries and networks"):
        patches = Patches(view, learn)
        dictionary = learn_dictionary(patches, num_atoms, arguments.seed)
        net = train(SC2Net(dictionary, LAYERS, alpha=patches.alpha), dictionary, patches, num_steps, arguments.seed)
        cost = reconstruction_cost(net, dictionary, patches.alpha)
        maps = [patches.costs(clip, cost) for clip in test]
        per_view.append(calibrated(maps, [patches.costs(clip, cost) for clip in held_out], view.weight))
    maps = fuse(per_view)

    results, curves = {}, {}
    results["SC2Net"], curves["SC2Net"] = evaluate(maps, labels, masks, every)
    trivial = [frame_difference(clip, every) for clip in video.test]
    results["frame difference"], curves["frame difference"] = evaluate(trivial, labels, masks, every)
    print(f"\n{'area under the ROC curve':26}{'frame level':>12}{'pixel level':>13}")
    for name, row in results.items():
        print(f"{name:26}{row['frame_auc']:12.3f}{row['pixel_auc']:13.3f}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    path.write_text(json.dumps({"every": every, "seed": arguments.seed, **results}, indent=1) + "\n")
    print(f"\nwritten: {path}")
    plot(video, every, results, curves, curves["SC2Net"], maps, arguments.out)


if __name__ == "__main__":
    main()
