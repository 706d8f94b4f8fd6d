"""The row of the contract suite for the walk down a boundary tree, see `systems.py`.

The reference walks recursively, sample by sample, over lists of children; nothing is shared with the step. The tree is
fixed: random examples, deep enough for five levels.

`NOT_HELD` are the lines of the suite that a walk cannot hold, with the reasons; `test_boundary_tree.py` runs the rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from systems import System, _randn
from torch import Tensor, nn

from unrolled import Unroll
from unrolled.neighbours import BoundaryTreeStep

D, CLASSES, K, SIGMA = 4, 3, 2, 2.5
WEIGHT = 0.8 * _randn(5, D, seed=1)
EXAMPLES = 1.2 * _randn(12, D, seed=2)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 1, 0, 2, 1, 0, 2])
PARENTS = torch.tensor([-1, 0, 0, 1, 2, 3, 3, 4, 5, 7, 8, 8])

NOT_HELD = {
    "test_stopping_does_not_depend_on_batch_mates": "a walk ends by itself: a tolerance has nothing left to stop early",
    "test_every_parameter_learns": "untied, the encoders of the levels below a sample's end have no part in its answer",
}


class Encoder(nn.Module):
    """f(x) = tanh(W x): no offset, of which distances do not depend."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.mT)


def make(num_iters: int = 5, **options: Any) -> Unroll:
    step = BoundaryTreeStep(Encoder(), CLASSES, k=K, sigma=SIGMA)
    step.set_tree(EXAMPLES, LABELS, PARENTS)
    return Unroll(step, num_iters, **options)


def inputs(batch: int) -> tuple[Tensor]:
    return (1.5 * _randn(batch, D, seed=3),)


def reference(num_iters: int, x: Tensor) -> Tensor:
    """The definition: who is nearest among a node and its children, and what the last group says of the classes."""
    children = [[j for j, parent in enumerate(PARENTS.tolist()) if parent == i] for i in range(len(PARENTS))]
    features = [torch.tanh(WEIGHT @ example) for example in EXAMPLES]

    def walk(node: int, own: Tensor, path: float, levels: int) -> list[float]:
        group = children[node] if len(children[node]) == K else [node, *children[node]]
        weights = {j: math.exp(-float((features[j] - own).square().sum()) / SIGMA) for j in group}
        p = {j: weight / sum(weights.values()) for j, weight in weights.items()}
        best = max(group, key=lambda j: p[j])
        if best == node or not children[best] or levels == 1:
            return [math.log(path * sum(p[j] for j in group if LABELS[j] == c) + 1e-12) for c in range(CLASSES)]
        return walk(best, own, path * p[best], levels - 1)

    return torch.tensor([walk(0, torch.tanh(WEIGHT @ row), 1.0, num_iters) for row in x], dtype=x.dtype)


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "length": ((_randn(3, 7),), ValueError, r"x must have shape \(\.\.\., 4\)"),
    "dtype": ((_randn(3, D).float(),), TypeError, "x is torch.float32"),
    "integers": ((torch.ones(3, D, dtype=torch.long),), TypeError, "x must be floating point"),
    "no tensor": (([[1.0] * D],), TypeError, "x must be a torch.Tensor"),
    "nan": ((torch.full((3, D), torch.nan).double(),), ValueError, "x has 12 NaN or infinite"),
    "empty": ((torch.empty(0, D).double(),), ValueError, "x is empty"),
    "device": ((torch.empty(3, D, dtype=torch.float64, device="meta"),), ValueError, "x is on meta"),
}

NEIGHBOUR_SYSTEMS = [System("boundary tree", make, inputs, reference, BAD)]
