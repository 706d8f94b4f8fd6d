"""What stands out in a photograph: saliency by diffusion from seeds, with learned weights.

    python examples/seeded_diffusion.py                      # scikit-learn's photograph of a flower
    python examples/seeded_diffusion.py --image holiday.jpg  # or any other

Two simple guides say where an object might be: pixels whose colour is not that of the image's border, and pixels near
the centre. Both are vague. Seeds are chosen greedily so that what spreads from them covers most of what the guides
believe in, and then spread to what looks alike. How much colours may differ, how far a seed reaches and how far to
trust each guide is learned from small noisy images with known masks, and carried over to the photograph.

Writes `results.json` and, where matplotlib is installed, `seeded_diffusion.png` into the folder given by `--out`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_image
from sklearn.metrics import roc_auc_score

from unrolled import fit
from unrolled.image.seeded import SeededDiffusion
from unrolled.solvers.diffusion import heat

NUM_SEEDS = 3
SIZE = (20, 28)  # of the synthetic images


def guides_of(image):
    """(..., 3, H, W) -> (..., 2, H, W) in [0, 1]: unlike the border, and near the centre."""
    height, width = image.shape[-2:]
    rim = max(1, min(height, width) // 12)
    inside = torch.ones(height, width, dtype=torch.bool)
    inside[rim:-rim, rim:-rim] = False
    border = image[..., inside]  # (..., 3, pixels)
    mean, spread = border.mean(-1), border.std(-1) + 0.05
    distance = ((image - mean[..., None, None]) / spread[..., None, None]).square().sum(-3)
    unlike = 1 - torch.exp(-distance / 8)
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    centre = torch.exp(-(x.square() + y.square()) / 0.5).expand(unlike.shape)
    return torch.stack([unlike, centre], -3)


def synthetic(count, seed):
    """Objects in two colours before a background that changes from corner to corner, and their masks."""
    generator = torch.Generator().manual_seed(seed)
    height, width = SIZE
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    images, masks = [], []
    for _ in range(count):
        colours = torch.rand(4, 3, 1, 1, generator=generator)
        top, left, tall, wide, slant = torch.rand(5, generator=generator).tolist()
        ramp = slant * x + (1 - slant) * y
        image = colours[0] + 0.35 * (colours[1] - colours[0]) * ramp
        u, v = (x - 0.35 - 0.3 * left) / (0.15 + 0.15 * wide), (y - 0.35 - 0.3 * top) / (0.15 + 0.15 * tall)
        mask = u.square() + v.square() < 1 if slant < 0.5 else u.abs() + v.abs() < 1.3
        image = torch.where(mask, torch.where(v < 0, colours[2], 0.7 * colours[2] + 0.3 * colours[3]), image)
        images.append((image + 0.12 * torch.randn(image.shape, generator=generator)).clamp(0, 1))
        masks.append(mask.float())
    return torch.stack(images), torch.stack(masks)


def saliency(net, image):
    """The map, and the seeds that it was spread from."""
    guides = guides_of(image)
    seeds = net.choose_seeds(image, guides, NUM_SEEDS, spacing=max(2, image.shape[-1] // 32))
    return net(image, guides, seeds), seeds


def error(net, batch):
    images, masks = batch
    return (saliency(net, images)[0] - masks).square().mean()


def batches(images, masks, size, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(images), (size,), generator=generator)
        yield images[chosen], masks[chosen]


def score(maps, masks):
    """Mean over the images of the area under the ROC curve, and the mean absolute error."""
    aucs = [roc_auc_score(mask.flatten().numpy(), found.flatten().numpy()) for mask, found in zip(masks, maps)]
    return {"auc": float(np.mean(aucs)), "mean_absolute_error": (maps - masks).abs().mean().item()}


def photograph(path, side):
    """(3, H, W) in [0, 1], its longer side about `side` pixels, and a little smoothed: texture is no border."""
    if path is None:
        pixels = load_sample_image("flower.jpg")
    else:
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))
    image = torch.tensor(pixels).permute(2, 0, 1).float() / 255
    factor = max(1, max(image.shape[1:]) // side)
    image = torch.nn.functional.avg_pool2d(image, factor)
    return heat(image, num_iters=4, diffusivity=0.2)


def plot(image, columns, path):
    """`columns`: title -> (map, seeds or None)."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(columns), figsize=(3.2 * (1 + len(columns)), 2.5), layout="constrained")
    axes[0].imshow(image.permute(1, 2, 0).clamp(0, 1))
    axes[0].set_title("photograph", fontsize=10)
    for axis, (title, (found, seeds)) in zip(axes[1:], columns.items()):
        axis.imshow(found, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
        if seeds is not None:
            rows, across = seeds.nonzero().T
            axis.plot(across, rows, "o", color="#d55e00", markersize=4)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(path, dpi=90)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="a photograph of your own")
    parser.add_argument("--out", type=Path, default=Path("seeded_diffusion"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    count, steps, side = (40, 25, 80) if arguments.smoke else (200, 150, 160)

    images, masks = synthetic(count, 0)
    test, truth = synthetic(40, 1)
    untrained, net = SeededDiffusion(3, 2, absorption=0.1), SeededDiffusion(3, 2, absorption=0.1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    fit(net, batches(images, masks, 8, 0), error, num_steps=steps, optimizer=optimizer, progress=not arguments.smoke)
    rows = {"guides alone": score(guides_of(test).mean(-3), truth)}
    with torch.no_grad():
        rows["diffused, not trained"] = score(saliency(untrained, test)[0], truth)
        rows["diffused, trained"] = score(saliency(net, test)[0], truth)
    print(f"\n{'synthetic test images':24}{'AUC':>8}{'mean absolute error':>22}")
    for name, row in rows.items():
        print(f"{name:24}{row['auc']:8.3f}{row['mean_absolute_error']:22.3f}")
    learned = {
        "contrast": net.contrast.tolist(),
        "absorption": net.absorption.item(),
        "mixture": net.mixture.tolist(),
    }
    print(f"\nlearned: {learned}")

    image = photograph(arguments.image, side)
    with torch.no_grad():
        columns = {"guides": (guides_of(image).mean(-3), None)}
        columns["diffused, not trained"] = saliency(untrained, image)
        columns["diffused, trained"] = saliency(net, image)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    seeds = columns["diffused, trained"][1].nonzero().tolist()
    content = {"rows": rows, "learned": learned, "size": list(image.shape[1:]), "seeds": seeds}
    results.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten: {results}")
    plot(image, columns, arguments.out / "seeded_diffusion.png")


if __name__ == "__main__":
    main()
