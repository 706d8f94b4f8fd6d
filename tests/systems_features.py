"""The rows of the contract suite for sparse coding networks with a memory, see `systems.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from systems import ALPHA, BAD_SIGNALS, DICTIONARY, FROM_ZERO, System, _ista, _randn, _signals
from torch import Tensor

from unrolled import Unroll
from unrolled.sparse.adaptive import AdaptiveISTA
from unrolled.sparse.sc2net import CentredGates, SC2Net, SigmoidGates

EMPTY_CELL = "the first layer's cell is empty, so it makes no difference how much of it is kept"
BAD_REAL: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    **BAD_SIGNALS,
    "complex": ((_randn(3, 6, dtype=torch.complex128),), TypeError, "y must be floating point, got torch.complex128"),
}


RELAXATION = 1.6


def _relaxed(num_iters: int, y: Tensor) -> Tensor:
    """ISTA's step on the point before the threshold, c+ = c + omega (T(c) - c), with its matrices written out."""
    L = torch.linalg.matrix_norm(DICTIONARY, 2) ** 2
    c = y.new_zeros(len(y), DICTIONARY.shape[1])

    def shrink(c: Tensor) -> Tensor:
        return c.sign() * (c.abs() - ALPHA / L).clamp(min=0)

    for _ in range(num_iters):
        x = shrink(c)
        c = c + RELAXATION * (x + (y - x @ DICTIONARY.T) @ DICTIONARY / L - c)
    return shrink(c)


def _row(
    name: str,
    network: Callable[..., Unroll],
    fixed: dict[str, Any],
    dead: dict[str, str],
    reference: Callable[..., Tensor] = _ista,
) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        return network(DICTIONARY, num_iters, alpha=ALPHA, **{**fixed, **options})

    return System(name, make, _signals, reference, BAD_REAL, dead)


FEATURE_SYSTEMS = [
    _row("AdaptiveISTA", AdaptiveISTA, {}, {"steps.0.inhibition": FROM_ZERO, "steps.0.atanh_forget": EMPTY_CELL}),
    _row(
        "AdaptiveISTA scalar gates",
        AdaptiveISTA,
        {"scalar_gates": True},
        {"steps.0.inhibition": FROM_ZERO, "steps.0.atanh_forget": EMPTY_CELL},
    ),
    *(
        _row(
            f"SC2Net {name}",
            SC2Net,
            fixed,
            {"steps.0.inhibition": FROM_ZERO, "steps.0.gate_inhibition": FROM_ZERO},
        )
        for name, fixed in {
            "tied": {},
            "untied": {"tied": False},
            "scalar gates": {"gates": CentredGates(scalar=True)},
            # float64 rounds sigmoid(37) to 1 - 1e-16; at 27 the gates are within 2e-12 of ISTA's and still learn.
            "published gates": {"gates": SigmoidGates(saturation=27.0)},
        }.items()
    ),
    _row(
        "SC2Net relaxed, biases of their own",
        SC2Net,
        {
            "gates": CentredGates(relaxation=RELAXATION),
            "tied": ("weight", "inhibition", "gate_weight", "gate_inhibition", "log_theta"),
        },
        {"steps.0.inhibition": FROM_ZERO, "steps.0.gate_inhibition": FROM_ZERO},
        _relaxed,
    ),
]
