"""What the solvers share: the loop, the doors, the gradient step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from unrolled import _check
from unrolled._tree import State, describe, leaves, map_state
from unrolled.operators import Dense, LinearOperator, as_operator


def gradient_map(A: LinearOperator, y: Tensor, s: float | Tensor) -> Callable[[Tensor], Tensor]:
    """The map x -> x + s D^H (y - D x), in the cheaper of its two forms."""
    if isinstance(A, Dense) and 2 * A.out_shape[0] > A.in_shape[0]:  # n n < 2 m n multiplications a sample
        D = A.matrix
        S = torch.eye(D.shape[1], dtype=D.dtype, device=D.device) - s * (D.mH @ D)
        b = s * A.adjoint(y)
        return lambda x: b + linear(x, S)
    return lambda x: x + s * A.adjoint(y - A(x))


def iterate(
    update: Callable[[State], State], state: State, num_iters: int, tol: float | None, event: tuple[int, ...]
) -> Tensor:
    """Apply `update` again and again; return the state's first tensor. A sample that has settled stays as it is."""
    num_iters = _check.integer("num_iters", num_iters)
    tol = None if tol is None else _check.real("tol", tol, above=0.0)
    previous = next(leaves(state)).detach()
    settled = torch.zeros((), dtype=torch.bool, device=previous.device)
    for _ in range(num_iters):
        new = update(state)
        if tol is not None:
            new = map_state(lambda after, before, done=settled: torch.where(done, before, after), new, state)
            x = next(leaves(new)).detach()
            change, size = (torch.linalg.vector_norm(v, dim=event, keepdim=True) for v in (x - previous, x))
            # A diverging sample must not count as settled because inf <= inf.
            previous, settled = x, (change <= tol * size) & size.isfinite()
            if _check.can_look_at(settled) and bool(settled.all()):
                return next(leaves(new))
        state = new
    return next(leaves(state))


def start(
    dictionary: Tensor | LinearOperator, y: Tensor, step_size: float | Tensor | None, x0: Tensor | None
) -> tuple[LinearOperator, float | Tensor, Tensor]:
    """Check what all solvers take; return the operator, the step size s and the first x."""
    A = as_operator(dictionary)
    _check.finite("y", A.check("y", y, A.out_shape))
    if x0 is None:
        x0 = y.new_zeros(*batch_shape(y, A.out_shape), *A.in_shape)
    else:
        _check.finite("x0", checked_code("x0", x0, A, y))
    if step_size is not None:
        return A, checked_number("step_size", step_size, x0, shape=(), positive=True), x0
    L = A.norm().square().to(y.real.dtype)
    if _check.can_look_at(L) and not bool(L > 0):
        raise ValueError("dictionary is zero everywhere, so that its norm gives no step size. Check how it was made.")
    return A, 1 / L, x0


def checked_code(name: str, x: Tensor, A: LinearOperator, y: Tensor) -> Tensor:
    """Return x if it is a batch of codes that fits the batch of signals y."""
    A.check(name, x, A.in_shape)
    same_dtype = x.dtype == y.dtype or torch.is_autocast_enabled(x.device.type)
    if batch_shape(x, A.in_shape) != batch_shape(y, A.out_shape) or not same_dtype or x.device != y.device:
        raise ValueError(
            f"{name} must be like y, {describe(y)}, in batch dimensions, dtype and device, got {describe(x)}."
        )
    return x


def checked_number(
    name: str, value: float | Tensor, like: Tensor, *, shape: tuple[int, ...], positive: bool = False
) -> float | Tensor:
    """Return `value` if it is a number, or a tensor that broadcasts to `shape`, of at least 0 (or more than 0)."""
    if not isinstance(value, Tensor):
        return _check.real(name, value, above=0.0) if positive else _check.real(name, value, minimum=0.0)
    _check.finite(name, _check.tensor(name, value))
    if value.dtype != like.real.dtype or value.device != like.device:
        raise TypeError(f"{name} must be {like.real.dtype} on {like.device} like y, got {describe(value)}.")
    fits = len(value.shape) <= len(shape) and all(
        a in (1, b) for a, b in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must be a number or a tensor that broadcasts to {shape}, got {describe(value)}.")
    if _check.can_look_at(value) and bool((value <= 0 if positive else value < 0).any()):
        raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'}, got {value.min().item():g}.")
    return value


def checked_weight(alpha: float | Tensor, x: Tensor) -> float | Tensor:
    return checked_number("alpha", alpha, x, shape=tuple(x.shape))


def batch_shape(value: Tensor, event_shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value.shape[: value.dim() - len(event_shape)])


def event_dims(A: LinearOperator) -> tuple[int, ...]:
    """The dimensions of one code: (-1,) for a matrix."""
    return tuple(range(-len(A.in_shape), 0))
