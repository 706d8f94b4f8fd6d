"""Robust PCA on video: what moves, told from what stays, frame by frame in three layers.

    python examples/background.py                       # a clip made here: squares that pass over a flickering scene
    python examples/background.py --data clip.npy       # grey frames (N, height, width) of a fixed camera

A background basis is learned from all frames at once, without labels, and an encoder of three layers learns to split a
frame into a combination of its columns and a sparse rest. Robust PCA by the inexact method of augmented Lagrange
multipliers (ALM) needs the whole clip and a singular value decomposition in each iteration; the encoder takes one
frame. `--data` also takes an .npz archive with `frames`, or `highway_delta` (their differences in time), and may have
labels: `labels` or `highway_gt`, of 255 for foreground, 170 for unknown and anything else for background.

Writes `results.json` and, where matplotlib is installed, `background.png` into the folder given by `--out`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from unrolled import fit
from unrolled.losses import SeparationObjective
from unrolled.lowrank import RPCAEncoder, fit_basis
from unrolled.solvers import robust_pca, separate, separation_objective

WEIGHTS = {"ridge": 1e-3, "alpha": 2.0}  # alpha in noise levels: pixels are divided by their own
NUM_LAYERS = 3
UNKNOWN, FOREGROUND = 170, 255


# ---- Clips -----------------------------------------------------------------------------------------------------------


def moving_squares(num_frames, height, width):
    """A hill and a fence under flickering light, a tree in the wind, noise, and three squares that pass; and labels."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    scene = 0.35 + 0.3 * y + 0.08 * torch.sin(40 * x) * (y > 0.6)
    tree = (x - 0.8).square() + (y - 0.25).square() < 0.03
    light = 1 + 0.05 * torch.sin(torch.arange(num_frames) / 9)
    frames = light[:, None, None] * scene
    frames = frames + 0.1 * tree * torch.randn(num_frames, height, width, generator=generator)
    labels = torch.zeros(num_frames, height, width, dtype=torch.uint8)
    for row, size, speed, start, grey in ((0.5, 7, 1.0, 0.0, 0.95), (0.7, 9, -0.6, 0.7, 0.1), (0.85, 6, 1.7, 0.3, 0.8)):
        top = int(row * height) - size // 2
        for t in range(num_frames):
            left = int(start * width + speed * t) % (2 * width)  # on its way round it is out of sight half of the time
            frames[t, top : top + size, left : left + size] = grey
            labels[t, top : top + size, left : left + size] = FOREGROUND
    return (frames + 0.01 * torch.randn(frames.shape, generator=generator)).clamp(0, 1), labels


def load_clip(path):
    """Frames (N, height, width) in 0..1, and labels or None."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: --data takes a file with grey frames (N, height, width).")
    data = np.load(path)
    labels = None
    if isinstance(data, np.lib.npyio.NpzFile):
        labels = next((data[key] for key in ("labels", "highway_gt") if key in data), None)
        if "highway_delta" in data:
            data = np.cumsum(data["highway_delta"], axis=0, dtype=np.uint8)
        elif "frames" in data:
            data = data["frames"]
        else:
            raise SystemExit(f"{path} has neither 'frames' nor 'highway_delta', only {', '.join(data)}.")
    if data.ndim != 3 or len(data) < 10 or not np.isfinite(data).all():
        raise SystemExit(f"{path} must hold at least 10 finite grey frames (N, height, width), got {data.shape}.")
    frames = torch.tensor(data).float()
    return frames / 255 if frames.max() > 1 else frames, None if labels is None else torch.tensor(labels)


# ---- Separation ------------------------------------------------------------------------------------------------------


def timed(function, *arguments, **options):
    begin = time.process_time()
    with torch.no_grad():
        result = function(*arguments, **options)
    return result, time.process_time() - begin


def train(dictionary, x, num_steps):
    net = RPCAEncoder(dictionary, NUM_LAYERS, **WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    batches = (x[torch.randint(len(x), (16,), generator=generator)] for _ in iter(int, 1))
    rates = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "lr": 0.04 / dictionary.shape[0] ** 0.5},
        {"params": [p for p in net.parameters() if p.dim() < 2], "lr": 1e-2},
    ]
    optimizer = torch.optim.Adam(rates)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    loss = SeparationObjective(dictionary, **WEIGHTS)
    fit(net, batches, loss, num_steps=num_steps, optimizer=optimizer, scheduler=scheduler, progress=True)
    return net.eval()


def best_mask(strength, labels):
    """The mask at the threshold that agrees best with the labels of the first half; and F on the second half."""
    known, foreground, half = labels != UNKNOWN, labels == FOREGROUND, len(labels) // 2

    def f_measure(mask, frames):
        known_here, truth = known[frames], foreground[frames]
        hit, wrong = (mask & truth & known_here).sum(), ((mask ^ truth) & known_here).sum()
        return float(2 * hit / (2 * hit + wrong).clamp(min=1))

    first, second = slice(0, half), slice(half, None)
    levels = torch.quantile(strength[first].flatten()[::7], 1 - torch.logspace(-0.5, -3.5, 60))
    level = max(levels, key=lambda t: f_measure(strength[first] > t, first))
    return strength > level, f_measure((strength > level)[second], second)


def report(rows):
    print("\nF-measure on the second half of the clip, objective above the converged solver's, CPU ms a frame\n")
    print(f"{'':32}  {'F':>6}  {'objective':>9}  {'ms':>8}")
    for name, row in rows.items():
        f = "" if row["f_measure"] is None else f"{row['f_measure']:.3f}"
        gap = "" if row["gap"] is None else f"{100 * row['gap']:+.1f} %"
        print(f"{name:32}  {f:>6}  {gap:>9}  {row['ms']:8.3f}")


def plot(panels, size, path):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = torch.linspace(0.3, 0.9, 3).mul(len(panels["frame"])).long().tolist()
    figure, axes = plt.subplots(
        len(shown),
        len(panels),
        figsize=(2.6 * len(panels), 2.6 * len(shown) * size[0] / size[1] + 0.4),
        layout="constrained",
    )
    for row, index in zip(axes, shown):
        for axis, (name, images) in zip(row, panels.items()):
            signed = name.startswith("foreground")
            limits = {"cmap": "RdBu_r", "vmin": -20, "vmax": 20} if signed else {"cmap": "gray", "vmin": 0, "vmax": 1}
            axis.imshow(images[index].reshape(size), **limits)
            axis.set(xticks=[], yticks=[])
            if index == shown[0]:
                axis.set_title(name, fontsize=10)
        row[0].set_ylabel(f"frame {index}")
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npy or .npz file with grey frames (N, height, width)")
    parser.add_argument("--out", type=Path, default=Path("background"), help="folder for the results")
    parser.add_argument("--rank", type=int, default=1, help="columns of the background basis")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that seconds can be compared
    if arguments.data:
        clip, labels = load_clip(arguments.data)
    else:
        clip, labels = moving_squares(60, 40, 60) if arguments.smoke else moving_squares(200, 96, 128)
    num_steps, num_iters = (60, 100) if arguments.smoke else (200, 200)
    size, frames = clip.shape[1:], clip.flatten(1)
    print(f"{len(clip)} frames of {size[0]} x {size[1]}")

    # A leaf that always moves tells less than asphalt that never does: count each pixel in units of its own noise.
    median, median_seconds = timed(lambda: frames.median(0).values)
    scale = 1.48 * (frames - median).abs().median(0).values + 5 / 255
    x = frames / scale
    basis = fit_basis(x, arguments.rank, alpha=WEIGHTS["alpha"], num_iters=20)
    net = train(basis, x, num_steps)

    exact, solver_seconds = timed(separate, basis, x, **WEIGHTS, num_iters=num_iters)
    parts, seconds = timed(net, x)
    alm, alm_seconds = timed(robust_pca, frames.T.contiguous())

    def objective(found):
        return separation_objective(basis, x, found.code, found.sparse, **WEIGHTS).sum().item()

    found = {
        "median filter": ((frames - median).abs(), None, median_seconds),
        "robust PCA, inexact ALM": (alm.sparse.T.abs(), None, alm_seconds),
        f"proximal solver, {num_iters} iterations": (exact.sparse.abs(), exact, solver_seconds),
        f"encoder, {NUM_LAYERS} layers": (parts.sparse.abs(), parts, seconds),
    }
    rows, mask = {}, parts.sparse.abs() > 0
    for name, (strength, separated, cpu) in found.items():
        f = None
        if labels is not None:
            mask, f = best_mask(strength, labels.flatten(1))
        gap = None if separated is None else objective(separated) / objective(exact) - 1
        rows[name] = {"f_measure": f, "gap": gap, "ms": 1e3 * cpu / len(frames)}
    report(rows)

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    results.write_text(json.dumps({"frames": len(clip), "size": list(size), "rows": rows}, indent=1) + "\n")
    print(f"\nwritten: {results}")
    panels = {
        "frame": frames,
        "background $Ds$": parts.low_rank * scale,
        "foreground $o$, in noise levels": parts.sparse,
        "mask": mask.float(),
    }
    if labels is not None:
        truth = (labels == FOREGROUND).float().flatten(1)
        panels["labels (grey: unknown)"] = torch.where(labels.flatten(1) == UNKNOWN, 0.5, truth)
    plot(panels, size, arguments.out / "background.png")


if __name__ == "__main__":
    main()
