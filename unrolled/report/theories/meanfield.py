"""What theory says of mean-field updates in a conditional random field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.report.columns import Column, Kind, share
from unrolled.report.recording import Layer, Run
from unrolled.report.theory import Theory

KRAEHENBUEHL = "P. Krähenbühl and V. Koltun, ICML 2013 (concave-convex procedure)"
FIXED = "P. Krähenbühl and V. Koltun, NIPS 2011, algorithm 1"

SYMMETRIC = 1e-2  # the permutohedral lattice is symmetric to about this


class MeanFieldTheory(Theory):
    r"""$u_{k+1} = (1 - d)(U + B q_k) + d\,u_k$, $q = \mathrm{softmax}(u)$, for the free energy
    $F(q) = \langle q, \log q\rangle - \langle U, q\rangle - \tfrac12 \langle q, B q\rangle$.

    | column | measured | predicted |
    |---|---|---|
    | objective | mean F, with the B of the first layer | |
    | decrease | share with $F(q) - F(q^+) \ge [\mathrm{KL}(q\|q^+) + d\,\mathrm{KL}(q^+\|q)] / (1-d)$ | 1 |
    | residual | mean over the pixels of $\tfrac12\|q^+ - q\|_1$; a fixed point has 0 | |
    | symmetry | $\langle q^+, B q\rangle - \langle q, B q^+\rangle$, relative | 0 |
    | curvature | $\langle v, B v\rangle / \|v\|^2$, $v = q^+ - q$ | $\ge 0$ |

    The last two are the conditions of the second: where B is symmetric and positive semi-definite, all pixels may be
    updated at once, because the update minimises a bound of F that touches it at q. Kernels with
    `Normalization.AFTER`, as in CRF-RNN, are not symmetric, and then F is not what the update minimises.

    For steps whose state are the logits u with the classes last, that start at U, such as those of `CRFasRNN`.

    Args:
        tolerance: the rise of F, relative to its size, that counts as rounding, at least 0.

    Raises:
        ValueError: a network whose state is no such tensor.

    Reference:
        P. Krähenbühl and V. Koltun, "Parameter Learning and Convergent Inference for Dense Random Fields", ICML 2013.
    """

    def __init__(self, *, tolerance: float = 1e-6) -> None:
        self.tolerance = tolerance

    def check(self, run: Run) -> None:
        state = run.layers[0].state
        if not isinstance(state, Tensor) or state.dim() < run.batch_dims + 2:
            raise ValueError(
                "MeanFieldTheory is about states that are logits (..., *spatial, L), as those of CRFasRNN; got "
                f"{type(state).__name__}. Pass another theory."
            )

    def objective(self, run: Run) -> Callable[[Any], Tensor]:
        first, places = run.layers[0], run.layers[0].step.event_dim - 1

        def energy(x: Tensor) -> Tensor:
            u = x.movedim(-1 - places, -1)
            return _free_energy(first, u, first.apply(u))

        return energy

    def columns(self, run: Run) -> Sequence[Column]:
        return [
            Column(
                "decrease",
                self._decrease,
                1.0,
                Kind.AT_LEAST,
                0.0,
                "F(q) - F(q+) ≥ KL(q | q+)",
                f"{KRAEHENBUEHL}; up to {self.tolerance:g} of F",
                "no sufficient decrease",
            ),
            Column("residual", _residual, equation="q = softmax(U + B q)", citation=FIXED),
            Column("symmetry", _asymmetry, 0.0, Kind.EQUALITY, SYMMETRIC, "B = B'", "a condition of the decrease"),
            Column("curvature", _curvature, 0.0, Kind.AT_LEAST, 1e-3, "<v, B v> ≥ 0", "a condition of the decrease"),
        ]

    def conditions(self, values: Mapping[str, float]) -> list[str]:
        found = []
        if abs(values.get("symmetry", 0.0)) > SYMMETRIC:
            found.append("B is not symmetric, so that F is not what the update minimises")
        if values.get("curvature", 0.0) < -1e-3:
            found.append("B has negative curvature along this update, which is too large for it: damp it")
        return found

    def _decrease(self, layer: Layer) -> Tensor:
        u, v = layer.state, layer.output
        before, after = _free_energy(layer, u, v), _free_energy(layer, v, layer.apply(v))
        d, dims = _damping(layer), layer.run.batch_dims
        needed = (_kl(u, v, dims) + d * _kl(v, u, dims)) / (1 - d)
        return share(before - after >= needed - self.tolerance * before.abs())

    def __str__(self) -> str:
        return "mean field"


def _damping(layer: Layer) -> float:
    return float(getattr(layer.step, "damping", 0.0))


def _messages(layer: Layer, u: Tensor, new: Tensor) -> Tensor:
    """B softmax(u), from what the layer makes of u."""
    d, unary = _damping(layer), layer.step.init(layer.context)
    return (new.double() - d * u.double()) / (1 - d) - unary.double()


def _free_energy(layer: Layer, u: Tensor, new: Tensor) -> Tensor:
    log_q = u.double().log_softmax(-1)
    unary = layer.step.init(layer.context).double()
    parts = log_q.exp() * (log_q - unary - _messages(layer, u, new) / 2)
    return parts.flatten(layer.run.batch_dims).sum(-1)


def _kl(u: Tensor, v: Tensor, batch_dims: int) -> Tensor:
    p, q = u.double().log_softmax(-1), v.double().log_softmax(-1)
    return (p.exp() * (p - q)).flatten(batch_dims).sum(-1)


def _residual(layer: Layer) -> Tensor:
    moved = layer.output.double().softmax(-1) - layer.state.double().softmax(-1)
    return moved.abs().sum(-1).flatten(layer.run.batch_dims).mean(-1) / 2


def _products(layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, q+, B q and B q+, the pixels of an image in one dimension."""
    u, v = layer.state, layer.output
    values = u.double().softmax(-1), v.double().softmax(-1), _messages(layer, u, v), _messages(layer, v, layer.apply(v))
    q, p, Bq, Bp = (value.flatten(layer.run.batch_dims) for value in values)
    return q, p, Bq, Bp


def _asymmetry(layer: Layer) -> Tensor:
    q, p, Bq, Bp = _products(layer)
    one, other = (p * Bq).sum(-1), (q * Bp).sum(-1)
    # Relative to the part that the update makes: in nearly equal q and q+ any asymmetry would be hidden.
    size = ((p - q) * Bq).sum(-1).abs() + (q * (Bp - Bq)).sum(-1).abs()
    return torch.where(size > 1e-5 * other.abs(), (one - other) / size, torch.nan)


def _curvature(layer: Layer) -> Tensor:
    q, p, Bq, Bp = _products(layer)
    size = (p - q).square().sum(-1)
    return torch.where(size > 1e-9 * q.square().sum(-1), ((p - q) * (Bp - Bq)).sum(-1) / size, torch.nan)
