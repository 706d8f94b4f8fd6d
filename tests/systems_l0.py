"""The rows of the contract suite for the deep l0 encoders, see `systems.py`.

`L0Encoder` stands here with a slope. Without one it is `solvers.iht_penalized`, and no gradient reaches its thresholds,
which the suite asks of every parameter of a tied network: `test_l0.py` holds that form against the solver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from systems import BAD_SIGNALS, DICTIONARY, FROM_ZERO, System, _signals
from torch import Tensor

from unrolled import Unroll, solvers
from unrolled.sparse.l0 import L0Encoder, MSparseEncoder

PRICE, SPARSITY = 0.4, 3
SLOPE = 0.7  # a wide ramp, so that in every layer there is a code on it
STILL = {"steps.0.inhibition": FROM_ZERO}


def _sparse(num_iters: int, y: Tensor) -> Tensor:
    return solvers.iht(DICTIONARY, y, SPARSITY, num_iters=num_iters)


def _ramp(num_iters: int, y: Tensor) -> Tensor:
    """Hard thresholding through T HELU(z / T), the HELU piece by piece."""
    L = torch.linalg.matrix_norm(DICTIONARY, 2) ** 2
    T = (2 * PRICE / L).sqrt()
    x = y.new_zeros(len(y), DICTIONARY.shape[1])
    for _ in range(num_iters):
        u = (x + (y - x @ DICTIONARY.T) @ DICTIONARY / L) / T
        pieces = [
            (u.abs() >= 1, u),
            ((u > 1 - SLOPE) & (u < 1), (u - 1 + SLOPE) / SLOPE),
            ((u < SLOPE - 1) & (u > -1), (u + 1 - SLOPE) / SLOPE),
        ]
        x = T * sum(torch.where(where, value, 0.0) for where, value in pieces)
    return x


def _row(
    name: str,
    network: Callable[..., Unroll],
    fixed: dict[str, Any],
    reference: Callable[..., Tensor],
) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        return network(DICTIONARY, num_iters, **{**fixed, **options})

    return System(name, make, _signals, reference, BAD_SIGNALS, STILL)


L0_SYSTEMS = [
    _row("deep l0", L0Encoder, {"alpha": PRICE, "slope": SLOPE}, _ramp),
    _row("deep l0 tied", L0Encoder, {"alpha": PRICE, "slope": SLOPE, "tied": True}, _ramp),
    _row("deep l0 one weight", L0Encoder, {"alpha": PRICE, "slope": SLOPE, "tied": ("weight",)}, _ramp),
    _row("M-sparse", MSparseEncoder, {"sparsity": SPARSITY}, _sparse),
    _row("M-sparse tied", MSparseEncoder, {"sparsity": SPARSITY, "tied": True}, _sparse),
]
