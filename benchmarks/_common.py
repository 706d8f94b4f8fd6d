"""What the benchmarks share: interleaved timings, tables, and JSON with what is needed to read them."""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import unrolled

RESULTS = Path(__file__).parent / "results"


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each function, called in turn `repeats` times, so that a drift of the machine hits all alike."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            seconds[name].append(time.process_time() - begin)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Median of the pairwise ratios."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Meter:
    """Peak bytes of what autograd holds at a time while something runs, each storage once, without `ignored`."""

    def __init__(self, *ignored: Tensor) -> None:
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.counts: dict[int, int] = {}
        self.now = self.peak = 0

    class _Handle:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # with its past it would keep the node alive that saved it

    def _pack(self, tensor: Tensor) -> _Handle:
        handle = self._Handle(tensor)
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.ignored:
            self.counts[key] = self.counts.get(key, 0) + 1
            self.now += size if self.counts[key] == 1 else 0
            self.peak = max(self.peak, self.now)
            weakref.finalize(handle, self._drop, key, size)
        return handle

    def _drop(self, key: int, size: int) -> None:
        self.counts[key] -= 1
        if self.counts[key] == 0:
            self.now -= size

    def __call__(self, run: Callable[[], Any]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda handle: handle.tensor):
            run()
        return self.peak


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> None:
    """Print rows in aligned columns: text to the left, numbers to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for index, row in enumerate(cells):
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
        if index == 0:
            print("  ".join("-" * width for width in widths))


def save(name: str, result: Mapping[str, Any]) -> None:
    """Write benchmarks/results/NAME.json with the versions and the machine."""
    RESULTS.mkdir(exist_ok=True)
    context = {
        "versions": {"unrolled": unrolled.__version__}
        | {package: metadata.version(package) for package in ("torch", "numpy", "scikit-learn")},
        "python": platform.python_version(),
        "machine": _processor(),
        "threads": torch.get_num_threads(),
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**context, **result}, indent=1) + "\n")
    print(f"\nwritten: {path.relative_to(Path(__file__).parent.parent)}")


def load_example(name: str) -> ModuleType:
    """The script examples/NAME.py as a module, for benchmarks that measure what it shows."""
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
