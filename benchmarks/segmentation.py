"""Claim: a CRF trained with a small network raises its mean IoU on CamVid; one put after it does not.

A subset of CamVid (120 training, 60 validation and 60 test images of 180 x 240, 11 classes, void left out), and the
small network of `examples/segmentation.py`. Bandwidths and weights of the CRF after the network are those, of fifteen
settings, with the best mean IoU on 30 validation images; joint training starts from the same. It takes 100 additional
steps, and the network without a CRF gets as many, at the same rate and with the same images. Five mean-field iterations
in training, ten at test. Steps and rates were fixed by hand on validation images. Three seeds: of the first weights and
of the order of the images. One thread, CPU time.

    python benchmarks/segmentation.py --data FOLDER_OR_camvid.npz [--pictures segmentation.png]    # 9 CPU minutes
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _common import load_example, save, table
from tqdm import tqdm

VOID = 11


def report(runs: list[dict[str, Any]], classes: list[str]) -> None:
    def column(name: str, key: str) -> list[float]:
        return [100 * run["test"][name][key] for run in runs]

    def per_class(name: str) -> list[str]:
        return [f"{100 * statistics.mean(values):.0f}" for values in zip(*(run["test"][name]["iou"] for run in runs))]

    names = list(runs[0]["test"])
    print(f"\ntest images, in percent; means of {len(runs)} seeds\n")
    table(
        [
            [
                name,
                f"{statistics.mean(column(name, 'mean_iou')):.2f}",
                " ".join(f"{value:.2f}" for value in column(name, "mean_iou")),
                f"{statistics.mean(column(name, 'accuracy')):.2f}",
                statistics.mean(run["cpu_seconds_a_test_image"][name] for run in runs),
            ]
            for name in names
        ],
        ["", "mean IoU", "of each seed", "accuracy", "CPU s an image"],
    )
    print()
    table([[name, *per_class(name)] for name in names], ["IoU", *classes])
    print()
    table(
        [[part, statistics.mean(run["cpu_seconds"][part] for run in runs)] for part in runs[0]["cpu_seconds"]],
        ["", "CPU s a seed"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="camvid.npz, or the folder that it is in")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, help="draw some test images, of the first seed, into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ex = load_example("segmentation")
    data = ex.load(arguments.data / "camvid.npz" if arguments.data.is_dir() else arguments.data, VOID)
    schedule = ex.Schedule.for_photographs()

    runs: list[dict[str, Any]] = []
    for seed in tqdm(range(arguments.seeds)):
        comparison = ex.compare(data, schedule, seed, progress=False)
        rows, seconds, found = {}, {}, {}
        for name, model in comparison.models.items():
            begin = time.process_time()
            found[name] = ex.predict(model, data.test.images)
            seconds[name] = (time.process_time() - begin) / len(data.test.images)
            rows[name] = ex.scores(found[name], data.test.labels, data.num_classes)
        runs.append(
            {
                "settings": {key: vars(setting) for key, setting in comparison.settings.items()},
                "test": rows,
                "cpu_seconds": comparison.seconds,
                "cpu_seconds_a_test_image": seconds,
            }
        )
        if seed == 0 and arguments.pictures:
            ex.plot(data, found, rows, arguments.pictures)
        report(runs, data.names)  # after each seed, so that what is interrupted was not for nothing
        save(
            "segmentation",
            {
                "schedule": vars(schedule),
                "iterations": {"training": ex.TRAIN_ITERS, "test": ex.TEST_ITERS},
                "classes": data.names,
                "seeds": runs,
            },
        )


if __name__ == "__main__":
    main()
