"""Losses for `fit`: modules called as `loss(net, batch)` that return a scalar."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.operators import LinearOperator
from unrolled.solvers import lasso_objective
from unrolled.unroll import Unroll


class Lasso(nn.Module):
    r"""$\frac1B \sum_i \tfrac12\|y_i - D x_i\|^2 + \alpha \|x_i\|_1$ with $x_i$ = net($y_i$): needs no known codes.

    Args:
        dictionary: $D$, (m, n), atoms as columns, or a `LinearOperator`. The loss keeps a copy, which stays fixed: only
            the network learns.
        alpha: weight of the l1 norm, positive; the network's own for a faster solver of the same problem.
        supervision: weight of the mean objective of all layers before the last one, which is added to that of the last
            (deep supervision). At 1 a network trains faster and more surely than at 0, and stays good when it is cut
            short; the network must be an `Unroll`.

    Example:
        >>> fit(net, batches, Lasso(dictionary, alpha=0.1), num_steps=300)   # doctest: +SKIP
    """

    dictionary: Tensor | LinearOperator

    def __init__(self, dictionary: Tensor | LinearOperator, alpha: float, *, supervision: float = 0.0) -> None:
        super().__init__()
        self.alpha = _check.real("alpha", alpha, above=0.0)
        self.supervision = _check.real("supervision", supervision, minimum=0.0)
        if isinstance(dictionary, LinearOperator):
            self.dictionary = copy.deepcopy(dictionary).requires_grad_(False)
        else:
            _check.dictionary("dictionary", dictionary, allow_complex=True)
            self.register_buffer("dictionary", dictionary.detach().clone())

    def forward(self, net: nn.Module, y: Tensor) -> Tensor:
        if self.supervision == 0:
            return self._objective(y, net(y))
        if not isinstance(net, Unroll):
            raise TypeError(
                f"net must be an Unroll for supervision={self.supervision:g}, got {type(net).__name__}. Pass the "
                "network itself, or supervision=0."
            )
        *earlier, last = net.iterates(y)
        total = self._objective(y, last)
        if earlier:
            total = total + self.supervision * torch.stack([self._objective(y, x) for x in earlier]).mean()
        return total

    def _objective(self, y: Tensor, x: Tensor) -> Tensor:
        return lasso_objective(self.dictionary, y, x, self.alpha).mean()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}" + (f", supervision={self.supervision:g}" if self.supervision else "")


class CodeError(nn.Module):
    r"""$\frac1B \sum_i \|\hat x_i - x_i\|^2$ with $\hat x_i$ = net($y_i$): learns from known codes; batches are (y, x).

    Args:
        log: take the logarithm of the sum, whose gradient does not fade as the error does.

    Example:
        >>> fit(net, zip(signals, codes), CodeError(), num_steps=300)        # doctest: +SKIP
    """

    def __init__(self, *, log: bool = False) -> None:
        super().__init__()
        self.log = log

    def forward(self, net: nn.Module, batch: tuple[Tensor, Tensor] | list[Any]) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            what = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
            raise TypeError(f"batch must be a pair (y, x) of signals and codes, got {what}.")
        y, x = batch
        found = net(y)
        if found.shape != x.shape:
            raise ValueError(
                f"the batch's codes have shape {tuple(x.shape)}, the network returns {tuple(found.shape)}."
            )
        error = (found - x).abs().square().sum(-1)
        return torch.log(error.sum()) if self.log else error.mean()

    def extra_repr(self) -> str:
        return f"log={self.log}"
