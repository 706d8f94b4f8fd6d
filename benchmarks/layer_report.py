"""Claim: a layer report takes seconds, holds for what theory is about, and leads to a network of fewer layers.

Three measurements:

- time: CPU seconds of a full report of 16 layers on 256 signals, with theory, truth, Jacobians and sensitivities, and
  of its parts, beside one forward pass;
- self-test: what the report says of the untrained ISTA and FISTA, whose every prediction must hold;
- design loop: that of `examples/design_loop.py`, on photographs, for three seeds of the training batches.

One thread, CPU seconds.

    python benchmarks/layer_report.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import load_example, save, spread, table

from unrolled import LISTA, LISTACP, Unroll
from unrolled.problems import SparseRecovery
from unrolled.report import FISTATheory, ISTATheory, LayerReport

LAYERS, SIGNALS = 16, 256
ALPHA = 0.02
REPEATS = 3


def seconds(function: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds of a few calls."""
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return spread(times)


def networks(D: torch.Tensor) -> dict[str, Unroll]:
    return {
        "LISTA": LISTA(D, LAYERS, alpha=ALPHA),
        "LISTA tied": LISTA(D, LAYERS, alpha=ALPHA, tied=True),
        "LISTA-CP": LISTACP(D, LAYERS, alpha=ALPHA),
        "LISTA momentum": LISTA(D, LAYERS, alpha=ALPHA, momentum=True),
    }


def times() -> list[dict[str, Any]]:
    rows = []
    for m, n in ((50, 100), (250, 500)):
        problem = SparseRecovery(m, n)
        y, x = problem.test(SIGNALS)
        theory = ISTATheory(problem.dictionary, ALPHA)
        for name in ("LISTA", "LISTA-CP"):
            net = networks(problem.dictionary)[name]
            with torch.no_grad():
                forward = seconds(lambda net=net, y=y: net(y))
            parts = {
                "full": lambda net=net, y=y, x=x, theory=theory: LayerReport(net, y, theory, truth=x),
                "no theory": lambda net=net, y=y: LayerReport(net, y),
                "no Jacobians, no sensitivity": lambda net=net, y=y, x=x, theory=theory: LayerReport(
                    net, y, theory, truth=x, power_iters=0, sensitivity=False
                ),
            }
            found = {part: seconds(function) for part, function in parts.items()}
            rows.append({"m": m, "n": n, "network": name, "forward": forward, **found})
            print(f"{m} x {n}, {name}: {found['full']['median']:.2f} s")
    return rows


def self_test() -> list[dict[str, Any]]:
    rows = []
    for m, n in ((50, 100),):
        problem = SparseRecovery(m, n)
        y, x = problem.test(SIGNALS)
        for name, net in networks(problem.dictionary).items():
            kind = FISTATheory if "momentum" in name else ISTATheory
            report = LayerReport(net, y, kind(problem.dictionary, ALPHA), truth=x)
            rows.append(
                {
                    "m": m,
                    "n": n,
                    "network": name,
                    "predictions": len(report.predictions()),
                    "failing": sum(row.holds is False for row in report.rows),
                    "decrease": float(report.value("decrease").min()),
                    "lipschitz": float(report.value("lipschitz").max()),
                    "gain": float(report.value("gain").max()) if "gain" in report.columns else None,
                    "verdicts": sorted({verdict.name for verdict in report.verdicts}),
                }
            )
    return rows


def design_loop(seeds: int, smoke: bool) -> list[dict[str, Any]]:
    example = load_example("design_loop")
    options = example.options_of(smoke)
    y, y_judge, y_test = example.load_patches(options)
    dictionary = example.learn_dictionary(y, options.num_atoms)
    rows = []
    for seed in range(seeds):
        begin = time.process_time()
        bench = example.Bench(dictionary, y, y_test, seed)
        design, goal = example.run_loop(bench, y_judge, options.layers, options)
        compared = example.compare(bench, design, options.layers)
        rows.append(
            {
                "seed": seed,
                "goal_db": goal,
                "layers": len(design.net),
                "steps": bench.steps,
                "seconds": time.process_time() - begin,
                "test": compared,
                "log": [entry._asdict() for entry in design.log],
            }
        )
        print(f"seed {seed}: {options.layers} -> {len(design.net)} layers, {rows[-1]['seconds']:.0f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of the design loop")
    parser.add_argument("--smoke", action="store_true", help="a tiny design loop; nothing is saved")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timed = times()
    table(
        [[f"{row['m']} x {row['n']} {row['network']}", *(row[k]["median"] for k in list(row)[3:])] for row in timed],
        ["CPU seconds", *list(timed[0])[3:]],
    )
    tested = self_test()
    table(
        [
            [f"{row['m']} x {row['n']} {row['network']}", *(row[k] for k in list(row)[3:7]), row["gain"] or "-"]
            for row in tested
        ],
        ["untrained", "predictions", "failing", "decrease", "lipschitz", "gain"],
    )
    designed = design_loop(arguments.seeds, arguments.smoke)
    for row in designed:
        table(
            [[name, *values.values()] for name, values in row["test"].items()], [f"seed {row['seed']}", "layers", "dB"]
        )
    if not arguments.smoke:
        settings = {"layers": LAYERS, "signals": SIGNALS, "alpha": ALPHA, "repeats": REPEATS}
        save("layer_report", {"settings": settings, "time": timed, "self_test": tested, "design_loop": designed})


if __name__ == "__main__":
    main()
