"""Losses for `fit`: modules called as `loss(net, batch)` that return a scalar."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.autoencoder import Autoencoder
from unrolled.operators import LinearOperator
from unrolled.solvers import Decomposition, lasso_objective, separation_objective
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
        def objective(x: Tensor) -> Tensor:
            return lasso_objective(self.dictionary, y, x, self.alpha).mean()

        return _supervised(net, y, objective, self.supervision)

    def extra_repr(self) -> str:
        return _describe(self.alpha, self.supervision)


class DictionaryLearning(nn.Module):
    r"""$\frac1B \sum_i \tfrac12\|y_i - D x_i\|^2 + \alpha \|x_i\|_1$ where codes and dictionary both learn.

    The network is an `Autoencoder`: $x_i$ = net($y_i$), and $D$ is its dictionary of unit atoms.

    Args:
        alpha: weight of the l1 norm, positive.
        supervision: weight of the mean objective of all layers before the last one, as in `Lasso`; the encoder must
            then be an `Unroll`.

    Example:
        >>> net = Autoencoder(LISTA(D, 8, alpha=0.1), D)                     # doctest: +SKIP
        >>> fit(net, batches, DictionaryLearning(alpha=0.1), num_steps=300)  # doctest: +SKIP
    """

    def __init__(self, alpha: float, *, supervision: float = 0.0) -> None:
        super().__init__()
        self.alpha = _check.real("alpha", alpha, above=0.0)
        self.supervision = _check.real("supervision", supervision, minimum=0.0)

    def forward(self, net: nn.Module, y: Tensor) -> Tensor:
        model = _autoencoder(net)
        dictionary = model.dictionary

        def objective(x: Tensor) -> Tensor:
            return lasso_objective(dictionary, y, x, self.alpha).mean()

        # A wrapper, as of a distributed network, must be called itself, which leaves no way to the inner layers.
        encoder = model.encoder if net is model and self.supervision > 0 else net
        return _supervised(encoder, y, objective, self.supervision)

    def extra_repr(self) -> str:
        return _describe(self.alpha, self.supervision)


class Classification(nn.Module):
    r"""Cross entropy of the head's scores + `weight` times the objective of `DictionaryLearning`; batches (y, labels).

    The network is an `Autoencoder` with a head. The objective keeps the codes sparse and faithful while the labels
    shape them.

    Args:
        alpha: weight of the l1 norm in the objective, positive.
        weight: weight of the objective beside the cross entropy, at least 0; at 0 only the labels count.

    Example:
        >>> net = Autoencoder(LISTA(D, 8, alpha=0.1), D, head=torch.nn.Linear(100, 10))     # doctest: +SKIP
        >>> fit(net, loader, Classification(alpha=0.1, weight=0.1), num_steps=300)          # doctest: +SKIP
    """

    def __init__(self, alpha: float, *, weight: float) -> None:
        super().__init__()
        self.alpha = _check.real("alpha", alpha, above=0.0)
        self.weight = _check.real("weight", weight, minimum=0.0)

    def forward(self, net: nn.Module, batch: tuple[Tensor, Tensor] | list[Any]) -> Tensor:
        y, labels = _pair(batch, "signals and labels", "labels")
        model = _autoencoder(net)
        if model.head is None:
            raise ValueError(
                "net has no head. Give it one: Autoencoder(encoder, dictionary, head=torch.nn.Linear(...))."
            )
        x = net(y)
        loss = nn.functional.cross_entropy(model.head(x), labels)
        if self.weight > 0:
            loss = loss + self.weight * lasso_objective(model.dictionary, y, x, self.alpha).mean()
        return loss

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, weight={self.weight:g}"


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
        y, x = _pair(batch, "signals and codes", "x")
        found = net(y)
        if found.shape != x.shape:
            raise ValueError(
                f"the batch's codes have shape {tuple(x.shape)}, the network returns {tuple(found.shape)}."
            )
        error = (found - x).abs().square().sum(-1)
        return torch.log(error.sum()) if self.log else error.mean()

    def extra_repr(self) -> str:
        return f"log={self.log}"


def _supervised(net: nn.Module, y: Tensor, objective: Callable[[Tensor], Tensor], supervision: float) -> Tensor:
    """The objective of the last layer, plus `supervision` times the mean of those before."""
    if supervision == 0:
        return objective(net(y))
    if not isinstance(net, Unroll):
        raise TypeError(
            f"net must be an Unroll for supervision={supervision:g}, got {type(net).__name__}. Pass the "
            "network itself, or supervision=0."
        )
    *earlier, last = net.iterates(y)
    total = objective(last)
    if earlier:
        total = total + supervision * torch.stack([objective(x) for x in earlier]).mean()
    return total


def _autoencoder(net: nn.Module) -> Autoencoder:
    """The network itself, or what a distributed or compiled one wraps."""
    model = getattr(net, "module", getattr(net, "_orig_mod", net))
    if not isinstance(model, Autoencoder):
        raise TypeError(
            f"net must be an Autoencoder, got {type(net).__name__}. Wrap the encoder: Autoencoder(encoder, dictionary)."
        )
    return model


def _pair(batch: Any, what: str, second: str) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        came = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"batch must be a pair (y, {second}) of {what}, got {came}.")
    return batch[0], batch[1]


def _describe(alpha: float, supervision: float) -> str:
    return f"alpha={alpha:g}" + (f", supervision={supervision:g}" if supervision else "")


class SeparationObjective(nn.Module):
    r"""$\frac1B \sum_i \tfrac12\|x_i - D s_i - o_i\|^2 + \tfrac{\lambda_*}{2}\|s_i\|^2 + \lambda\|o_i\|_1
    + \tfrac12\|l_i - D s_i\|^2$ with $(l_i, o_i, s_i)$ = net($x_i$): needs no known parts.

    For `unrolled.lowrank.RPCAEncoder` and `RobustNMFEncoder`. The last term holds the dictionaries of the network to
    $D$, so that its low-rank part $l$ stays $D s$; it is 0 before training. Batches are signals.

    Args:
        dictionary: $D$, (m, q). The loss keeps a copy, which stays fixed: only the network learns.
        ridge: $\lambda_*$, at least 0; the network's own for a faster solver of the same problem.
        alpha: $\lambda$, at least 0; likewise.

    Example:
        >>> loss = SeparationObjective(dictionary, ridge=0.01, alpha=0.1)    # doctest: +SKIP
        >>> fit(net, batches, loss, num_steps=300)                           # doctest: +SKIP
    """

    dictionary: Tensor

    def __init__(self, dictionary: Tensor, *, ridge: float, alpha: float) -> None:
        super().__init__()
        self.ridge = _check.real("ridge", ridge, minimum=0.0)
        self.alpha = _check.real("alpha", alpha, minimum=0.0)
        _check.dictionary("dictionary", dictionary)
        self.register_buffer("dictionary", dictionary.detach().clone())

    def forward(self, net: nn.Module, x: Tensor) -> Tensor:
        low_rank, sparse, code = _parts(net(x))
        value = separation_objective(self.dictionary, x, code, sparse, ridge=self.ridge, alpha=self.alpha)
        apart = (low_rank - code @ self.dictionary.mT).square().sum(-1) / 2
        return (value + apart).mean()

    def extra_repr(self) -> str:
        return f"ridge={self.ridge:g}, alpha={self.alpha:g}"


class Separation(nn.Module):
    r"""$\frac1B \sum_i w_l \|\hat l_i - l_i\|^2 + w_o \|\hat o_i - o_i\|^2$ with $(\hat l_i, \hat o_i, \cdot)$ =
    net($x_i$): learns from known parts; batches are (x, (l, o)).

    For `unrolled.lowrank.RPCAEncoder` and `RobustNMFEncoder`.

    Args:
        low_rank: $w_l$, the weight of the low-rank part's error, at least 0.
        sparse: $w_o$, the weight of the sparse part's error, at least 0. One of the two must be positive.

    Example:
        >>> fit(net, [(x, (low_rank, sparse))], Separation(), num_steps=300)   # doctest: +SKIP
    """

    def __init__(self, *, low_rank: float = 1.0, sparse: float = 1.0) -> None:
        super().__init__()
        self.low_rank = _check.real("low_rank", low_rank, minimum=0.0)
        self.sparse = _check.real("sparse", sparse, minimum=0.0)
        if self.low_rank == self.sparse == 0:
            raise ValueError("low_rank and sparse are both 0, so that nothing would be learned. Make one positive.")

    def forward(self, net: nn.Module, batch: tuple[Tensor, tuple[Tensor, Tensor]] | list[Any]) -> Tensor:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not pair or not isinstance(batch[1], tuple | list) or len(batch[1]) != 2:
            raise TypeError("batch must be (x, (low_rank, sparse)): signals and the two parts that they are made of.")
        x, (low_rank, sparse) = batch
        found = _parts(net(x))
        for name, part, true in (("low-rank", found[0], low_rank), ("sparse", found[1], sparse)):
            if part.shape != true.shape:
                raise ValueError(
                    f"the batch's {name} parts have shape {tuple(true.shape)}, the network's {tuple(part.shape)}."
                )
        errors = [(part - true).square().sum(-1).mean() for part, true in zip(found, (low_rank, sparse), strict=False)]
        return self.low_rank * errors[0] + self.sparse * errors[1]

    def extra_repr(self) -> str:
        return f"low_rank={self.low_rank:g}, sparse={self.sparse:g}"


def _parts(output: Any) -> Decomposition:
    """Return what a network gave if it is a low-rank part, a sparse part and a code."""
    if not isinstance(output, tuple) or len(output) != 3:
        raise TypeError(
            "net must return a Decomposition (low_rank, sparse, code), as unrolled.lowrank.RPCAEncoder does; got "
            f"{type(output).__name__}."
        )
    return Decomposition(*output)
