"""The systems that the contract suite runs over: one row each, see `test_contract.py`."""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unrolled import LISTA, Momentum, Step, Unroll, solvers


@dataclass(frozen=True)
class System:
    """What the suite needs to know of a system; everything small, in float64, and the same at every call.

    Attributes:
        make: builds the untrained network; takes `tied`, `num_iters` and `gradient` like `Unroll`.
        inputs: batch size -> the arguments of a call.
        reference: the classical solver: (number of iterations, *inputs) -> what the untrained network must return.
        bad: name -> (inputs that must be refused, the exception, what its message must match).
        dead: parameters of an untied network that cannot get a gradient -> the reason.
    """

    name: str
    make: Callable[..., Unroll]
    inputs: Callable[[int], tuple[Tensor, ...]]
    reference: Callable[..., Tensor]
    bad: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = field(default_factory=dict)
    dead: dict[str, str] = field(default_factory=dict)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ---- LISTA -----------------------------------------------------------------------------------------------------------

DICTIONARY = 1.7 * _randn(6, 10)  # atoms of any norm
ALPHA = 0.4
FROM_ZERO = "the first layer's codes are zero, so what multiplies them makes no difference"
FROM_REST = "the first layer has no earlier iterate to extrapolate from"


def _signals(batch: int) -> tuple[Tensor]:
    return (_randn(batch, 6, seed=1),)


def _ista(num_iters: int, y: Tensor) -> Tensor:
    return solvers.ista(DICTIONARY, y, ALPHA, num_iters=num_iters)


def _fista(num_iters: int, y: Tensor) -> Tensor:
    return solvers.fista(DICTIONARY, y, ALPHA, num_iters=num_iters)


BAD_SIGNALS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "length": ((_randn(3, 7),), ValueError, r"y must have shape \(\.\.\., 6\)"),
    "dtype": ((_randn(3, 6).float(),), TypeError, "y is torch.float32"),
    "integers": ((torch.ones(3, 6, dtype=torch.long),), TypeError, "y must be floating point"),
    "no tensor": (([[1.0] * 6],), TypeError, "y must be a torch.Tensor"),
    "nan": ((torch.full((3, 6), torch.nan).double(),), ValueError, "y has 18 NaN or infinite"),
    "empty": ((torch.empty(0, 6).double(),), ValueError, "y is empty"),
    "device": ((torch.empty(3, 6, dtype=torch.float64, device="meta"),), ValueError, "y is on meta"),
}


def _lista_row(name: str, fixed: dict[str, Any], dead: dict[str, str]) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        return LISTA(DICTIONARY, num_iters, alpha=ALPHA, **{**fixed, **options})

    return System(name, make, _signals, _fista if "momentum" in fixed else _ista, BAD_SIGNALS, dead)


# ---- Steps of a user's own -------------------------------------------------------------------------------------------

MATRIX = _randn(6, 4, seed=2)


class GradientDescent(Step):
    """x+ = x - s A'(A x - y)"""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(MATRIX.clone())
        self.log_step = torch.nn.Parameter(-2 * torch.linalg.matrix_norm(MATRIX, 2).log())

    def check(self, y: Tensor) -> None:
        if y.shape[-1] != len(self.matrix):
            raise ValueError(f"y must have {len(self.matrix)} entries, got {tuple(y.shape)}.")

    def init(self, y: Tensor) -> Tensor:
        return y.new_zeros(*y.shape[:-1], self.matrix.shape[1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - self.log_step.exp() * (x @ self.matrix.mT - y) @ self.matrix


def _gradient_descent(num_iters: int, y: Tensor) -> Tensor:
    x = y.new_zeros(len(y), 4)
    for _ in range(num_iters):
        x = x - (x @ MATRIX.T - y) @ MATRIX / torch.linalg.matrix_norm(MATRIX, 2) ** 2
    return x


def _accelerated_descent(num_iters: int, y: Tensor) -> Tensor:
    """Nesterov's method written with the extrapolated point as the variable, unlike `Momentum`."""
    x = z = y.new_zeros(len(y), 4)
    t = 1.0
    for _ in range(num_iters):
        following = z - (z @ MATRIX.T - y) @ MATRIX / torch.linalg.matrix_norm(MATRIX, 2) ** 2
        t, before = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        x, z = following, following + (before - 1) / t * (following - x)
    return x


# ---- The README's own example ----------------------------------------------------------------------------------------


@functools.cache
def readme_example() -> types.ModuleType:
    """The README's 'your own algorithm' block, run as a module (so that its classes can be pickled)."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = re.findall(r"<!-- own algorithm -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    module = types.ModuleType("readme_example")
    sys.modules[module.__name__] = module
    exec(compile(code, "README.md", "exec"), module.__dict__)
    return module


def _total_variation(**options: Any) -> Unroll:
    example = readme_example().TotalVariation
    torch.set_default_dtype(torch.float64)  # its constants are made in the default dtype
    try:
        return Unroll(example(), **{"num_iters": 5, **options})
    finally:
        torch.set_default_dtype(torch.float32)


def _primal_dual(num_iters: int, y: Tensor) -> Tensor:
    """min_x 1/2 |x - y|^2 + 0.5 |x_i+1 - x_i|_1, Chambolle and Pock's algorithm with both steps 1/2."""
    x, dual = y, torch.zeros_like(y[..., 1:])
    ahead = x
    D = torch.diff(torch.eye(y.shape[-1], dtype=y.dtype), dim=0)
    for _ in range(num_iters):
        dual = (dual + 0.5 * ahead @ D.T).clamp(-0.5, 0.5)
        following = (x - 0.5 * dual @ D + 0.5 * y) / 1.5
        x, ahead = following, 2 * following - x
    return x


SYSTEMS = [
    _lista_row("LISTA", {}, {"steps.0.inhibition": FROM_ZERO}),
    _lista_row("LISTA tied", {"tied": True}, {"steps.0.inhibition": FROM_ZERO}),
    _lista_row("LISTA partly tied", {"tied": ("weight",)}, {"steps.0.inhibition": FROM_ZERO}),
    _lista_row("LISTA factored", {"factored": True}, {"steps.0.dictionary": FROM_ZERO}),
    _lista_row("LISTA one dictionary", {"factored": True, "tied": ("dictionary",)}, {"steps.0.dictionary": FROM_ZERO}),
    _lista_row(
        "LISTA momentum", {"momentum": True}, {"steps.0.step.inhibition": FROM_ZERO, "steps.0.offset": FROM_REST}
    ),
    _lista_row(
        "LISTA momentum, partly tied",
        {"momentum": True, "tied": ("step.log_theta", "offset")},
        {"steps.0.step.inhibition": FROM_ZERO, "steps.0.offset": FROM_REST},
    ),
    System(
        "gradient descent",
        lambda **options: Unroll(GradientDescent(), **{"num_iters": 5, **options}),
        _signals,
        _gradient_descent,
        {"length": ((_randn(3, 7),), ValueError, "y must have 6 entries")},
    ),
    System(
        "accelerated gradient descent",
        lambda **options: Unroll(Momentum(GradientDescent()), **{"num_iters": 5, **options}),
        _signals,
        _accelerated_descent,
        {"length": ((_randn(3, 7),), ValueError, "y must have 6 entries")},
        {"steps.0.offset": FROM_REST},
    ),
    System("README's example", _total_variation, _signals, _primal_dual),
]
