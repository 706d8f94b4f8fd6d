"""Reading a sketch: matched filter, least squares, sparse coding. Each is an object, called with D and s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from unrolled import _check
from unrolled.sketch.blocks import SketchDictionary
from unrolled.solvers import fista

Decoder = Callable[[SketchDictionary, Tensor], Tensor]


@dataclass(frozen=True)
class MatchedFilter:
    r"""$\hat x_t = B_t^T s / g_t$: turn the sketch back by the rotation of one vector and look.

    The others come out as noise, whose size falls with $d^{-1/2}$ and does not depend on how many unknowns there are
    but on how strong they are. It needs no matrix and reads one vector without the others.

    Shape:
        - called with a dictionary and a sketch (..., kept), returns (..., n)

    Example:
        >>> D = SketchDictionary([Block(2, (Rotation(4096, seed=t),), weight=1.0) for t in range(3)])
        >>> bool((MatchedFilter()(D, D(torch.ones(6))) - 1).abs().max() < 0.2)
        True
    """

    def __call__(self, dictionary: SketchDictionary, sketch: Tensor) -> Tensor:
        return dictionary.matched(sketch)


@dataclass(frozen=True)
class LeastSquares:
    r"""$\hat x = \arg\min_x \|s - D x\|^2$ by a QR decomposition: exact to rounding where $n$ is at most `kept`.

    Computed in float64, whatever the sketch is in. D is written down for it, kept x n numbers.

    Shape:
        - called with a dictionary and a sketch (..., kept), returns (..., n)

    Raises:
        ValueError: there are more unknowns than entries of the sketch, or the columns depend on each other.

    Example:
        >>> D = SketchDictionary([Block(2, (Rotation(16, seed=t),), weight=1.0) for t in range(3)])
        >>> torch.allclose(LeastSquares()(D, D(torch.ones(6))), torch.ones(6), atol=1e-5)
        True
    """

    def __call__(self, dictionary: SketchDictionary, sketch: Tensor) -> Tensor:
        n, kept = dictionary.in_shape[0], dictionary.kept
        if n > kept:
            raise ValueError(
                f"least squares needs as many entries of the sketch as there are unknowns, {n}; there are {kept}. Take "
                "a larger d, erase less, or decode by MatchedFilter(), or by SparseCoder() where most unknowns are 0."
            )
        dictionary.check("sketch", sketch, dictionary.out_shape)
        q, r = torch.linalg.qr(dictionary.columns().double())
        diagonal = r.diagonal().abs()
        if bool(diagonal.min() <= 1e-10 * diagonal.max()):
            raise ValueError(
                "the columns of the dictionary depend on each other, so that least squares has no single answer. "
                "Decode by MatchedFilter(), or take a larger d."
            )
        turned = linear(sketch.double(), q.T)
        return torch.linalg.solve_triangular(r, turned.unsqueeze(-1), upper=True).squeeze(-1).to(sketch.dtype)


@dataclass(frozen=True)
class SparseCoder:
    r"""$\hat x = \arg\min_x \tfrac12\|s - D x\|^2 + \alpha\|x\|_1$ by FISTA, then least squares on its support.

    For more unknowns than the sketch has entries, of which few are not zero: a Lasso, solved by `solvers.fista`. The
    columns are scaled to norm 1, and $\alpha$ is a fraction of the least that makes all codes zero.

    Args:
        alpha: that fraction, above 0 and below 1.
        num_iters: iterations of FISTA.
        refit: whether to solve for the entries of the support again, without the bias of the l1 norm. A sample whose
            support is larger than its sketch stays as FISTA left it.

    Shape:
        - called with a dictionary and a sketch (..., kept), returns (..., n)

    Raises:
        TypeError, ValueError: `alpha` or `num_iters` is no number or out of its range.

    Example:
        >>> D = SketchDictionary([Block(64, (Rotation(64, seed=t),), weight=1.0) for t in range(2)])
        >>> x = torch.zeros(128)
        >>> x[[3, 70]] = torch.tensor([1.0, -2.0])
        >>> torch.allclose(SparseCoder()(D, D(x)), x, atol=1e-5)
        True
    """

    alpha: float = 0.02
    num_iters: int = 300
    refit: bool = True

    def __post_init__(self) -> None:
        if _check.real("alpha", self.alpha, above=0.0) >= 1:
            raise ValueError(f"alpha must be less than 1, got {self.alpha}: at 1 all codes are zero.")
        _check.integer("num_iters", self.num_iters)

    def __call__(self, dictionary: SketchDictionary, sketch: Tensor) -> Tensor:
        dictionary.check("sketch", sketch, dictionary.out_shape)
        columns = dictionary.columns()
        norms = columns.norm(dim=0)
        columns = columns / norms
        flat = sketch.reshape(-1, sketch.shape[-1])
        # One alpha for all: every sample is brought to the size at which alpha = 1 makes its codes zero.
        size = linear(flat, columns.T).abs().amax(-1, keepdim=True)
        size = torch.where(size > 0, size, 1)
        codes = size * fista(columns, flat / size, self.alpha, num_iters=self.num_iters, restart=True)
        if self.refit:
            codes = torch.stack([self._refitted(columns, y, x) for y, x in zip(flat, codes, strict=True)])
        return (codes / norms).reshape(*sketch.shape[:-1], -1)

    def _refitted(self, columns: Tensor, y: Tensor, x: Tensor) -> Tensor:
        support = x != 0
        if not 0 < int(support.sum()) <= len(y):
            return x
        values = torch.linalg.lstsq(columns[:, support], y.unsqueeze(-1)).solution.squeeze(-1)
        return torch.zeros_like(x).masked_scatter(support, values)


def best_decoder(dictionary: SketchDictionary) -> Decoder:
    """Least squares where it is determined, the matched filter where not.

    Args:
        dictionary: of the sketch.
    """
    return LeastSquares() if dictionary.in_shape[0] <= dictionary.kept else MatchedFilter()
