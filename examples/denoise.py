"""Take the noise out of a picture with a trained TNRD: the picture goes in, the picture and its PSNR come out.

    python examples/denoise.py                                   # a photograph of scikit-learn
    python examples/denoise.py picture.png --sigma 15            # your own, to which noise is added
    python examples/denoise.py noisy.png --noisy --sigma 25      # your own, with noise of about this level in it

`--sigma` is the standard deviation of the noise in grey levels of 0..255, 15, 25 or 50. Colour pictures are done
channel by channel, large ones tile by tile. Without `--noisy`, noise is added first, and the PSNR tells how much of it
is gone, beside the classical method that the network was before its training.

Writes `denoised.png`, `denoise.png` (all pictures side by side) and `results.json` into the folder given by `--out`.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from unrolled.image import TNRD, tiled
from unrolled.solvers.denoising import dct_shrinkage


def load(path, smoke):
    """The picture, (1, C, H, W) in 0..1."""
    if path is None:
        pixels = load_sample_images().images[0].mean(-1, keepdims=True)
        pixels = pixels[100:228, 250:378] if smoke else pixels
    else:
        from PIL import Image

        if not path.is_file():
            raise SystemExit(f"{path} does not exist.")
        with Image.open(path) as image:
            grey = image.mode in ("1", "L", "I", "I;16", "F", "LA")
            pixels = np.atleast_3d(np.asarray(image.convert("L" if grey else "RGB")))
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None] / 255


def psnr(found, clean):
    return -10 * math.log10((found - clean).square().mean())


def draw(pictures, path):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(pictures), figsize=(3.2 * len(pictures), 3.4), layout="constrained")
    for axis, (title, picture) in zip(axes, pictures.items()):
        pixels = picture[0].permute(1, 2, 0).clamp(0, 1).squeeze(-1)
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?", help="any picture that Pillow reads")
    parser.add_argument("--sigma", type=int, default=25, help="noise in grey levels of 0..255")
    parser.add_argument("--noisy", action="store_true", help="the picture has noise in it: add none")
    parser.add_argument("--smoke", action="store_true", help="a small piece of the photograph, in a second")
    parser.add_argument("--out", type=Path, default=Path("denoised"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    net = TNRD.pretrained(sigma=args.sigma)
    picture = load(args.picture, args.smoke)
    noise = 0 if args.noisy else args.sigma / 255 * torch.randn(picture.shape, generator=torch.manual_seed(0))
    noisy = picture + noise

    begin = time.process_time()
    with torch.no_grad():
        denoised = tiled(net, noisy, size=512, margin=net.reach).clamp(0, 1)
    seconds = time.process_time() - begin
    classical = dct_shrinkage(noisy, args.sigma).clamp(0, 1)

    results = {"sigma": args.sigma, "size": list(picture.shape[1:]), "cpu_seconds": seconds}
    shown = {"noisy": noisy, "DCT shrinkage": classical, "TNRD": denoised}
    if not args.noisy:
        results["psnr"] = {name: psnr(found.clamp(0, 1), picture) for name, found in shown.items()}
        shown = {f"{name}, {results['psnr'][name]:.2f} dB": found for name, found in shown.items()}
        shown = {"clean": picture, **shown}
    for name, value in results.get("psnr", {}).items():
        print(f"{name:14s} {value:6.2f} dB")
    print(f"{denoised.shape[-2]} x {denoised.shape[-1]} pixels in {seconds:.2f} CPU s")

    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    try:
        draw(shown, args.out / "denoise.png")
        from PIL import Image

        levels = (255 * denoised[0]).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
        Image.fromarray(levels).save(args.out / "denoised.png")
    except ImportError:
        print("matplotlib or Pillow is not installed: no pictures.")


if __name__ == "__main__":
    main()
