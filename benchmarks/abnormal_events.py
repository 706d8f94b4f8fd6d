"""Abnormal events in UCSD Ped2: SC2Net's sparse reconstruction cost against rivals, by frame and by pixel.

    python benchmarks/abnormal_events.py --data ped2.npz    # 3 CPU minutes, and 7 for SparseCoder

All methods but the frame difference see the same patches of `examples/abnormal_events.py`, are calibrated on the same
held-out normal clips, fused and smoothed alike. Every third frame is scored. Test labels enter the figures alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _common import load_example, save, spread, table
from sklearn.decomposition import PCA, SparseCoder
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from tqdm import tqdm

from unrolled import LISTA, SC2Net

NUM_ATOMS, NUM_STEPS = 64, 800


def pca_cost(patches: Any, seed: int) -> Any:
    """Half the squared distance to the principal subspace that holds 95 % of the variance of normal patches."""
    pca = PCA(0.95, svd_solver="full", random_state=seed).fit(patches.training.numpy())

    def cost(y: Tensor) -> Tensor:
        x = y.numpy()
        return torch.from_numpy(((x - pca.inverse_transform(pca.transform(x))) ** 2).sum(1) / 2).to(y)

    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="ped2.npz, or the folder that holds it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=3, help="score every n-th frame; motion always uses all frames")
    parser.add_argument("--coder-seeds", type=int, default=1, help="seeds for which the slow SparseCoder runs as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ex = load_example("abnormal_events")
    video, every = ex.load(arguments.data), arguments.every
    labels = [label[::every] for label in video.labels]
    masks = [mask[::every] for mask in video.masks]
    begin = time.process_time()
    learn, held_out, test = ex.features_of(video, every)
    seconds: dict[str, list[float]] = {"features": [time.process_time() - begin]}
    found: dict[str, list[dict[str, float]]] = {}
    single: dict[str, list[float]] = {}

    for seed in range(arguments.seeds):
        per_view: dict[str, list[Any]] = {}
        for view in tqdm(ex.VIEWS, desc=f"seed {seed}"):
            begin = time.process_time()
            patches = ex.Patches(view, learn)
            dictionary = ex.learn_dictionary(patches, NUM_ATOMS, seed)
            seconds.setdefault("dictionaries", []).append(time.process_time() - begin)
            costs = {}
            networks = {
                "SC2Net": SC2Net(dictionary, ex.LAYERS, alpha=patches.alpha),
                "LISTA": LISTA(dictionary, ex.LAYERS, alpha=patches.alpha, factored=True, momentum=True),
            }
            for name, net in networks.items():
                begin = time.process_time()
                ex.train(net, dictionary, patches, NUM_STEPS, seed)
                seconds.setdefault(f"training {name}", []).append(time.process_time() - begin)
                costs[name] = ex.reconstruction_cost(net, dictionary, patches.alpha)
            if seed < arguments.coder_seeds:
                # In float64, which is several times faster here than float32.
                atoms = dictionary.T.double().numpy()
                coder = SparseCoder(atoms, transform_algorithm="lasso_cd", transform_alpha=patches.alpha)

                def encode(y: Tensor, coder: SparseCoder = coder) -> Tensor:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", ConvergenceWarning)
                        return torch.from_numpy(coder.transform(y.double().numpy())).to(y)

                costs["SparseCoder"] = ex.reconstruction_cost(encode, dictionary, patches.alpha)
            costs["PCA"] = pca_cost(patches, seed)
            for name, cost in costs.items():
                begin = time.process_time()
                maps = [patches.costs(clip, cost) for clip in test]
                seconds.setdefault(f"scoring {name}", []).append(time.process_time() - begin)
                normal = [patches.costs(clip, cost) for clip in held_out]
                per_view.setdefault(name, []).append(ex.calibrated(maps, normal, view.weight))
                if name == "SC2Net":
                    alone = ex.evaluate(ex.smooth(per_view[name][-1]), labels, masks, every)[0]
                    single.setdefault(view.name, []).append(alone["frame_auc"])
        for name, views in per_view.items():
            found.setdefault(name, []).append(ex.evaluate(ex.fuse(views), labels, masks, every)[0])
            print(seed, name, found[name][-1], flush=True)
    trivial = [ex.frame_difference(clip, every) for clip in video.test]
    found["frame difference"] = [ex.evaluate(trivial, labels, masks, every)[0]]

    def column(name: str, key: str) -> list[float]:
        return [row[key] for row in found[name]]

    scoring = {name: sum(seconds.get(f"scoring {name}", [])) / len(found[name]) for name in found}
    rows = [
        [
            name,
            f"{statistics.mean(column(name, 'frame_auc')):.3f}",
            f"{min(column(name, 'frame_auc')):.3f}..{max(column(name, 'frame_auc')):.3f}",
            f"{statistics.mean(column(name, 'pixel_auc')):.3f}",
            len(found[name]),
            scoring[name] or None,
        ]
        for name in found
    ]
    table(rows, ["method", "frame AUC", "range", "pixel AUC", "seeds", "CPU s to score the test clips"])
    if single:
        print("\none view alone, SC2Net, frame AUC")
        table([[name, statistics.mean(value)] for name, value in single.items()], ["view", "mean"])
    save(
        "abnormal_events",
        {
            "every": every,
            "atoms": NUM_ATOMS,
            "layers": ex.LAYERS,
            "training_steps": NUM_STEPS,
            "views": len(ex.VIEWS),
            "auc": {name: {key: column(name, key) for key in ("frame_auc", "pixel_auc")} for name in found},
            "frame_auc_of_one_view": single,
            "cpu_seconds": {name: {"sum": sum(value), **spread(value)} for name, value in seconds.items()},
        },
    )


if __name__ == "__main__":
    main()
