"""Sharpen a shaken photograph without knowing how the camera moved.

    python examples/deblur.py                          # one of scikit-learn's photographs, shaken here
    python examples/deblur.py --image holiday.jpg      # a photograph of yours, sharp: it is shaken here
    python examples/deblur.py --image shaken.jpg --already-blurred --kernel-size 25
    python examples/deblur.py --train                  # learn from the other photograph first, some minutes

A random camera shake and noise blur one photograph. Blind deconvolution finds the kernel and the image, first with its
schedule set by hand, then with the learned one that comes with the package, or with `--train` with one learned here, on
blurs of another photograph. With the true kernel the image is restored for comparison.

Writes `results.json` and, where matplotlib is installed, `deblur.png` into the folder given by `--out`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from unrolled.image.blind import BlindDeconvolution
from unrolled.metrics import align, psnr
from unrolled.recipes.blind import kernel_distance, train_blind
from unrolled.recipes.deconvolution import SyntheticBlurs, motion_kernel, train_deconvolution


def photographs():
    """The flower and the temple, (2, 3, 213, 320) in [0, 1]: every second pixel, which makes them sharp."""
    images = np.stack(load_sample_images().images).astype(np.float32) / 255
    images = torch.from_numpy(images).movedim(-1, 1)
    return torch.nn.functional.interpolate(images, scale_factor=0.5, mode="area")


def read(path):
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path).convert("RGB"), dtype=np.float32) / 255).movedim(-1, 0)[None]


def shaken(image, side, sigma, seed):
    """The blurred image, the kernel, and the sharp image under it."""
    generator = torch.Generator().manual_seed(seed)
    kernel = motion_kernel(side, generator)[None]
    blurred = torch.nn.functional.conv2d(image.movedim(1, 0), kernel.flip(-2, -1)).movedim(0, 1)
    noise = torch.randn(blurred.shape, generator=generator)
    half = side // 2
    return blurred + sigma / 255 * noise, kernel, image[..., half:-half, half:-half]


def score(image, true):
    aligned = align(image.clamp(0, 1), true, border=12)
    return psnr(aligned.found, aligned.true).item()


def plot(pictures, kernels, path):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(pictures), figsize=(3.2 * len(pictures), 3.2), layout="constrained")
    for axis, (title, image) in zip(axes, pictures.items(), strict=True):
        axis.imshow(image[0].clamp(0, 1).movedim(0, -1).numpy())
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_axis_off()
        if title.split(",")[0] in kernels:
            inset = axis.inset_axes((0.0, 0.0, 0.25, 0.25))
            inset.imshow(kernels[title.split(",")[0]][0, 0].numpy(), cmap="gray")
            inset.set_xticks([])
            inset.set_yticks([])
    figure.savefig(path, dpi=80)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="a photograph to use in place of scikit-learn's")
    parser.add_argument("--already-blurred", action="store_true", help="do not shake it: it is")
    parser.add_argument("--kernel-size", type=int, default=17, help="side of the blur, odd; an upper bound will do")
    parser.add_argument("--train", action="store_true", help="do not take the weights that come with the package")
    parser.add_argument("--out", type=Path, default=Path("deblur"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    side, steps, crop, sides = arguments.kernel_size, 40, 110, (9, 19)
    china, flower = photographs().split(1)
    image = read(arguments.image) if arguments.image else china[..., :200, 60:260]
    if arguments.smoke:
        side, steps, crop, sides, image = 9, 3, 48, (9, 9), image[..., :90, :90]
    if arguments.already_blurred:
        y, kernel, sharp = image, None, None
    else:
        y, kernel, sharp = shaken(image, side, sigma=1.0, seed=3)

    if arguments.train or arguments.smoke:
        net = BlindDeconvolution()
        problem = SyntheticBlurs(flower, crop=crop, sides=sides)
        print("learning to restore with a known kernel")
        train_deconvolution(net.deconvolution, problem, num_steps=steps, batch_size=2, progress=True)
        print("learning to find the kernel")
        train_blind(
            net, problem, num_trials=steps, num_images=2 if arguments.smoke else 16, batch_size=2, progress=True
        )
    else:
        net = BlindDeconvolution.pretrained()
    with torch.no_grad():
        by_hand = BlindDeconvolution(deconvolution=net.deconvolution)(y, side)
        learned = net(y, side)

    pictures, kernels, results = {"blurred": y}, {}, []
    found = {"schedule by hand": by_hand, "learned schedule": learned}
    if sharp is not None:
        results.append({"what": "blurred", "psnr": score(y, sharp)})
        with torch.no_grad():
            found["true kernel"] = (net.deconvolution(y, kernel), kernel)
    for name, (restored, blur) in found.items():
        row = {"what": name}
        if sharp is not None:
            row |= {"psnr": score(restored, sharp), "kernel_error": kernel_distance(blur, kernel).item()}
        results.append(row)
        pictures[f"{name}, {row['psnr']:.1f} dB" if "psnr" in row else name] = restored
        kernels[name] = blur
    for row in results:
        numbers = [f"{key} {value:.2f}" for key, value in row.items() if key != "what"]
        print(f"{row['what']:18} {', '.join(numbers)}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps({"kernel_size": side, "rows": results}, indent=1) + "\n")
    print(f"written: {arguments.out / 'results.json'}")
    plot(pictures, kernels, arguments.out / "deblur.png")


if __name__ == "__main__":
    main()
