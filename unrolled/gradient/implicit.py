"""`Implicit`: the gradient at a fixed point, by the implicit function theorem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient.contraction import ContractionMeter, Guard
from unrolled.gradient.protocol import (
    Advance,
    bare,
    batch_dims,
    check_differentiable,
    exporting,
    moving,
    one_map,
    put,
    refuse_transforms,
)
from unrolled.gradient.solvers import Anderson, Solution, Solver
from unrolled.stopping import Running

FAR = 0.01  # relative distance from the fixed point above which it warns


@dataclass(frozen=True)
class Implicit:
    r"""The gradient of the fixed point $z = f_\theta(z; c)$, whatever led there: memory O(1), exact at convergence.

    All K iterations run without a graph, one more at their result with one. In the backward pass the gradient u that
    arrives becomes $v = J^\top v + u$ with $J = \partial f / \partial z$, solved by products $J^\top v$; v then goes
    on through that one iteration, to the parameters and to everything that `prepare` computed of the input. The value
    that the network returns is that of iteration K.

    It is right where the iterations contract and have converged. Each object warns once (`GradientWarning`) where the
    last state is more than 1 % away from its fixed point by the measured contraction, and once where the backward
    solver ended above `tol`; both say what to do.

    Needs a tied network; the theorem is about one map. With a stopping rule, every sample has its gradient at the state
    where it stopped. Tensors of the state that are integer, boolean or shared by the batch (counters, momentum
    schedules) count as constants. There are no second derivatives, and no gradients under `torch.func`; compiled and
    exported, it is inference without gradients.

    Args:
        tol: relative residual of v that ends the backward solver, positive. Below ten times the resolution of the dtype
            (1.2e-6 for float32) that bound takes its place.
        max_iters: products $J^\top v$ at most, at least 1.
        solver: `Anderson()`, or `Neumann()`, or any function `solver(g, u, tol, max_iters)` that returns a `Solution`.

    Attributes:
        last_solve: the `Solution` of the latest backward pass, without v: its residual and number of products; None
            before the first.

    Example:
        >>> Implicit(tol=1e-8, solver=Neumann())
        Implicit(tol=1e-08, max_iters=100, solver=Neumann())

    Reference:
        S. Bai, J. Z. Kolter and V. Koltun, "Deep Equilibrium Models", NeurIPS 2019, theorem 1.
    """

    tol: float = 1e-6
    max_iters: int = 100
    solver: Solver = field(default_factory=Anderson)
    needs_tied: ClassVar[bool] = True
    _guard: Guard = field(default_factory=Guard, init=False, repr=False, compare=False)
    _solver_guard: Guard = field(default_factory=Guard, init=False, repr=False, compare=False)
    _solves: list[Solution] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check.real("tol", self.tol, above=0.0)
        _check.integer("max_iters", self.max_iters)
        if isinstance(self.solver, type) or not callable(self.solver):
            raise TypeError(f"solver must be an object such as Anderson() or Neumann(), got {self.solver!r}.")

    @property
    def last_solve(self) -> Solution | None:
        return self._solves[-1] if self._solves else None

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State:
        once = one_map(advance, self)
        check_differentiable(self, state)
        refuse_transforms(self, only_gradients=False)
        state, meter = self._guard.run(advance, state, num_iters, watched=self._guard.due(state))
        if not torch.is_grad_enabled() or exporting():
            return state
        if torch.compiler.is_compiling():
            # Dynamo then runs this call as it is, or repeats the words where it must not (fullgraph=True).
            raise RuntimeError("Implicit cannot be compiled with gradients, only under torch.no_grad().")
        point = bare(state)
        z = [tensor.detach().requires_grad_() for tensor in moving(point)]
        after = moving(once(put(point, z)))
        if meter is not None:
            meter.update(put(point, [tensor.detach() for tensor in after]))
            self._judge(meter, num_iters)
        if not _learns(after, z):
            return state
        equation = _Equation(self, z, after, batch_dims(advance, state))
        out = put(point, _AtFixedPoint.apply(equation, *after))
        return Running(out, state.active) if isinstance(state, Running) else out

    def _judge(self, meter: ContractionMeter, num_iters: int) -> None:
        far = float(meter.distance.nan_to_num(math.inf, posinf=math.inf).max())
        if far <= FAR:
            return
        factor = meter.slowest
        if factor < 1:
            more = num_iters + math.ceil(math.log(FAR / far) / math.log(factor)) if factor > 0 else num_iters + 1
            advice = f"Run about {more} iterations, or take"
        else:
            advice = "There may be no fixed point at all: take"
        self._guard.warn(
            f"{self} after {num_iters} iterations that have not converged: they contract by {factor:.4f} and the last "
            f"state is about {far:.2g} of its norm away from a fixed point (the farthest sample; {FAR:g} is allowed). "
            f"The implicit gradient is right at a fixed point only. {advice} "
            f"Checkpointed({round(math.sqrt(num_iters))}), which is exact for iterations that stop early."
        )

    def _finished(self, solution: Solution, tol: float) -> None:
        """Keep what the backward solver reached, and warn once where it is not enough."""
        self._solves[:] = [solution._replace(v=None)]  # type: ignore[arg-type]  # v would hold its memory
        residual, used = solution.residual, solution.num_iters
        if residual <= tol or self._solver_guard.warned:
            return
        if 0 < residual < 1:
            more = math.ceil(used * math.log(tol) / math.log(residual))
            advice = f"max_iters={more} may do"
            if not isinstance(self.solver, Anderson):
                advice += ", or solver=Anderson(), which takes fewer"
        else:
            advice = "it does not contract"
        self._solver_guard.warn(
            f"{self}: the backward solver stopped at a relative residual of {residual:.2g} after {used} products, "
            f"above tol={tol:g}, so that the gradient is off by about as much or more: {advice}. Where iterations "
            "contract slowly or not at all, Checkpointed is exact."
        )


class _Equation:
    """v = J'v + u at one state: J by the graph of one iteration, vectors as (batch, features) matrices."""

    def __init__(self, strategy: Implicit, z: list[Tensor], after: list[Tensor], batch_dims: int) -> None:
        self.strategy, self.z, self.after = strategy, z, after
        batch = z[0].shape[:batch_dims]
        # Tensors that do not begin with the batch, against the rule, are solved for as one sample.
        self.rows = batch.numel() if all(tensor.shape[:batch_dims] == batch for tensor in z) else 1

    def solve(self, u: Sequence[Tensor]) -> list[Tensor]:
        strategy = self.strategy
        start = self._joined(u)
        tol = max(strategy.tol, 10 * torch.finfo(start.dtype).eps)
        solution = strategy.solver(lambda v: self._transposed(v) + start, start, tol, strategy.max_iters)
        strategy._finished(solution, tol)
        return self._parts(solution.v, self.after)

    def _transposed(self, v: Tensor) -> Tensor:
        reached = [(a, part) for a, part in zip(self.after, self._parts(v, self.after), strict=True) if a.requires_grad]
        outputs, weights = zip(*reached, strict=True)
        found = torch.autograd.grad(outputs, self.z, weights, retain_graph=True, allow_unused=True)
        return self._joined([torch.zeros_like(z) if g is None else g for g, z in zip(found, self.z, strict=True)])

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
        return torch.cat([tensor.reshape(self.rows, -1) for tensor in real], -1)

    def _parts(self, v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        widths = [(2 if tensor.is_complex() else 1) * tensor.numel() // self.rows for tensor in like]
        parts = []
        for part, tensor in zip(v.split(widths, -1), like, strict=True):
            if tensor.is_complex():
                part = torch.view_as_complex(part.reshape(*tensor.shape, 2).contiguous())
            parts.append(part.reshape(tensor.shape).to(tensor.dtype))
        return parts


class _AtFixedPoint(torch.autograd.Function):
    """The fixed point; on the way back, u becomes v before it goes on into the one iteration that has a graph."""

    @staticmethod
    def forward(ctx: Any, equation: _Equation, *after: Tensor) -> tuple[Tensor, ...]:
        ctx.equation = equation
        return tuple(z.detach().clone() for z in equation.z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *u: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.equation.solve(u))


def _learns(after: Sequence[Tensor], own: Sequence[Tensor]) -> bool:
    """Whether the graph leads to any leaf but these: a network that is frozen should return plain tensors."""
    mine = set(map(id, own))
    nodes: list[Any] = [tensor.grad_fn for tensor in after if tensor.grad_fn is not None]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        following = [parent for parent, _ in node.next_functions if parent is not None]
        if not following and id(getattr(node, "variable", None)) not in mine:
            return True
        nodes += following
    return False
