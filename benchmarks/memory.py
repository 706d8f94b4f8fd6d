"""Claim: `Checkpointed(4)` keeps at most an eighth of the bytes of `Backprop` at 32 layers, for equal gradients.

Factored LISTA on 64x256, batch 64, float32. "Kept" are the bytes that autograd holds when the forward pass is done,
each storage counted once, parameters left out. "Window" are the bytes of the layers that the backward pass then
recomputes at a time: the peak is the two together.

    python benchmarks/memory.py
"""

from __future__ import annotations

import time
from typing import Any

import torch
from _common import save, table
from torch import Tensor
from torch.nn.functional import normalize

from unrolled import LISTA, Backprop, Checkpointed, Truncated

K = 32


def kept_bytes(net: LISTA, y: Tensor) -> tuple[int, Tensor]:
    """Bytes saved for backward by a forward pass, and its loss."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(y).square().sum()
    return sum(saved.values()), loss


def measure(strategy: Any, seed: int) -> tuple[int, int, float, list[Tensor]]:
    torch.manual_seed(seed)
    dictionary = normalize(torch.randn(64, 256), dim=0)
    net = LISTA(dictionary, K, alpha=0.1, factored=True, gradient=strategy)
    y = torch.randn(64, 64)
    window = 0
    if isinstance(strategy, Checkpointed):
        net.gradient = Backprop()
        window, _ = kept_bytes(net[: strategy.every], y)
        net.gradient = strategy
    kept, loss = kept_bytes(net, y)
    # A layer whose parameters are out of a truncated graph has no gradient: None counts as zero.
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(net.parameters(), gradients, strict=True)]
    begin = time.process_time()
    for _ in range(5):
        net.zero_grad()
        net(y).square().sum().backward()
    return kept, window, (time.process_time() - begin) / 5, filled


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for seed in range(3):
        reference = measure(Backprop(), seed)
        for strategy in (Backprop(), Checkpointed(4), Checkpointed(8), Truncated(4)):
            kept, window, seconds, gradients = measure(strategy, seed)
            pairs = zip(gradients, reference[3], strict=True)
            rows.append(
                {
                    "strategy": repr(strategy),
                    "seed": seed,
                    "kept, KiB": kept / 1024,
                    "of Backprop": kept / reference[0],
                    "kept + window of Backprop": (kept + window) / reference[0],
                    "forward + backward, CPU ms": 1e3 * seconds,
                    "largest relative gradient error": max(
                        float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs
                    ),
                }
            )
    table([list(row.values()) for row in rows], list(rows[0]))
    save("memory", {"layers": K, "size": "64x256", "batch": 64, "rows": rows})


if __name__ == "__main__":
    main()
