"""The rows of the contract suite for dense CRFs, see `systems.py`. References are written with dense matrices.

Rows hold what every line asks for. `Permutohedral` cannot: it has no gradients to the image, and its vertices are
counted while it runs, so that `torch.vmap`, `torch.export` and `fullgraph=True` cannot take it. `test_crf_meanfield.py`
runs every other line over `LATTICE`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from systems import System, _randn
from torch import Tensor

from unrolled import Unroll, solvers
from unrolled.crf import (
    Bilateral,
    Compatibility,
    ConvWindow,
    CRFasRNN,
    Exact,
    Kernel,
    Normalization,
    Permutohedral,
    SeparableSpatial,
    Spatial,
    Weights,
)

L, C, SIZE = 3, 2, (4, 5)


def _inputs(batch: int) -> tuple[Tensor, Tensor]:
    return _randn(batch, L, *SIZE, seed=1), 20 * _randn(batch, C, *SIZE, seed=2)


def _volumes(batch: int) -> tuple[Tensor, Tensor]:
    return _randn(batch, L, 2, 3, 2, seed=1), 20 * _randn(batch, C, 2, 3, 2, seed=2)


def _sequences(batch: int) -> tuple[Tensor, Tensor]:
    return _randn(batch, L, 7, seed=1), 20 * _randn(batch, C, 7, seed=2)


def kernel_matrix(image: Tensor, alpha: float, beta: float | None, how: str, radius: int | None = None) -> Tensor:
    """exp(-|p_i - p_j|^2 / 2 alpha^2 - |I_i - I_j|^2 / 2 beta^2), entry by entry, and normalised, for one image."""
    spatial = image.shape[1:]
    places = [tuple(int(i) for i in torch.unravel_index(torch.tensor(k), spatial)) for k in range(spatial.numel())]
    rows = []
    for p in places:
        row = []
        for q in places:
            energy = sum((a - b) ** 2 for a, b in zip(p, q)) / (2 * alpha**2)
            if beta is not None:
                energy = energy + ((image[(slice(None), *p)] - image[(slice(None), *q)]) ** 2).sum() / (2 * beta**2)
            seen = radius is None or all(abs(a - b) <= radius for a, b in zip(p, q))
            row.append(torch.exp(-torch.as_tensor(energy, dtype=image.dtype)) if seen else image.new_zeros(()))
        rows.append(torch.stack(row))
    K = torch.stack(rows)
    n = K.sum(1)
    left, right = {
        "after": (1 / n, n**0),
        "before": (n**0, 1 / n),
        "symmetric": (n**-0.5, n**-0.5),
        "none": (n**0, n**0),
    }[how]
    return left[:, None] * K * right


def _reference(
    bilateral: dict[str, Any], spatial: dict[str, Any], weights: tuple[Any, Any] = (5.0, 3.0), damping: float = 0.0
) -> Callable[..., Tensor]:
    def solve(num_iters: int, logits: Tensor, image: Tensor) -> Tensor:
        kernels = [torch.stack([kernel_matrix(one, **options) for one in image]) for options in (bilateral, spatial)]
        flat = logits.flatten(2)
        out = solvers.mean_field(flat, kernels, list(weights), num_iters=num_iters, damping=damping)
        return out.reshape(logits.shape)

    return solve


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "classes": ((_randn(3, 4, *SIZE), _inputs(3)[1]), ValueError, r"logits must have shape \(\.\.\., 3, \*, \*\)"),
    "size": ((_inputs(3)[0], _randn(3, C, 4, 6)), ValueError, "image must have the batch and the size of logits"),
    "batch": ((_inputs(3)[0], _inputs(2)[1]), ValueError, "image must have the batch and the size of logits"),
    "no channels": ((_inputs(3)[0], torch.zeros(3, 0, *SIZE).double()), ValueError, "image has no channels"),
    "dtype": ((_inputs(3)[0].float(), _inputs(3)[1]), TypeError, "logits is torch.float32"),
    "integers": ((_inputs(3)[0], torch.ones(3, C, *SIZE, dtype=torch.long)), TypeError, "image must be a floating"),
    "no tensor": ((_inputs(3)[0], [[1.0]]), TypeError, "image must be a floating point or uint8 tensor, got list"),
    "nan": ((torch.full((3, L, *SIZE), torch.nan).double(), _inputs(3)[1]), ValueError, "logits has 180 NaN"),
    "nan image": ((_inputs(3)[0], _inputs(3)[1] / 0), ValueError, "image has 120 NaN"),
    "empty": ((_inputs(3)[0][:0], _inputs(3)[1][:0]), ValueError, "logits is empty"),
    "device": ((_inputs(3)[0].to("meta"), _inputs(3)[1]), ValueError, "logits is on meta"),
    "mask": ((*_inputs(3), torch.ones(3, *SIZE)), TypeError, "mask must be a bool tensor"),
    "mask size": ((*_inputs(3), torch.ones(3, 4, 6, dtype=torch.bool)), ValueError, "mask must have shape"),
    "all masked": ((*_inputs(3), torch.zeros(3, *SIZE, dtype=torch.bool)), ValueError, "mask is False everywhere"),
}


def _row(
    name: str,
    kernels: tuple[Kernel, ...],
    reference: Callable[..., Tensor],
    inputs: Callable[[int], tuple[Tensor, ...]] = _inputs,
    bad: dict[str, tuple[tuple[Any, ...], type[Exception], str]] | None = None,
    **fixed: Any,
) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        return CRFasRNN(L, kernels, num_iters, **{**fixed, **options}, dtype=torch.float64)

    return System(name, make, inputs, reference, BAD if bad is None else bad)


NEAR: dict[str, Any] = {"alpha": 2.0, "beta": 15.0, "how": "after"}
SMOOTH: dict[str, Any] = {"alpha": 1.5, "beta": None, "how": "after"}
_exact = {"theta_alpha": 2.0, "theta_beta": 15.0, "filter": Exact()}
_smooth = {"theta_gamma": 1.5, "filter": Exact()}
CRF_SYSTEMS = [
    _row(
        "CRF-RNN exact",
        (Bilateral(**_exact), Spatial(**_smooth)),
        _reference(NEAR, SMOOTH),
    ),
    _row(
        "CRF-RNN learning all",
        (Bilateral(**_exact, learn=True), Spatial(theta_gamma=1.5, learn=True)),
        _reference(NEAR, SMOOTH),
        compatibility=Compatibility.LEARNED,
    ),
    _row(
        "CRF-RNN in a window",
        (
            Bilateral(theta_alpha=2.0, theta_beta=15.0, filter=ConvWindow(3), learn=True, color_range=255.0),
            Spatial(theta_gamma=1.5, filter=SeparableSpatial(), normalization=Normalization.SYMMETRIC),
        ),
        _reference({**NEAR, "radius": 1}, {**SMOOTH, "how": "symmetric"}, damping=0.25),
        weights=Weights.SCALAR,
        damping=0.25,
    ),
    _row(
        "CRF-RNN in volumes",
        (
            Bilateral(**_exact, normalization=Normalization.BEFORE, weight=(4.0, 5.0, 6.0)),
            Spatial(**_smooth, normalization=Normalization.NONE, weight=0.5),
        ),
        _reference(
            {**NEAR, "how": "before"}, {**SMOOTH, "how": "none"}, weights=(torch.tensor([4.0, 5.0, 6.0]).double(), 0.5)
        ),
        inputs=_volumes,
        bad={},
        weights=Weights.PER_CLASS,
        spatial_dims=3,
    ),
    _row(
        "CRF-RNN in sequences",
        (Bilateral(**_exact), Spatial(**_smooth)),
        _reference(NEAR, SMOOTH),
        inputs=_sequences,
        bad={},
        weights=Weights.PER_CLASS,
        compatibility=Compatibility.LEARNED,
        spatial_dims=1,
    ),
]


def _lattice_matrix(image: Tensor, beta: float | None) -> Tensor:
    """The normalised lattice as a matrix, column by column: what it filters is tested by itself."""
    H, W = image.shape[1:]
    y, x = torch.meshgrid(torch.arange(H).double(), torch.arange(W).double(), indexing="ij")
    position = torch.stack([x, y]) / (2.0 if beta else 1.5)
    features = position if beta is None else torch.cat([position, image / beta])
    plan = Permutohedral().prepare(features.permute(1, 2, 0)[None])
    K = plan(torch.eye(H * W).double().reshape(1, H, W, H * W)).reshape(H * W, H * W)
    return K / K.sum(1, keepdim=True)


def _lattice_reference(num_iters: int, logits: Tensor, image: Tensor) -> Tensor:
    kernels = [torch.stack([_lattice_matrix(one, beta) for one in image]) for beta in (15.0, None)]
    return solvers.mean_field(logits.flatten(2), kernels, [5.0, 3.0], num_iters=num_iters).reshape(logits.shape)


LATTICE = _row("CRF-RNN", (Bilateral(theta_alpha=2.0, theta_beta=15.0), Spatial(theta_gamma=1.5)), _lattice_reference)
