"""The rows of the contract suite for the low-rank encoders, see `systems.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from systems import FROM_ZERO, System, _randn
from torch import Tensor

from unrolled import Unroll, solvers
from unrolled.lowrank import NMFEncoder, RobustNMFEncoder, RPCAEncoder
from unrolled.solvers import Decomposition

RIDGE, ALPHA = 0.6, 0.5
DICTIONARY = 0.8 * _randn(6, 3)
POSITIVE = DICTIONARY.abs()


class Joined:
    """An encoder whose answer is one tensor, the parts side by side, as the suite asks for."""

    def forward(self, x: Tensor, *, state: Decomposition | None = None, num_iters: int | None = None) -> Tensor:
        return torch.cat(super().forward(x, state=state, num_iters=num_iters), dim=-1)

    def iterates(self, x: Tensor, *, state: Decomposition | None = None, num_iters: int | None = None) -> list[Tensor]:
        return [torch.cat(parts, dim=-1) for parts in super().iterates(x, state=state, num_iters=num_iters)]


class JoinedRPCA(Joined, RPCAEncoder):
    pass


class JoinedRobustNMF(Joined, RobustNMFEncoder):
    pass


def _signals(batch: int) -> tuple[Tensor]:
    return (3 * _randn(batch, 6, seed=1),)


def _magnitudes(batch: int) -> tuple[Tensor]:
    return (3 * _randn(batch, 6, seed=1).abs(),)


def _separate(dictionary: Tensor, nonnegative: bool) -> Callable[..., Tensor]:
    def solve(num_iters: int, x: Tensor) -> Tensor:
        options: dict[str, Any] = {"ridge": RIDGE, "alpha": ALPHA, "nonnegative": nonnegative}
        return torch.cat(solvers.separate(dictionary, x, num_iters=num_iters, **options), dim=-1)

    return solve


def _nonnegative_ista(num_iters: int, x: Tensor) -> Tensor:
    return solvers.nonnegative_ista(POSITIVE, x, ALPHA, num_iters=num_iters)


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "length": ((_randn(3, 7),), ValueError, r"x must have shape \(\.\.\., 6\)"),
    "dtype": ((_randn(3, 6).float(),), TypeError, "x is torch.float32"),
    "complex": ((_randn(3, 6, dtype=torch.complex128),), TypeError, "x must be floating point"),
    "integers": ((torch.ones(3, 6, dtype=torch.long),), TypeError, "x must be floating point"),
    "no tensor": (([[1.0] * 6],), TypeError, "x must be a torch.Tensor"),
    "nan": ((torch.full((3, 6), torch.nan).double(),), ValueError, "x has 18 NaN or infinite"),
    "empty": ((torch.empty(0, 6).double(),), ValueError, "x is empty"),
    "device": ((torch.empty(3, 6, dtype=torch.float64, device="meta"),), ValueError, "x is on meta"),
}


def _row(
    name: str,
    network: Callable[..., Unroll],
    dictionary: Tensor,
    fixed: dict[str, Any],
    reference: Callable[..., Tensor],
    dead: dict[str, str] | None = None,
) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        return network(dictionary, num_iters, alpha=ALPHA, **{**fixed, **options})

    inputs = _signals if network is JoinedRPCA else _magnitudes
    return System(name, make, inputs, reference, BAD, dead or {})


FREE, POSITIVE_PARTS = _separate(DICTIONARY, False), _separate(POSITIVE, True)
FIRST = {"steps.0.raw_dictionary": FROM_ZERO}

LOWRANK_SYSTEMS = [
    _row("robust PCA encoder", JoinedRPCA, DICTIONARY, {"ridge": RIDGE}, FREE),
    _row("robust PCA encoder tied", JoinedRPCA, DICTIONARY, {"ridge": RIDGE, "tied": True}, FREE),
    _row("robust PCA encoder one dictionary", JoinedRPCA, DICTIONARY, {"ridge": RIDGE, "tied": ("dictionary",)}, FREE),
    _row("robust NMF encoder", JoinedRobustNMF, POSITIVE, {"ridge": RIDGE}, POSITIVE_PARTS),
    _row("robust NMF encoder tied", JoinedRobustNMF, POSITIVE, {"ridge": RIDGE, "tied": True}, POSITIVE_PARTS),
    _row("NMF encoder", NMFEncoder, POSITIVE, {}, _nonnegative_ista, FIRST),
    _row("NMF encoder one dictionary", NMFEncoder, POSITIVE, {"tied": ("raw_dictionary",)}, _nonnegative_ista, FIRST),
]
