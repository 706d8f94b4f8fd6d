"""Deep clustering of handwritten digits: an auto-encoder and k-means that learn together, and what they find.

    python examples/deep_clustering.py                     # scikit-learn's digits, nothing to download; minutes
    python examples/deep_clustering.py --data mnist.npz    # your own: arrays x (n, height, width) and y
    python examples/deep_clustering.py --smoke             # seconds

Three times: k-means on the pixels, k-means on the codes of an auto-encoder, and both trained together. In place of an
image the encoder sees one of its five nearest neighbours, a little turned and shifted, and is asked which image it
stands for: so what differs between the two does not matter to the code. Several seeds are trained, and the one with the
smallest clustering loss is kept; labels are looked at for the scores only.

Writes `results.json` and, where matplotlib is installed, `deep_clustering.png` into the folder given by `--out`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import NearestNeighbors

from unrolled.cluster import KMeansHead
from unrolled.cluster.deep import DeepKMeans
from unrolled.cluster.deep_augmentation import RandomAffine
from unrolled.cluster.deep_losses import Contrast
from unrolled.cluster.encoders import fully_connected_coders
from unrolled.training.deep_kmeans import best_of_seeds, fit_deep_kmeans


def load(path):
    """Images (n, 1, height, width) with values from 0 to 1, and labels from 0."""
    if path is None:
        data = load_digits()
        return torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1), data.target
    if not path.exists():
        raise SystemExit(f"--data: {path} does not exist")
    with np.load(path) as arrays:
        if not {"x", "y"} <= {*arrays.files} or arrays["x"].ndim != 3:
            raise SystemExit(f"--data: arrays x (n, height, width) and y are needed, {path} has {arrays.files}")
        x, y = arrays["x"].astype(np.float32), arrays["y"]
    return torch.from_numpy(x / np.abs(x).max()).unsqueeze(1), np.unique(y, return_inverse=True)[1]


def matched(labels, found):
    """How many samples of each class are in each cluster, the clusters in the order that fits the classes best."""
    counts = np.zeros((labels.max() + 1, labels.max() + 1), dtype=int)
    np.add.at(counts, (labels, found), 1)
    order = linear_sum_assignment(counts, maximize=True)[1]
    return counts[:, order], order


def scores(labels, found):
    return {
        "acc": 100 * float(np.trace(matched(labels, found)[0]) / len(labels)),
        "nmi": 100 * float(normalized_mutual_info_score(labels, found)),
        "ari": 100 * float(adjusted_rand_score(labels, found)),
    }


@torch.no_grad()
def codes(model, x):
    return torch.cat([model.eval().encode(part) for part in x.split(4096)]).numpy()


def plot(model, x, labels, found, history, path, num_points):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts, order = matched(labels, found)
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    k = len(order)

    with torch.no_grad():
        images = model.prototypes()[torch.from_numpy(order), 0].numpy()
    across = -(-k // 2)
    height, width = images.shape[1:]
    grid = np.full((2 * (height + 1) - 1, across * (width + 1) - 1), np.nan)
    for i, image in enumerate(images):
        top, left = (i // across) * (height + 1), (i % across) * (width + 1)
        grid[top : top + height, left : left + width] = image
    axes[0, 0].imshow(grid, cmap="gray_r", vmin=0, vmax=1)
    axes[0, 0].set_axis_off()
    axes[0, 0].set_title("the centres, decoded", loc="left")

    axes[0, 1].imshow(counts / counts.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            share = count / counts[row].sum()
            colour = "white" if share > 0.5 else "black"
            axes[0, 1].text(column, row, count, ha="center", va="center", fontsize=8, color=colour)
    axes[0, 1].set(xlabel="cluster", ylabel="class", xticks=range(k), yticks=range(k))
    axes[0, 1].set_title("samples of each class in each cluster", loc="left")

    chosen = np.random.default_rng(0).permutation(len(x))[:num_points]
    places = TSNE(init="pca", random_state=0, perplexity=min(30, len(chosen) / 4)).fit_transform(
        codes(model, x[torch.from_numpy(chosen)])
    )
    colours = plt.get_cmap("tab10" if k <= 10 else "viridis")
    for i in range(k):
        mine = labels[chosen] == i
        axes[1, 0].scatter(*places[mine].T, s=5, color=colours(i if k <= 10 else i / k), label=str(i))
    axes[1, 0].set_axis_off()
    axes[1, 0].legend(frameon=False, markerscale=3, fontsize=8, loc="center left", bbox_to_anchor=(0.98, 0.5))
    axes[1, 0].set_title("t-SNE of the codes, coloured by class", loc="left")

    before = len(history.pretraining)
    after = before + np.arange(len(history.clustering))
    blue, orange = "#0072b2", "#d55e00"  # of Okabe and Ito: told apart by colour-blind readers too
    errors = [*history.pretraining, *history.reconstruction]
    axes[1, 1].semilogy(1 + np.arange(len(errors)), errors, color=blue, label="reconstruction, share of the variance")
    axes[1, 1].semilogy(after, history.clustering, color=orange, label="squared distance to the centres")
    axes[1, 1].axvline(before, color="black", linewidth=0.6, linestyle=":")
    axes[1, 1].set_xlabel("epoch; after the dotted line everything learns together")
    axes[1, 1].spines[["top", "right"]].set_visible(False)
    axes[1, 1].legend(frameon=False)
    axes[1, 1].set_title("the two errors", loc="left")
    figure.savefig(path, dpi=100)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz file with arrays x (n, height, width) and y")
    parser.add_argument("--out", type=Path, default=Path("deep_clustering"), help="folder for the results")
    parser.add_argument("--seeds", type=int, default=3, help="how many to train; the one with the least loss is kept")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    x, labels = load(arguments.data)
    k = int(labels.max()) + 1
    hidden, options, num_points = (256, 128), {"pretrain_epochs": 80, "epochs": 40, "batch_size": 256}, 1500
    if arguments.smoke:
        hidden, options, num_points = (128,), {"pretrain_epochs": 20, "epochs": 8, "batch_size": 64}, 200
        arguments.seeds = 2
    pixels = x.flatten(1).numpy()
    near = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(pixels).kneighbors(return_distance=False)
    ways = {"neighbours": torch.from_numpy(near), "augment": RandomAffine(), "contrast": Contrast()}
    before = {}

    def train(seed):
        torch.manual_seed(seed)
        model = DeepKMeans(*fully_connected_coders(x.shape[1:], hidden=hidden), KMeansHead(10, k))

        def look(epoch, loss, model):
            if epoch == options["pretrain_epochs"]:
                before[seed] = scores(labels, KMeans(k, n_init=10, random_state=seed).fit_predict(codes(model, x)))

        history = fit_deep_kmeans(model, x, **options, **ways, callbacks=[look], progress=True, seed=seed)
        return model, history

    model, histories = best_of_seeds(train, range(arguments.seeds))
    losses = [history.clustering[-1] for history in histories]
    best = int(np.argmin(losses))
    with torch.no_grad():
        found = np.concatenate([model.eval().predict(part).numpy() for part in x.split(4096)])
    rows = {
        "k-means on the pixels": scores(labels, KMeans(k, n_init=10, random_state=0).fit_predict(pixels)),
        "k-means on the codes": before[best],
        "trained together": scores(labels, found),
    }
    print(f"\n{len(x)} images, the seed of least loss of {arguments.seeds}, in percent")
    print(f"{'':22}  {'ACC':>6}  {'NMI':>6}  {'ARI':>6}")
    for name, row in rows.items():
        print(f"{name:22}  " + "  ".join(f"{value:6.2f}" for value in row.values()))

    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.json"
    content = {"rows": rows, "losses": losses, "history": histories[best].to_dict()}
    results.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {results}")
    plot(model, x, labels, found, histories[best], arguments.out / "deep_clustering.png", num_points)


if __name__ == "__main__":
    main()
