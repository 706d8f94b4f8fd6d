"""Claim: `Unroll` costs no more than a loop written by hand, and a LISTA forward little more than its matrix products.

LISTA, 16 layers, one thread; CPU seconds of interleaved calls, median of the pairwise ratios. Both forms are timed at
250x500 and at 64x256 (8x8 patches) without gradient, at three batch sizes; the loop by hand also forward + backward.

glibc's allocator is told to keep freed memory (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_): by default it gives
buffers of megabytes back to the system in every layer and fetches them again, page by page. That takes up to a fifth of
the time, for the loop by hand and the network alike, and hides what is compared here. `--default-allocator` leaves it.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

import torch
from _common import interleaved, ratio, save, spread, table
from torch import Tensor
from torch.nn.functional import linear, normalize

from unrolled import LISTA
from unrolled.functional import soft_threshold

K = 16


def by_hand(net: LISTA, y: Tensor) -> Tensor:
    """The loop that a user would write for the published form, with the same parameters and the same threshold."""
    layers = [net[k] for k in range(K)]
    if net.tied:
        step = layers[0]
        drive, theta = linear(y, step.weight), step.log_theta.exp()
        x = torch.zeros_like(drive)
        for _ in range(K):
            x = soft_threshold(torch.addmm(drive, x, step.inhibition.mT), theta, inplace=True)
        return x
    x = y.new_zeros(len(y), len(layers[0].weight))
    for step in layers:
        x = soft_threshold(
            torch.addmm(linear(y, step.weight), x, step.inhibition.mT), step.log_theta.exp(), inplace=True
        )
    return x


def bare_products(net: LISTA, factored: bool, y: Tensor) -> Tensor:
    """Nothing but the matrix products of the published equations, that of the first code (zeros) among them."""
    layers = [net[k] for k in range(K)]
    if factored:
        x = y.new_zeros(len(y), len(layers[0].weight))
        for step in layers:
            x = linear(linear(x, step.dictionary), step.weight)
        return x
    x = linear(y, layers[0].weight)
    for k, step in enumerate(layers):
        if k > 0 and not net.tied:
            linear(y, step.weight)
        x = linear(x, step.inhibition)
    return x


def backward(call: Callable[[], Tensor], net: LISTA) -> Callable[[], None]:
    def run() -> None:
        net.zero_grad(set_to_none=True)
        call().square().sum().backward()

    return run


KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


def main() -> None:
    if "--default-allocator" not in sys.argv and not KEEP_MEMORY.items() <= os.environ.items():
        # glibc reads them when a process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, records = [], []

    def report(what: str, size: str, batch: int, name: str, base: str, seconds: dict[str, list[float]]) -> None:
        value = ratio(seconds, name, base)
        rows.append([what, size, batch, f"{name} / {base}", value, 1e3 * spread(seconds[name])["median"]])
        records.append(
            {"what": what, "size": size, "batch": batch, "ratio": f"{name} / {base}", "value": value}
            | {f"seconds {which}": spread(seconds[which]) for which in (name, base)}
        )

    for m, n in ((250, 500), (64, 256)):
        dictionary = normalize(torch.randn(m, n), dim=0)
        nets = {
            (tied, factored): LISTA(dictionary, K, alpha=0.1, tied=tied, factored=factored)
            for tied in (True, False)
            for factored in (True, False)
        }
        for batch in (64, 512, 4096):
            y = torch.randn(batch, m)
            repeats = {64: 51, 512: 21, 4096: 15}[batch]
            size = f"{m}x{n}"
            for tied in (True, False):
                word = "tied" if tied else "untied"
                published, factored = nets[tied, False], nets[tied, True]
                with torch.no_grad():
                    seconds = interleaved(
                        {
                            "published": partial(published, y),
                            "by hand": partial(by_hand, published, y),
                            "its products": partial(bare_products, published, False, y),
                            "factored": partial(factored, y),
                            "the factored products": partial(bare_products, factored, True, y),
                        },
                        repeats,
                    )
                report(f"forward, {word}", size, batch, "published", "by hand", seconds)
                report(f"forward, {word}", size, batch, "published", "its products", seconds)
                report(f"forward, {word}", size, batch, "factored", "the factored products", seconds)
                report(f"forward, {word}", size, batch, "factored", "published", seconds)
                if batch == 64:
                    seconds = interleaved(
                        {
                            "published": backward(partial(published, y), published),
                            "by hand": backward(partial(by_hand, published, y), published),
                        },
                        repeats,
                    )
                    report(f"forward + backward, {word}", size, batch, "published", "by hand", seconds)
    table(rows, ["what", "size", "batch", "ratio of", "ratio", "ms"])
    name = "overhead_default_allocator" if "--default-allocator" in sys.argv else "overhead"
    save(name, {"layers": K, "seed": 0, "rows": records})


if __name__ == "__main__":
    main()
