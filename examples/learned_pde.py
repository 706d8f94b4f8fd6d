"""Removing noise by a differential equation that was learned from two photographs.

    python examples/learned_pde.py                      # scikit-learn's: learn on their left halves, test on the right
    python examples/learned_pde.py --image holiday.jpg  # test on another

The network begins as the heat equation, which blurs noise and edges alike. It learns the coefficients of 17
differential invariants, in every time step, from noisy crops of the left halves. On the right halves it is compared
with the heat equation and with Perona and Malik's diffusion, whose settings are chosen on the left. A turned image gets
the turned answer; the difference that rounding leaves is measured.

Writes `results.json` and, where matplotlib is installed, `learned_pde.png` into the folder given by `--out`.
"""

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_image

from unrolled.image.diffusion import LearnedPDE
from unrolled.metrics.image import psnr
from unrolled.recipes.diffusion import train_pde
from unrolled.solvers.diffusion import heat, perona_malik

SIGMA = 25.0  # of the noise, in grey levels of 0..255


def grey(pixels):
    """(N, H, W, 3) in 0..255 -> (N, 1, H, W) in [0, 1]."""
    return torch.tensor(np.stack(pixels)).float().mean(-1)[:, None] / 255


def score(answer, images):
    """PSNR of each image in dB."""
    return psnr(answer.clamp(0, 1), images).tolist()


def noisy(image, seed):
    return image + SIGMA / 255 * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))


def best(images):
    """Name -> the classical diffusion with the settings that do best on these images."""
    y = noisy(images, 7)
    families = {
        "heat equation": [functools.partial(heat, num_iters=k) for k in (5, 8, 12, 16)],
        "Perona-Malik": [
            functools.partial(perona_malik, contrast=contrast, num_iters=k)
            for contrast in (15.0, 20.0, 30.0)
            for k in (8, 16, 32)
        ],
    }
    return {
        name: max(members, key=lambda denoise: sum(score(denoise(y), images))) for name, members in families.items()
    }


def asymmetry(net, y):
    """The largest difference between the turned answer and the answer to the turned image, in grey levels."""
    return 255 * (net(y.rot90(1, (-2, -1))) - net(y).rot90(1, (-2, -1))).abs().max().item()


def plot(rows, path):
    """A row for each image: title -> (H, W)."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(rows[0])
    figure, grid = plt.subplots(len(rows), count, figsize=(2.2 * count, 2.6 * len(rows)), squeeze=False)
    for axes, row in zip(grid, rows):
        for axis, (title, image) in zip(axes, row.items()):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=60)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="a photograph of your own to test on")
    parser.add_argument("--out", type=Path, default=Path("learned_pde"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    options = {"num_steps": 400}
    if arguments.smoke:
        options = {"num_steps": 100, "crop": 48, "batch_size": 6}

    both = grey([load_sample_image("china.jpg"), load_sample_image("flower.jpg")])
    middle = both.shape[-1] // 2
    learning, test = both[..., :middle], both[..., middle:]
    if arguments.image is not None:
        from PIL import Image

        learning, test = both, grey([Image.open(arguments.image).convert("RGB")])
    if arguments.smoke:
        test = test[..., 150:278, :128]
    net = LearnedPDE(5, diffusivity=0.15) if arguments.smoke else LearnedPDE()
    rivals = best(learning)
    rivals["learned PDE, not trained"] = LearnedPDE(len(net), diffusivity=net[0].diffusivity)
    history = train_pde(net, learning, sigma=SIGMA, progress=not arguments.smoke, **options)
    print(f"{sum(p.numel() for p in net.parameters())} numbers learned in {history.seconds:.0f} s")

    y = noisy(test, 0)
    with torch.no_grad():
        answers = {"noisy": y} | {name: denoise(y) for name, denoise in {**rivals, "learned PDE": net}.items()}
        turned = asymmetry(net, y)
    scores = {name: score(answer, test) for name, answer in answers.items()}
    print("\nPSNR in dB")
    for name, values in scores.items():
        print(f"{name:28}{'  '.join(f'{value:6.2f}' for value in values)}")
    print(f"\na turned image changes the answer by {turned:.1e} of 255 grey levels")

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    results.write_text(json.dumps({"sigma": SIGMA, "psnr": scores, "asymmetry": turned}, indent=1) + "\n")
    print(f"\nwritten: {results}")
    part = (0, slice(0, 128) if arguments.smoke else slice(110, 290), slice(0, 180))
    shown = [name for name in scores if "not trained" not in name]
    rows = [
        {f"{name}\n{scores[name][i]:.2f} dB": answers[name][i][part] for name in shown} | {"photograph\n": image[part]}
        for i, image in enumerate(test)
    ]
    plot(rows, arguments.out / "learned_pde.png")


if __name__ == "__main__":
    main()
