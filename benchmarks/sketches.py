"""Claim: sketches read back what they hold, are alike where their objects are, and give their modules away.

read        Error of a matched filter against d, 16 layers x 8 attributes of norm 1 as one flat tuple, 16 samples; half
            erased; least squares. Wanted: slope -0.5 +- 0.1; at most 1.6 times the error with half erased; 1e-6 by
            least squares at d = 256.
depth       The same for objects made of 3 objects each, 1 to 3 levels deep, by matched filter and by least squares.
similarity  The cosine of sketches that have k of 10 objects in common. Wanted: k / 10.
counts      20 objects of 4 modules: how many of each, and the mean of their attributes. Wanted: within 0.5.
sparse      512 unknowns, 10 of them 1 or -1, of a sketch of 512 numbers whose end is erased: matched filter against the
            library's sparse coder.
modules     40 modules, of which 3 take part in each of N sketches of 32 numbers: how many modules are found, at cosine
            0.95, from sketches alone, beside scikit-learn's MiniBatchDictionaryLearning in the same run, with three
            values of alpha (1 is its default), and with one of them for 20 passes without its early stop. Wanted: more
            than 12 of 40 at N = 4000.
overhead    CPU time of a LISTA of 16 layers and of a small convolutional network, with and without their sketches.

Five seeds, of rotations and data alike. One thread, CPU seconds, float64 but in `modules`.

    python benchmarks/sketches.py [read] [depth] [similarity] [counts] [sparse] [modules] [overhead] [plot]

Without names everything runs. `plot` draws benchmarks/results/sketches_*.png from the JSON files.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from _common import RESULTS, interleaved, ratio, save, spread, table
from torch import Tensor, nn
from tqdm import tqdm

from unrolled import LISTA, MSparseEncoder, Trace
from unrolled.functional import top_k_threshold
from unrolled.sketch import (
    Block,
    Item,
    MatchedFilter,
    NetworkSketch,
    Rotation,
    SketchDictionary,
    Sketcher,
    SparseCoder,
    TraceSketch,
    default_metrics,
    learn_dictionary,
    matched_atoms,
    seed_of,
    similarity,
)

SEEDS = range(5)
F64 = torch.float64
DIMENSIONS = [2**k for k in range(7, 15)]
LAYERS, SIZE, SAMPLES = 16, 8, 16


def unit(*shape: int, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return nn.functional.normalize(values, dim=-1)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def slope(dimensions: Sequence[int], errors: Sequence[float]) -> float:
    return float(np.polyfit(np.log(dimensions), np.log(errors), 1)[0])


def medians(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of every figure the median, least and largest over the seeds."""
    return {name: spread([row[name] for row in rows]) for name in rows[0]}


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_one(d: int, seed: int) -> dict[str, float]:
    sketch = TraceSketch([f"a{i}" for i in range(SIZE)], LAYERS, d, seed)
    x = unit(SAMPLES, LAYERS, SIZE, seed=seed)
    for t in range(LAYERS):
        sketch.update(t, x[:, t])

    def rest(part: TraceSketch, decoder: Any = None) -> Tensor:
        layers = [torch.stack(list(part.recover(t, decoder=decoder).values()), -1) for t in range(LAYERS)]
        return torch.stack(layers, 1) - x

    half = sketch.truncate(d // 2)
    whole, cut = rest(sketch, MatchedFilter()), rest(half, MatchedFilter())
    row = {"matched": rms(whole), "matched max": whole.abs().max().item()}
    row |= {"half": rms(cut), "half max": cut.abs().max().item()}
    row |= {"cost of half": row["half"] / row["matched"], "cost of half, max": row["half max"] / row["matched max"]}
    unknowns = LAYERS * (SIZE + 1)
    exact = {"least squares max": (sketch, d), "least squares, half, max": (half, d // 2)}
    row |= {name: rest(part).abs().max().item() for name, (part, kept) in exact.items() if kept >= unknowns}
    return row


def read() -> None:
    rows = {d: [read_one(d, seed) for seed in SEEDS] for d in tqdm(DIMENSIONS, desc="read", leave=False)}
    slopes = [slope(DIMENSIONS, [rows[d][i]["matched"] for d in DIMENSIONS]) for i in range(len(SEEDS))]
    result = {d: medians(runs) for d, runs in rows.items()}
    names = ["matched", "matched max", "half", "cost of half", "cost of half, max", "least squares max"]
    table(
        [[d, *(cells[name]["median"] if name in cells else "" for name in names)] for d, cells in result.items()],
        ["d", *names],
    )
    worst = max(cells["cost of half"]["max"] for cells in result.values())
    print(f"slope {statistics.median(slopes):.3f} ({min(slopes):.3f} to {max(slopes):.3f}), half at worst {worst:.2f}")
    save("sketches_read", {"layers": LAYERS, "attributes": SIZE, "slopes": slopes, "dimensions": result})


# ---- Recursion -------------------------------------------------------------------------------------------------------


def tree(depth: int, seed: int, name: str = "root") -> Item:
    parts = tuple(tree(depth - 1, seed, f"{name}.{j}") for j in range(3)) if depth > 1 else ()
    return Item(name, unit(SIZE, seed=seed_of(seed, name)), parts)


def walk(items: Sequence[Item], level: int = 1) -> Iterator[tuple[int, Tensor]]:
    for item in items:
        yield level, item.attributes
        yield from walk(item.inputs, level + 1)


def depth_one(d: int, seed: int) -> dict[str, float]:
    """Three objects, each of 3 objects, each of 3 objects: 39 objects with 312 attributes."""
    sketcher = Sketcher(d, seed, dtype=F64)
    items = [tree(3, seed, f"root{j}") for j in range(3)]
    whole = sketcher.sketch(items)
    true = list(walk(items))

    def errors(decoder: Any) -> dict[int, Tensor]:
        rest: dict[int, list[Tensor]] = {1: [], 2: [], 3: []}
        for (level, x), (_, found) in zip(true, walk(sketcher.recover(whole, items, decoder=decoder))):
            rest[level].append(found - x)
        return {level: torch.stack(values) for level, values in rest.items()}

    matched = errors(MatchedFilter())
    row = {f"matched, level {level}": rms(values) for level, values in matched.items()}
    row |= {f"matched max, level {level}": values.abs().max().item() for level, values in matched.items()}
    row |= {f"cost of level {level}": rms(matched[level]) / rms(matched[level - 1]) for level in (2, 3)}
    if d >= len(true) * SIZE:
        row |= {f"least squares max, level {k}": values.abs().max().item() for k, values in errors(None).items()}
    return row


def depth() -> None:
    rows = {d: [depth_one(d, seed) for seed in SEEDS] for d in tqdm(DIMENSIONS[1:], desc="depth", leave=False)}
    result = {d: medians(runs) for d, runs in rows.items()}
    names = [f"matched max, level {k}" for k in (1, 2, 3)] + ["cost of level 2", "cost of level 3"]
    names += ["least squares max, level 1", "least squares max, level 3"]
    table(
        [[d, *(cells[name]["median"] if name in cells else "" for name in names)] for d, cells in result.items()],
        ["d", *names],
    )
    first = [slope(list(rows), [runs[i]["matched, level 1"] for runs in rows.values()]) for i in range(len(SEEDS))]
    print(f"slope at level 1: {statistics.median(first):.3f} ({min(first):.3f} to {max(first):.3f})")
    save("sketches_depth", {"children": 3, "attributes": SIZE, "slopes": first, "dimensions": result})


# ---- Similarity, counts ----------------------------------------------------------------------------------------------


def similar() -> None:
    result: dict[str, Any] = {}
    for d in (1024, 4096, 16384):
        values: dict[int, list[float]] = {k: [] for k in range(11)}
        for seed in SEEDS:
            sketcher = Sketcher(d, seed, dtype=F64)

            def whole(names: Sequence[str], sketcher: Sketcher = sketcher, seed: int = seed) -> Tensor:
                return sketcher.sketch([Item(name, unit(SIZE, seed=seed_of(seed, name))) for name in names])

            mine = whole([f"m{j}" for j in range(10)])
            for k in values:
                other = whole([f"{'m' if j < k else 'o'}{j}" for j in range(10)])
                values[k].append(similarity(mine, other).item())
        line = [np.polyfit(range(11), [values[k][i] for k in range(11)], 1) for i in range(len(SEEDS))]
        result[str(d)] = {
            "cosines": {k: spread(found) for k, found in values.items()},
            "largest deviation from k / 10": max(abs(v - k / 10) for k, found in values.items() for v in found),
            "slope": spread([10 * float(fit[0]) for fit in line]),
        }
    table(
        [
            [d, *(cells["cosines"][k]["median"] for k in (0, 2, 5, 8, 10)), cells["largest deviation from k / 10"]]
            for d, cells in result.items()
        ],
        ["d", *(f"{k} of 10" for k in (0, 2, 5, 8, 10)), "worst deviation"],
    )
    save("sketches_similarity", {"objects": 10, "dimensions": result})


def counts_one(d: int, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    names = ["ABCD"[int(j)] for j in torch.randint(4, (20,), generator=generator)]
    x = unit(20, SIZE, seed=seed)
    sketcher = Sketcher(d, seed, dtype=F64)
    whole = sketcher.sketch([Item(name, values) for name, values in zip(names, x)])
    flat = TraceSketch([f"a{i}" for i in range(SIZE)], 20, d, seed, modules=names)
    for t in range(20):
        flat.update(t, x[t])
    rows: dict[str, list[float]] = {"count": [], "count, flat": [], "mean": [], "count, flat, matched": []}
    for module in sorted(set(names)):
        true = x[[name == module for name in names]]
        rows["count"].append(abs(sketcher.count(whole, module, 1 / 20).item() - len(true)))
        rows["mean"].append((sketcher.total(whole, module, SIZE, 1 / 20) / len(true) - true.mean(0)).norm().item())
        rows["count, flat"].append(abs(flat.count(module).item() - len(true)))
        rows["count, flat, matched"].append(abs(flat.count(module, decoder=MatchedFilter()).item() - len(true)))
    return {
        f"{name}, {kind}": f(v) for name, v in rows.items() for kind, f in (("mean", statistics.mean), ("max", max))
    }


def counts() -> None:
    result = {}
    for d in tqdm((256, 1024, 4096, 16384), desc="counts", leave=False):
        rows = [counts_one(d, seed) for seed in SEEDS]
        result[d] = {
            name: (max if name.endswith("max") else statistics.mean)(r[name] for r in rows) for name in rows[0]
        }
    names = ["count, mean", "count, max", "mean, mean", "count, flat, matched, max", "count, flat, max"]
    table([[d, *(cells[name] for name in names)] for d, cells in result.items()], ["d, error of", *names])
    save("sketches_counts", {"objects": 20, "modules": 4, "dimensions": result})


# ---- Sparse ----------------------------------------------------------------------------------------------------------


def sparse() -> None:
    result = {}
    for kept in tqdm((32, 48, 64, 96, 128, 192, 256), desc="sparse", leave=False):
        rows = []
        for seed in SEEDS:
            blocks = [Block(128, (Rotation(512, seed_of(seed, t), dtype=F64),), 0.25) for t in range(4)]
            dictionary = SketchDictionary(blocks, kept)
            generator = torch.Generator().manual_seed(seed)
            where = top_k_threshold(torch.rand(50, 512, generator=generator), 10) != 0
            x = torch.sign(torch.randn(50, 512, generator=generator, dtype=F64)) * where
            s = dictionary(x)
            row = {}
            for name, decoder in (("matched", MatchedFilter()), ("sparse", SparseCoder())):
                rest = decoder(dictionary, s) - x
                row[f"{name}, exact"] = (rest.abs().amax(1) < 1e-6).double().mean().item()
                row[f"{name}, rms"] = rms(rest)
            rows.append(row)
        result[kept] = medians(rows)
    names = ["matched, exact", "matched, rms", "sparse, exact", "sparse, rms"]
    table([[d, *(cells[name]["median"] for name in names)] for d, cells in result.items()], ["kept", *names])
    save("sketches_sparse", {"unknowns": 512, "nonzeros": 10, "d": 512, "kept": result})


# ---- Modules ---------------------------------------------------------------------------------------------------------


def module_data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sketches of 3 of 40 modules with one attribute each, standard normal, and what each module adds."""
    sketcher, generator = Sketcher(32, seed), torch.Generator().manual_seed(seed)
    spike = torch.eye(1, 32)[0]
    atoms = torch.stack([sketcher.rotation("attributes", f"module {j}")(spike) for j in range(40)], 1)
    where = top_k_threshold(torch.rand(count, 40, generator=generator), 3) != 0
    return (torch.randn(count, 40, generator=generator) * where) @ atoms.T, atoms


def scikit_learn(samples: Tensor, seed: int, **options: Any) -> Tensor:
    from sklearn.decomposition import MiniBatchDictionaryLearning

    learner = MiniBatchDictionaryLearning(40, fit_algorithm="cd", random_state=seed, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(learner.fit(samples.numpy()).components_.T).float()


def trained_by(coder: Any) -> Callable[[Tensor, int], Tensor]:
    return lambda samples, seed: learn_dictionary(samples, 40, 3, seed=seed, coder=coder).atoms


def modules() -> None:
    learners: dict[str, Callable[[Tensor, int], Tensor]] = {
        "learn_dictionary, FISTA": trained_by(None),
        "learn_dictionary, MSparseEncoder": trained_by(lambda D, y: MSparseEncoder(D, 30, sparsity=3)(y)),
    }
    long = {"max_iter": 20, "tol": 0.0, "max_no_improvement": None}
    for name, options in {
        "alpha 0.1": {"alpha": 0.1, "max_iter": 100},
        "alpha 0.3": {"alpha": 0.3, "max_iter": 100},
        "alpha 1": {"alpha": 1.0, "max_iter": 100},
        "alpha 0.3, 20 passes": {"alpha": 0.3, **long},
    }.items():
        learners[f"scikit-learn, {name}"] = lambda samples, seed, options=options: scikit_learn(
            samples, seed, **options
        )
    runs: dict[int, list[dict[str, dict[str, float]]]] = {}
    for count in (250, 1000, 4000):
        runs[count] = []
        for seed in tqdm(SEEDS, desc=f"modules, {count}", leave=False):
            samples, atoms = module_data(count, seed)
            row = {}
            for name, learn in learners.items():
                begin = time.process_time()
                found = learn(samples, seed)
                seconds = time.process_time() - begin
                # An atom of norm 0 is no atom; it gets a direction that means nothing.
                found = torch.where(found.norm(dim=0) > 0, found, torch.eye(32, 1))
                row[name] = {"found": int((matched_atoms(found, atoms) > 0.95).sum()), "seconds": seconds}
            runs[count].append(row)
    rows = []
    for name in learners:
        cells = []
        for per_seed in runs.values():
            found = [row[name]["found"] for row in per_seed]
            cells.append(f"{statistics.median(found):g} ({min(found)}-{max(found)})")
        rows.append([name, *cells, statistics.median(row[name]["seconds"] for row in runs[4000])])
    table(rows, ["modules found of 40, median (range)", *(f"N = {count}" for count in runs), "CPU s, N = 4000"])
    save("sketches_modules", {"modules": 40, "d": 32, "active": 3, "cosine": 0.95, "runs": runs})


# ---- Overhead --------------------------------------------------------------------------------------------------------


def overhead() -> None:
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(250, 500, generator=generator)
    net, y = LISTA(dictionary, 16, alpha=1.0), torch.randn(64, 250, generator=generator)
    # 28 x 28 pictures.
    picture = torch.rand(64, 1, 28, 28, generator=generator)
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18432, 10)]
    pictures = nn.Sequential(*layers)
    chosen = ["0", "2", "5"]

    def means(name: str, output: Tensor) -> Tensor:
        return output.flatten(2).mean(-1) if output.dim() > 2 else output

    calls: dict[str, Callable[[], Any]] = {"LISTA": lambda: net(y), "pictures": lambda: pictures(picture)}
    makers: dict[str, tuple[Callable[[Any], Any], nn.Module, Tensor]] = {
        "LISTA, Trace": (lambda net: Trace(net, default_metrics(net)), net, y),
        "LISTA, TraceSketch 256": (lambda net: TraceSketch.watch(net, default_metrics(net), d=256), net, y),
        "LISTA, TraceSketch 1024": (lambda net: TraceSketch.watch(net, default_metrics(net), d=1024), net, y),
        "pictures, NetworkSketch 1024": (
            lambda net: NetworkSketch(net, chosen, d=1024, attributes=means),
            pictures,
            picture,
        ),
    }
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for name, (make, original, x) in makers.items():
            twin = copy.deepcopy(original)  # the hooks of one must not run in another
            stack.enter_context(make(twin))
            calls[name] = lambda twin=twin, x=x: twin(x)
        seconds = interleaved(calls, repeats=15)
    rows = [
        [name, 1e3 * statistics.median(values), ratio(seconds, name, name.split(",")[0])]
        for name, values in seconds.items()
    ]
    table(rows, ["batch of 64", "CPU ms", "of plain"])
    save("sketches_overhead", {"rows": {name: {"ms": ms, "ratio": times} for name, ms, times in rows}})


# ---- Figures ---------------------------------------------------------------------------------------------------------


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"sketches_{name}.json").read_text())


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from unrolled.plot._style import COLOURS, GREY, MARKERS, style

    def line(axes: Any, x: Sequence[Any], cells: Sequence[dict[str, float]], k: int, label: str) -> None:
        axes.plot(x, [c["median"] for c in cells], color=COLOURS[k], marker=MARKERS[k], markersize=4, label=label)
        axes.fill_between(x, [c["min"] for c in cells], [c["max"] for c in cells], color=COLOURS[k], alpha=0.2, lw=0)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    flat = {int(d): cells for d, cells in load("read")["dimensions"].items()}
    for k, (name, label) in enumerate([("matched", "matched filter"), ("half", "the same, half erased")]):
        line(left, list(flat), [cells[name] for cells in flat.values()], k, label)
    deep = {int(d): cells for d, cells in load("depth")["dimensions"].items()}
    for k in (1, 2, 3):
        line(right, list(deep), [cells[f"matched, level {k}"] for cells in deep.values()], k - 1, f"level {k}")
    # Least squares lies ten decades lower: said in words, for a line there would flatten the others.
    exact = {"least squares max": flat, "least squares max, level 3": deep}
    worst = [max(c[name]["max"] for c in cells.values() if name in c) for name, cells in exact.items()]
    titles = ("Flat tuple, 16 x 8 attributes", "Nested tuples, 39 x 8 attributes")
    for axes, cells, title, error in zip((left, right), (flat, deep), titles, worst):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.axhline(SIZE**-0.5, color=GREY, lw=1, ls=":")
        axes.annotate(
            "size of the attributes", (max(cells), SIZE**-0.5), color=GREY, fontsize=7, va="bottom", ha="right"
        )
        axes.set_xlabel(f"d (least squares, where determined: at most {error:.0e})")
        axes.set_title(f"{title}: error", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        style(axes)
    figure.savefig(RESULTS / "sketches_reading.png", dpi=90)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for k, (d, cells) in enumerate(load("similarity")["dimensions"].items()):
        line(left, range(11), list(cells["cosines"].values()), k, f"d = {d}")
    left.plot([0, 10], [0, 1], color=GREY, lw=1, ls=":")
    left.set_xlabel("objects in common, of 10")
    left.set_title("Similarity of two sketches", loc="left", fontsize=10)
    few = load("sparse")["kept"]
    for k, (name, label) in enumerate([("sparse, exact", "sparse coder"), ("matched, exact", "matched filter")]):
        line(middle, [int(d) for d in few], [cells[name] for cells in few.values()], k, label)
    middle.set_xlabel("numbers kept, for 512 unknowns with 10 nonzeros")
    middle.set_title("Share of samples read exactly", loc="left", fontsize=10)
    runs = load("modules")["runs"]
    best = {"learn_dictionary, FISTA": "learn_dictionary", "scikit-learn": "scikit-learn, best alpha"}
    for k, (prefix, label) in enumerate(best.items()):
        found = [
            [max(v["found"] for n, v in row.items() if n.startswith(prefix)) for row in rows] for rows in runs.values()
        ]
        line(right, [int(count) for count in runs], [spread(values) for values in found], k, label)
    right.set_xscale("log")
    right.set_xticks([int(count) for count in runs], list(runs))
    right.minorticks_off()
    right.set_ylim(0, 41)
    right.set_xlabel("sketches seen")
    right.set_title("Modules found, of 40", loc="left", fontsize=10)
    for axes in (left, middle, right):
        style(axes)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "sketches_comparing.png", dpi=90)


PARTS = {
    "read": read,
    "depth": depth,
    "similarity": similar,
    "counts": counts,
    "sparse": sparse,
    "modules": modules,
    "overhead": overhead,
    "plot": plot,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], help="what to run, everything by default")
    chosen = parser.parse_args().parts or list(PARTS)
    torch.set_num_threads(1)
    for name in chosen:
        print(f"\n{name}")
        PARTS[name]()


if __name__ == "__main__":
    main()
