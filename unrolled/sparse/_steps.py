"""What the sparse coding networks share: operators in place of matrices, a code of zeros to start, thresholds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.functional import soft_threshold
from unrolled.operators import Convolution, Dense, LinearOperator
from unrolled.solvers import lipschitz
from unrolled.sparse.selection import SupportSelection
from unrolled.sparse.weights import analytic_weight
from unrolled.step import Step


class DictionaryStep(Step):
    """A step that knows its dictionary: a `LinearOperator`, fixed unless it holds parameters, shared by all layers."""

    def __init__(self, dictionary: LinearOperator) -> None:
        super().__init__()
        self.dictionary = dictionary
        self.event_dim = len(dictionary.in_shape)

    def check(self, y: Tensor) -> None:
        _check.finite("y", self.dictionary.check("y", y, self.dictionary.out_shape))

    def zeros(self, y: Tensor) -> Tensor:  # (..., *in_shape)
        """The code 0 for every signal."""
        batch = y.shape[: y.dim() - len(self.dictionary.out_shape)]
        return y.new_zeros(*batch, *self.dictionary.in_shape)


class SelectionState(NamedTuple):
    """The code, and how many layers it has seen, for what depends on that."""

    x: Tensor  # (*batch, *event)
    k: Tensor  # ()


class ResidualStep(DictionaryStep):
    r"""$x_{k+1} = \mathrm{SS}_{\theta, p_k}(x_k + \dots)$: a weight, a learned threshold and support selection.

    The state is the code, or with support selection a `SelectionState`.
    """

    def __init__(
        self,
        dictionary: LinearOperator,
        weight: LinearOperator,
        *,
        alpha: float,
        support_selection: SupportSelection | None,
    ) -> None:
        super().__init__(dictionary)
        self.weight = check_weight(weight, dictionary)
        self.support_selection = check_selection(support_selection)
        self.alpha = _check.real("alpha", alpha, above=0.0, hint="It weighs the l1 norm.")
        # theta = exp(log_theta): positive whatever the optimiser does, and a learning rate is relative to its size.
        self.log_theta = nn.Parameter((self.alpha / lipschitz(dictionary)).detach().log())

    @property
    def theta(self) -> Tensor:
        """The threshold, (), positive."""
        return self.log_theta.exp()

    def init(self, y: Tensor) -> State:
        x = self.zeros(y)
        return x if self.support_selection is None else SelectionState(x, x.real.new_zeros(()))

    def shrink(self, state: State, z: Tensor, theta: Tensor) -> State:
        """The next state: z through the threshold, with the support selection of this layer."""
        if self.support_selection is None:
            return soft_threshold(z, theta)
        k = state.k + 1
        return SelectionState(self.support_selection(z, theta, k, event_dim=self.event_dim), k)

    def readout(self, state: State) -> Any:
        return state if self.support_selection is None else state.x

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, support_selection={self.support_selection}"


def check_weight(weight: LinearOperator, dictionary: LinearOperator) -> LinearOperator:
    """Return the weight if it fits the dictionary."""
    if (weight.in_shape, weight.out_shape) != (dictionary.in_shape, dictionary.out_shape):
        raise ValueError(
            f"weight maps {weight.in_shape} to {weight.out_shape}, the dictionary {dictionary.in_shape} to "
            f"{dictionary.out_shape}. They must be of one shape: its columns w_i belong to the atoms."
        )
    a, w = dictionary._numbers(), weight._numbers()
    if a is not None and w is not None and (a.dtype, a.device) != (w.dtype, w.device):
        raise TypeError(
            f"weight is {w.dtype} on {w.device}, the dictionary {a.dtype} on {a.device}. Convert one with .to(...)."
        )
    return weight


def check_selection(support_selection: SupportSelection | None) -> SupportSelection | None:
    if support_selection is not None and not isinstance(support_selection, SupportSelection):
        raise TypeError(f"support_selection must be None or a SupportSelection, got {support_selection!r}.")
    return support_selection


def fixed_operator(
    name: str, value: Tensor | LinearOperator, device: torch.device | str | None, dtype: torch.dtype | None
) -> LinearOperator:
    """A copy of a matrix as a buffer, or an operator as it is (a copy where it must be moved or cast)."""
    if isinstance(value, LinearOperator):
        return value if device is None and dtype is None else copy.deepcopy(value).to(device=device, dtype=dtype)
    return Dense(fixed_matrix(name, value, device, dtype))


def fixed_matrix(
    name: str,
    value: Tensor,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    *,
    allow_complex: bool = True,
) -> Tensor:
    """A contiguous copy of a matrix without zero columns, moved and cast."""
    _check.dictionary(name, value, allow_complex=allow_complex)
    return _check.converted(name, value, device, dtype).clone(memory_format=torch.contiguous_format)


def learned_operator(
    name: str,
    value: Tensor | LinearOperator | None,
    dictionary: LinearOperator,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> LinearOperator:
    r"""A copy of a matrix as a parameter, a copy of an operator, or the dictionary divided by $L = \|A\|_2^2$."""
    if isinstance(value, LinearOperator):
        return copy.deepcopy(value).to(device=device, dtype=dtype)
    if value is not None:
        return Dense(nn.Parameter(fixed_matrix(name, value, device, dtype)))
    if type(dictionary) is Dense:
        return Dense(nn.Parameter((dictionary.matrix / lipschitz(dictionary)).detach()))
    if type(dictionary) is Convolution:
        kernel = nn.Parameter((dictionary.kernel / lipschitz(dictionary)).detach())
        return Convolution(kernel, dictionary.in_shape, boundary=dictionary.boundary)
    raise TypeError(
        f"{name} must be given for a dictionary of type {type(dictionary).__name__}: only a matrix, Dense and "
        "Convolution can be divided by L to start it. Pass an operator of the same shape that holds parameters."
    )


def analytic_operator(dictionary: LinearOperator) -> LinearOperator:
    """`analytic_weight` as a fixed operator."""
    if not isinstance(dictionary, Dense):
        raise TypeError(
            f"weight must be given for a dictionary of type {type(dictionary).__name__}: the closed form needs a "
            "matrix. Pass an operator of the same shape, or take StepLISTA, which needs none."
        )
    return Dense(analytic_weight(dictionary.matrix))


def share(tied: bool | Sequence[str], step: Step, *names: str) -> bool | Sequence[str]:
    """`tied`, and with it what is the same in all layers anyway: K copies of a fixed matrix would be a waste."""
    if tied is not False and (isinstance(tied, bool | str) or not isinstance(tied, Sequence)):
        return tied  # nothing to add, or an error that Unroll explains
    known = [key for key, _ in (*step.named_parameters(), *step.named_buffers())]
    present = [name for name in names if any(key == name or key.startswith(f"{name}.") for key in known)]
    given = list(tied or ())
    return tuple(dict.fromkeys(given + present)) or False
