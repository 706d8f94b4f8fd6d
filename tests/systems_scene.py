"""The rows of the contract suite for networks that halt by what they learned, see `systems.py`.

They meet most lines, but not all: `UNFIT` says which not, and why. `test_air.py` runs the suite's lines on them.
"""

from __future__ import annotations

from typing import Any

import torch
from systems import ALPHA, BAD_SIGNALS, DICTIONARY, FROM_ZERO, System, _signals
from torch import Tensor

from unrolled import LISTA, Unroll, solvers
from unrolled.scene import AIR
from unrolled.stopping import Halting, Settling

RTOL = 0.2  # the three signals of the suite use 3, 4 and 5 of 5 iterations


def _halting(num_iters: int = 5, **options: Any) -> Unroll:
    return LISTA(DICTIONARY, num_iters, alpha=ALPHA, stop=Halting(Settling(RTOL)), **options).double()


def _stopped_ista(num_iters: int, y: Tensor) -> Tensor:
    """ISTA, one signal at a time, until its code has settled."""
    codes = []
    for signal in y:
        before = torch.zeros(DICTIONARY.shape[1], dtype=y.dtype)
        for k in range(1, num_iters + 1):
            code = solvers.ista(DICTIONARY, signal, ALPHA, num_iters=k)
            if (code - before).norm() <= RTOL * code.norm():
                break
            before = code
        codes.append(code)
    return torch.stack(codes)


def _air(num_iters: int = 5, **options: Any) -> Unroll:
    torch.manual_seed(0)
    net = AIR((7, 6), num_iters, glimpse=3, what_dim=2, hidden=5, dtype=torch.float64, **options)
    with torch.no_grad():
        for step in net.steps:
            step.outer.bias[0] = 9.0  # untrained, and perturbed by the suite, it finds as many objects as it may
    return net


def _canvases(batch: int) -> tuple[Tensor]:
    return (torch.rand(batch, 1, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)


def _no_solver(num_iters: int, x: Tensor) -> Tensor:
    raise NotImplementedError("AIR unrolls no classical algorithm")


SCENE_SYSTEMS = [
    System("LISTA that halts", _halting, _signals, _stopped_ista, BAD_SIGNALS, {"steps.0.inhibition": FROM_ZERO}),
    System(
        "AIR",
        _air,
        _canvases,
        _no_solver,
        {
            "shape": ((torch.rand(3, 1, 6, 7).double(),), ValueError, "x must have shape"),
            "range": ((2 * torch.ones(3, 1, 7, 6).double(),), ValueError, r"x must lie in \[0, 1\]"),
            "dtype": ((torch.rand(3, 1, 7, 6),), TypeError, "x is torch.float32"),
            "nan": ((torch.full((3, 1, 7, 6), torch.nan).double(),), ValueError, "x has 126 NaN or infinite"),
        },
    ),
]

NO_GRADIENT = "a decision has no derivative, so the call gives the head none; `ExpectedLoss` does, see test_halting.py"
UNFIT: dict[str, dict[str, str]] = {
    "LISTA that halts": {
        "test_every_parameter_learns": NO_GRADIENT,
        "test_vmap_and_per_sample_gradients": NO_GRADIENT,
        "test_exact_gradient_strategies": NO_GRADIENT,
        "test_untied_layers_have_storages_of_their_own": "it counts the steps' parameters; the head's are the rule's",
        "test_slices_are_the_first_iterations": "a sample that has stopped goes on when the second half is run",
    },
    "AIR": {
        "test_untrained_is_the_classical_solver": "it unrolls no classical algorithm; test_air.py has a plain loop",
        "test_every_parameter_learns": "the last layer's LSTM and all presence logits only matter in `loss`",
        "test_stopping_does_not_depend_on_batch_mates": "a canvas grows by whole objects and settles by no tolerance",
    },
}
