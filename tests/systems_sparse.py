"""The rows of the contract suite for sparse recovery, see `systems.py`. References are written with plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from systems import ALPHA, BAD_SIGNALS, DICTIONARY, FROM_REST, FROM_ZERO, System, _fista, _ista, _randn, _signals
from torch import Tensor

from unrolled import Unroll, solvers
from unrolled.operators import Boundary, Convolution
from unrolled.sparse import (
    ALISTA,
    GLISTA,
    LAMP,
    LFISTA,
    LISTACP,
    NAALISTA,
    HyperLISTA,
    StepLISTA,
    SupportSelection,
    TiLISTA,
    analytic_weight,
    inverse_gate,
)

SELECTION = SupportSelection(rate=12.0, maximum=40.0)  # of 10 entries: 1, 2, 4, 4, ...
STRONG = 8.0  # alpha: selected entries are not shrunk, so that it takes more to make the iteration settle
THETA = float(STRONG / solvers.lipschitz(DICTIONARY))
CLOSED = "a gate that begins closed makes no difference to codes of zero"
STAYS = {"steps.0.gain": CLOSED, "steps.0.log_slope": CLOSED}


def select(z: Tensor, theta: Tensor, counts: list[int]) -> Tensor:
    """Support selection sample by sample, entry by entry."""
    rows = []
    for row, threshold, count in zip(z.unbind(), theta.expand(len(z)).tolist(), counts, strict=True):
        largest = sorted(range(len(row)), key=lambda i: -abs(float(row[i])))[:count]
        rows.append(
            [
                v if i in largest and abs(v) >= threshold else max(v - threshold, 0) + min(v + threshold, 0)
                for i, v in enumerate(row.tolist())
            ]
        )
    return torch.tensor(rows, dtype=z.dtype)


def _selecting(weight: Tensor) -> Callable[..., Tensor]:
    """x+ = SS(x + W'(y - A x)) with the percentages above."""

    def solve(num_iters: int, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), DICTIONARY.shape[1])
        for k in range(1, num_iters + 1):
            z = x + (y - x @ DICTIONARY.T) @ weight
            x = select(z, z.new_tensor(THETA), [round(min(12 * k, 40) / 100 * 10)] * len(y))
        return x

    return solve


UNIT = torch.nn.functional.normalize(_randn(6, 10, seed=5), dim=0)


HYPER = {"c1": 0.1, "c2": 0.02, "c3": 0.1}


def _hyper(symmetric: bool) -> Callable[..., Tensor]:
    """HyperLISTA by the eigenvalues of A A', where the network uses the singular value decomposition of A."""
    A, c1, c2, c3 = UNIT, *HYPER.values()
    values, vectors = torch.linalg.eigh(A @ A.T)
    M = vectors / values @ vectors.T
    if symmetric:
        G = (10 / 6) ** 0.5 * vectors / values.sqrt() @ vectors.T
        A = W = G @ A
    else:
        W = M @ A / (A * (M @ A)).sum(0)
    inverse = A.T @ torch.linalg.inv(A @ A.T)

    def solve(num_iters: int, y: Tensor) -> Tensor:
        y = y @ G.T if symmetric else y
        x = previous = y.new_zeros(len(y), 10)
        for _ in range(num_iters):
            e = ((y - x @ A.T) @ inverse.T).abs().sum(1)
            p = (c3 * ((y @ inverse.T).abs().sum(1) / e).log()).clamp(0, 1)
            beta = c2 * (x != 0).sum(1, keepdim=True).to(y)
            z = x + (y - x @ A.T) @ W + beta * (x - previous)
            x, previous = select(z, c1 * e, (10 * p).round().int().tolist()), x
        return x

    return solve


# ---- Convolutional: 3 maps of 7 entries, a signal of 7 ---------------------------------------------------------------

KERNEL = 0.8 * _randn(1, 3, 3, seed=6)


def _convolution() -> Convolution:
    return Convolution(KERNEL, in_shape=(3, 7), boundary=Boundary.CIRCULAR)


def _short_signals(batch: int) -> tuple[Tensor]:
    return (_randn(batch, 1, 7, seed=7),)


def _convolutional_ista(num_iters: int, y: Tensor) -> Tensor:
    """ISTA with the convolution as the matrix that it is."""
    matrix = _convolution()(torch.eye(21, dtype=torch.float64).reshape(21, 3, 7)).flatten(1).T
    x = y.new_zeros(len(y), 21)
    L = torch.linalg.matrix_norm(matrix, 2) ** 2
    for _ in range(num_iters):
        z = x + (y.flatten(1) - x @ matrix.T) @ matrix / L
        x = z.sign() * (z.abs() - ALPHA / L).clamp(min=0)
    return x.reshape(-1, 3, 7)


BAD_SHORT: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "length": ((_randn(3, 1, 8),), ValueError, r"y must have shape \(\.\.\., 1, 7\)"),
    "dtype": ((_randn(3, 1, 7).float(),), TypeError, "y is torch.float32"),
    "nan": ((torch.full((3, 1, 7), torch.nan).double(),), ValueError, "y has 21 NaN or infinite"),
}


# ---- Rows ------------------------------------------------------------------------------------------------------------


def _row(
    name: str,
    network: Callable[..., Unroll],
    fixed: dict[str, Any],
    reference: Callable[..., Tensor],
    dead: dict[str, str] | None = None,
    *,
    dictionary: Tensor | Callable[[], Any] = DICTIONARY,
    inputs: Callable[[int], tuple[Tensor, ...]] = _signals,
    bad: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = BAD_SIGNALS,
) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        torch.manual_seed(0)  # NA-ALISTA starts its LSTM at random
        A = dictionary if isinstance(dictionary, Tensor) else dictionary()
        return network(A, num_iters, **{**fixed, **options})

    return System(name, make, inputs, reference, bad, dead or {})


def _amp(num_iters: int, y: Tensor) -> Tensor:
    return solvers.amp(UNIT, y, num_iters=num_iters, threshold=1.6)


COUPLED = 1.2 * DICTIONARY / solvers.lipschitz(DICTIONARY)
ANALYTIC = 0.6 * analytic_weight(DICTIONARY)  # a step size of 1 oscillates on codes that are not sparse

SYSTEMS = [
    _row("LISTA-CP", LISTACP, {"alpha": ALPHA}, _ista),
    _row("LISTA-CP tied", LISTACP, {"alpha": ALPHA, "tied": True}, _ista),
    _row("LISTA-CP one weight", LISTACP, {"alpha": ALPHA, "tied": ("weight",)}, _ista),
    _row("LISTA-CP momentum", LISTACP, {"alpha": ALPHA, "momentum": True}, _fista, {"steps.0.offset": FROM_REST}),
    _row(
        "LISTA-CPSS",
        LISTACP,
        {"alpha": STRONG, "support_selection": SELECTION, "weight": COUPLED},
        _selecting(COUPLED),
    ),
    _row("TiLISTA", TiLISTA, {"alpha": ALPHA, "support_selection": None}, _ista),
    _row("ALISTA", ALISTA, {"alpha": STRONG, "support_selection": SELECTION, "weight": ANALYTIC}, _selecting(ANALYTIC)),
    _row(
        "ALISTA tied",
        ALISTA,
        {"alpha": STRONG, "support_selection": SELECTION, "weight": ANALYTIC, "tied": True},
        _selecting(ANALYTIC),
    ),
    _row(
        "NA-ALISTA",
        NAALISTA,
        {"alpha": STRONG, "support_selection": SELECTION, "weight": ANALYTIC, "hidden": 4},
        _selecting(ANALYTIC),
    ),
    _row("GLISTA", GLISTA, {"alpha": ALPHA}, _ista, STAYS),
    _row(
        "GLISTA selecting",
        GLISTA,
        {"alpha": STRONG, "gate": inverse_gate, "support_selection": SELECTION, "weight": COUPLED},
        _selecting(COUPLED),
        STAYS,
    ),
    _row(
        "LFISTA",
        LFISTA,
        {"alpha": ALPHA},
        _fista,
        {"steps.0.inhibition": FROM_ZERO, "steps.0.inertia": FROM_ZERO, "steps.1.inertia": FROM_ZERO},
    ),
    _row("Step-LISTA", StepLISTA, {"alpha": ALPHA}, _ista),
    _row("Step-LISTA momentum", StepLISTA, {"alpha": ALPHA, "momentum": True}, _fista, {"steps.0.offset": FROM_REST}),
    _row("LAMP", LAMP, {"threshold": 1.6}, _amp, dictionary=UNIT),
    _row("HyperLISTA", HyperLISTA, HYPER, _hyper(True), {"steps.0.log_c2": FROM_REST}, dictionary=UNIT),
    _row(
        "HyperLISTA not symmetric",
        HyperLISTA,
        {**HYPER, "symmetric": False, "tied": False},
        _hyper(False),
        {"steps.0.log_c2": FROM_REST},
        dictionary=UNIT,
    ),
    _row(
        "convolutional Step-LISTA",
        StepLISTA,
        {"alpha": ALPHA},
        _convolutional_ista,
        dictionary=_convolution,
        inputs=_short_signals,
        bad=BAD_SHORT,
    ),
    _row(
        "convolutional LISTA-CP",
        LISTACP,
        {"alpha": ALPHA},
        _convolutional_ista,
        dictionary=_convolution,
        inputs=_short_signals,
        bad=BAD_SHORT,
    ),
]
