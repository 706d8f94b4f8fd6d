"""LISTA as a drop-in layer on image patches: the sparse code of a solver, in a fraction of its iterations.

    python examples/sparse_patches.py                      # Olivetti faces from OpenML, or photographs offline
    python examples/sparse_patches.py --data holiday.jpg   # an image, a folder of images, an .npy or .npz array

A dictionary is learned on 8 x 8 patches by scikit-learn. Networks of 2 to 16 layers then learn to minimise the Lasso
objective on it, from patches alone: nobody computes a code for them. On patches of images that neither the dictionary
nor the networks have seen, the table compares them with FISTA, which every one of them is before training.

Writes `results.json` and, where matplotlib is installed, `sparse_patches.png` into the folder given by `--out`.
"""

import argparse
import json
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import fetch_openml, load_sample_images
from sklearn.decomposition import MiniBatchDictionaryLearning
from sklearn.feature_extraction.image import extract_patches_2d

from unrolled import LISTA, fit
from unrolled.losses import Lasso
from unrolled.solvers import fista, lasso_objective

SIZE = 8  # pixels along the side of a patch
ALPHA = 0.5  # weight of the l1 norm; patches have pixels of variance 1, on average
OLIVETTI = 41083  # the data set's number at OpenML
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".webp"}


# ---- Images ----------------------------------------------------------------------------------------------------------


def load_images(path, smoke):
    """A list of grey images (height, width) with values in any unit, and what they are."""
    if path is not None:
        return read(path), str(path)
    if not smoke:
        try:
            return fetch_faces(), "Olivetti faces"
        except OSError as error:
            print(f"offline: OpenML cannot be reached ({error}); taking scikit-learn's two photographs instead")
    return [grey(image) for image in load_sample_images().images], "photographs of scikit-learn"


def fetch_faces():
    # fetch_openml tries again and again; one look beforehand tells within seconds whether there is any use in it.
    urllib.request.urlopen(f"https://www.openml.org/api/v1/json/data/{OLIVETTI}", timeout=5).close()
    pixels = fetch_openml(data_id=OLIVETTI, as_frame=False, parser="liac-arff").data
    return list(pixels.reshape(-1, 64, 64))


def read(path):
    if not path.exists():
        raise SystemExit(f"--data: {path} does not exist")
    if path.suffix == ".npy":
        return split(np.load(path), path)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return [image for name in arrays.files for image in split(arrays[name], f"{path}, array {name}")]
    from PIL import Image  # here, so that arrays can be read without it

    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not files:
        raise SystemExit(f"--data: {path} is no image, .npy or .npz file, nor a folder with images")
    return [np.asarray(Image.open(file).convert("L"), dtype=float) for file in files]


def split(array, name):
    """The grey images of an array (height, width), (height, width, 3) or (count, height, width[, 3])."""
    array = np.asarray(array)
    color = array.ndim >= 3 and array.shape[-1] in (3, 4)
    if array.ndim - color not in (2, 3) or array.dtype.kind not in "uif":
        raise SystemExit(f"--data: {name} has shape {array.shape} and dtype {array.dtype}; images are expected")
    return [grey(image) for image in (array if array.ndim - color == 3 else array[None])]


def grey(image):
    return image[..., :3].mean(-1) if image.ndim == 3 else image.astype(float)


def held_out(images):
    """Images to learn from and images to test on: the last quarter, or the last quarter of an only one's rows."""
    if len(images) == 1:
        row = 3 * len(images[0]) // 4
        return [images[0][:row]], [images[0][row:]]
    count = max(1, len(images) // 4)
    return images[:-count], images[-count:]


def patches(images, count, seed):
    """About `count` patches without their means, (count, 64), flat ones left out."""
    images = [image for image in images if min(image.shape) >= SIZE]
    if not images:
        raise SystemExit(f"--data: no image has {SIZE} x {SIZE} pixels to spare, for training and for testing")
    each = -(-count // len(images))
    found = []
    for index, image in enumerate(images):
        available = (image.shape[0] - SIZE + 1) * (image.shape[1] - SIZE + 1)
        drawn = extract_patches_2d(image, (SIZE, SIZE), max_patches=min(each, available), random_state=seed + index)
        found.append(drawn.reshape(len(drawn), -1))
    y = np.concatenate(found)
    y = y - y.mean(1, keepdims=True)
    return y[y.std(1) > 0.01 * y.std()]


# ---- Training and testing --------------------------------------------------------------------------------------------


def learn_dictionary(y, num_atoms, max_iter):
    """(64, num_atoms), atoms of norm 1 as columns."""
    energy = (y**2).sum(1)  # start at strong patches: weak ones look like noise, and what looks like noise is not used
    start = y[np.random.default_rng(0).choice(len(y), num_atoms, replace=False, p=energy / energy.sum())]
    model = MiniBatchDictionaryLearning(
        num_atoms,
        alpha=ALPHA,
        max_iter=max_iter,
        batch_size=256,
        max_no_improvement=None,
        tol=0.0,
        fit_algorithm="cd",
        dict_init=start / np.linalg.norm(start, axis=1, keepdims=True),
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # codes need not be exact while the dictionary is still moving
        atoms = model.fit(y).components_
    dictionary = torch.tensor(atoms.T, dtype=torch.float32)
    norms = dictionary.norm(dim=0)
    return dictionary[:, norms > 1e-6] / norms[norms > 1e-6]


def endless(y, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield y[torch.randint(len(y), (batch_size,), generator=generator)]


class Gap:
    """How far codes are from optimal: (F(x) - F*) / F*, F summed over all test patches."""

    def __init__(self, dictionary, y):
        # In float64 and run until it no longer moves, so that F* is a reference for gaps down to about 1e-10.
        self.dictionary, self.y = dictionary.double(), y.double()
        self.codes = fista(self.dictionary, self.y, ALPHA, num_iters=20_000, restart=True, tol=1e-9)
        self.best = self.objective(self.codes)

    def objective(self, x):
        return lasso_objective(self.dictionary, self.y, x.double(), ALPHA).sum().item()

    def __call__(self, x):
        return self.objective(x) / self.best - 1


@torch.no_grad()
def fista_gaps(dictionary, y, gap, num_iters):
    """The gap after every iteration of FISTA: a network without training is the solver."""
    return [gap(x) for x in LISTA(dictionary, num_iters, alpha=ALPHA, tied=True, momentum=True).iterates(y)]


def train(dictionary, y, num_layers, options):
    net = LISTA(dictionary, num_layers, alpha=ALPHA, momentum=True, factored=True)
    print(f"training {num_layers} layers")
    fit(
        net,
        endless(y, 512, seed=num_layers),
        Lasso(dictionary, ALPHA, supervision=1.0),
        num_steps=options.num_steps,
        progress=True,
    )
    return net


def report(rows):
    print("\nrelative gap to the optimum of the Lasso objective, on test patches\n")
    print(f"{'layers':>6}  {'FISTA (untrained)':>17}  {'LISTA (trained)':>15}  {'FISTA iterations as good':>24}")
    for row in rows:
        needed = row["fista_iterations"] or "more than tried"
        print(f"{row['layers']:6}  {row['untrained']:17.2e}  {row['trained']:15.2e}  {needed:>24}")


def plot(atoms, curve, rows, path):
    """The atoms, in the given order, and the gap against the number of iterations."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    orange, blue = "#d55e00", "#0072b2"  # of Okabe and Ito: told apart by colour-blind readers too
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", width_ratios=(1, 1.3))
    across = int(np.ceil(len(atoms) ** 0.5))
    tiles = np.full((across * (SIZE + 1) + 1, across * (SIZE + 1) + 1), np.nan)
    for index, atom in enumerate(atoms):
        row, column = (1 + (SIZE + 1) * place for place in divmod(index, across))
        tiles[row : row + SIZE, column : column + SIZE] = atom.reshape(SIZE, SIZE) / np.abs(atom).max()
    left.imshow(tiles, cmap="gray")
    left.set_axis_off()
    left.set_title(
        f"dictionary: {len(atoms)} atoms of {SIZE} x {SIZE} pixels, most used first", loc="left", fontsize=10
    )

    right.loglog(range(1, len(curve) + 1), curve, "-", color=orange, label="FISTA")
    layers = [row["layers"] for row in rows]
    right.loglog(layers, [row["trained"] for row in rows], "o-", color=blue, label="LISTA, one network each")
    right.set_xticks(layers + [n for n in (1, 32, 64) if n <= len(curve)])
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_locator(plt.NullLocator())
    right.set_xlabel("iterations or layers")
    right.set_ylabel("objective: relative gap to the optimum")
    right.grid(which="major", alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an image, a folder of images, or an .npy or .npz array of them")
    parser.add_argument("--out", type=Path, default=Path("sparse_patches"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run without network, to see that everything works")
    arguments = parser.parse_args()
    options = argparse.Namespace(
        num_atoms=256, max_iter=3, num_patches=20_000, num_test=2_000, layers=(2, 4, 8, 16), num_steps=400, curve=64
    )
    if arguments.smoke:
        options = argparse.Namespace(
            num_atoms=96, max_iter=1, num_patches=2_000, num_test=200, layers=(2, 4), num_steps=60, curve=64
        )

    images, what = load_images(arguments.data, arguments.smoke)
    training, test = held_out(images)
    y, y_test = patches(training, options.num_patches, 0), patches(test, options.num_test, 1)
    scale = y.std()  # one number for all, so that strong patches stay stronger than weak ones
    print(f"{what}: {len(y)} patches to learn from, {len(y_test)} of other images (or rows) to test on")
    dictionary = learn_dictionary(y / scale, options.num_atoms, options.max_iter)
    y, y_test = (torch.tensor(patch / scale, dtype=torch.float32) for patch in (y, y_test))

    gap = Gap(dictionary, y_test)
    density = (gap.codes != 0).double().mean()
    print(f"optimal codes use {density:.1%} of the {dictionary.shape[1]} atoms on average")
    curve = fista_gaps(dictionary, y_test, gap, options.curve)
    rows = []
    for num_layers in options.layers:
        net = train(dictionary, y, num_layers, options)
        with torch.no_grad():
            trained = gap(net(y_test))
        as_good = next((k for k, value in enumerate(curve, start=1) if value <= trained), None)
        rows.append(
            {
                "layers": num_layers,
                "untrained": curve[num_layers - 1],
                "trained": trained,
                "fista_iterations": as_good,
            }
        )
    report(rows)

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    results.write_text(json.dumps({"data": what, "alpha": ALPHA, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten: {results}")
    most_used = gap.codes.abs().sum(0).argsort(descending=True)
    plot(dictionary.T[most_used].numpy(), curve, rows, arguments.out / "sparse_patches.png")


if __name__ == "__main__":
    main()
