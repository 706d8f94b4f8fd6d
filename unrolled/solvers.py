"""The classical solvers, as plain functions: what the networks are before training, and the oracles of the tests.

All of them are batched over the leading dimensions of y, differentiable by autograd, and answer for every sample
independently of its batch mates. `dictionary` is a matrix (m, n) with atoms as columns or a `LinearOperator`, real or
complex.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from unrolled import _check
from unrolled._tree import State, describe, leaves, map_state
from unrolled.functional import hard_threshold, positive_soft_threshold, soft_threshold, top_k_threshold
from unrolled.operators import Dense, LinearOperator, as_operator


def lipschitz(dictionary: Tensor | LinearOperator) -> Tensor:
    r"""$L = \|D\|_2^2$, the Lipschitz constant of the gradient of $\tfrac12\|y - Dx\|^2$, a differentiable scalar.

    Exact for a matrix; for an operator, the square of its `norm()`.

    Args:
        dictionary: $D$, a matrix (m, n) or a `LinearOperator`.

    Example:
        >>> lipschitz(torch.diag(torch.tensor([1.0, 3.0])))
        tensor(9.)
    """
    return as_operator(dictionary).norm().square()


def lasso_objective(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    x: Tensor,  # (..., n)
    alpha: float | Tensor,
) -> Tensor:  # (...)
    r"""$F(x) = \tfrac12\|y - Dx\|_2^2 + \alpha\|x\|_1$ of every sample.

    scikit-learn's `Lasso(alpha=alpha / m)` minimises the same function, divided by m.

    Args:
        dictionary: $D$, a matrix (m, n) with atoms as columns or a `LinearOperator`.
        y: signals.
        x: codes.
        alpha: weight of the l1 norm, at least 0; a tensor is broadcast to the shape of x.

    Shape:
        - y: (..., m), or (..., *out_shape) for an operator
        - x: (..., n), or (..., *in_shape)
        - output: (...)

    Example:
        >>> lasso_objective(torch.eye(2), torch.tensor([3.0, 0.0]), torch.tensor([1.0, -1.0]), alpha=0.5)
        tensor(3.5000)
    """
    A = as_operator(dictionary)
    _check.finite("y", A.check("y", y, A.out_shape))
    _code("x", x, A, y)
    misfit = (y - A(x)).abs().square().flatten(-len(A.out_shape)).sum(-1) / 2
    return misfit + (_weight(alpha, x) * x.abs()).sum(_event(A))


def ista(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    alpha: float | Tensor,
    *,
    num_iters: int = 100,
    step_size: float | Tensor | None = None,
    x0: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:  # (..., n)
    r"""$x_{k+1} = S_{\alpha s}\bigl(x_k + s D^H (y - D x_k)\bigr)$, iterative soft thresholding.

    Minimises the Lasso, `lasso_objective`, which never increases from one iteration to the next while
    $s \le 1/\|D\|_2^2$. A matrix with $n < 2 m$ is used by way of $D^H D$, once computed, any other by way of the
    residual; the answers agree to rounding.

    Args:
        dictionary: $D$, a matrix (m, n) with atoms as columns or a `LinearOperator`.
        y: signals, with the dtype and device of the dictionary.
        alpha: weight of the l1 norm, at least 0; a tensor is broadcast to the shape of x.
        num_iters: number of iterations, at least 1.
        step_size: $s$, a positive number; $1/\|D\|_2^2$ where not given. From $2/\|D\|_2^2$ on it diverges.
        x0: where to start; 0 where not given.
        tol: relative tolerance: a sample stops once $\|x_{k+1} - x_k\| \le \mathrm{tol}\,\|x_{k+1}\|$. `None` runs all
            iterations.

    Shape:
        - y: (..., m), or (..., *out_shape) for an operator
        - x0, output: (..., n), or (..., *in_shape)

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, NaN or infinity, a number out of its range.

    Example:
        >>> ista(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), alpha=1.0)
        tensor([ 2., -1.,  0.])

    Reference:
        I. Daubechies, M. Defrise and C. De Mol, "An iterative thresholding algorithm for linear inverse problems with
        a sparsity constraint", Communications on Pure and Applied Mathematics 57(11), 2004.
    """
    A, s, x = _start(dictionary, y, step_size, x0)
    theta = _weight(alpha, x) * s
    gradient_step = _gradient_step(A, y, s)

    def update(x: Tensor) -> Tensor:
        return soft_threshold(gradient_step(x), theta)

    return _iterate(update, x, num_iters, tol, _event(A))


class _FISTAState(NamedTuple):
    x: Tensor  # (..., n)
    z: Tensor  # (..., n), the extrapolated point
    t: Tensor  # (..., 1), Nesterov's counter


def fista(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    alpha: float | Tensor,
    *,
    num_iters: int = 100,
    step_size: float | Tensor | None = None,
    x0: Tensor | None = None,
    restart: bool = False,
    tol: float | None = None,
) -> Tensor:  # (..., n)
    r"""$x_k = S_{\alpha s}\bigl(z_k + s D^H (y - D z_k)\bigr),\quad
    t_{k+1} = \tfrac12\bigl(1 + \sqrt{1 + 4 t_k^2}\bigr),\quad
    z_{k+1} = x_k + \tfrac{t_k - 1}{t_{k+1}} (x_k - x_{k-1})$.

    ISTA with Nesterov's extrapolation: its error falls like $1/k^2$ instead of $1/k$, not monotonically.

    Args:
        dictionary, y, alpha, num_iters, x0, tol: as for `ista`.
        step_size: $s$, a positive number, at most $1/\|D\|_2^2$, which is the default.
        restart: forget the momentum of a sample whenever it points uphill, $\langle z_k - x_k, x_k - x_{k-1}\rangle >
            0$; far faster near the solution.

    Shape, Raises: as for `ista`.

    Example:
        >>> fista(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), alpha=1.0, restart=True)
        tensor([ 2., -1.,  0.])

    Reference:
        A. Beck and M. Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems",
        SIAM J. Imaging Sciences 2(1), 2009, equations (4.1) to (4.3). The restart is the gradient scheme of
        B. O'Donoghue and E. Candès, "Adaptive Restart for Accelerated Gradient Schemes", Foundations of Computational
        Mathematics 15, 2015.
    """
    if not isinstance(restart, bool):
        raise TypeError(f"restart must be True or False, got {restart!r}.")
    A, s, x = _start(dictionary, y, step_size, x0)
    theta = _weight(alpha, x) * s
    gradient_step = _gradient_step(A, y, s)
    event = _event(A)

    def update(state: _FISTAState) -> _FISTAState:
        previous, z, t = state
        x = soft_threshold(gradient_step(z), theta)
        t_next = (1 + torch.sqrt(1 + 4 * t.square())) / 2
        momentum = (t - 1) / t_next
        if restart:
            uphill = ((z - x).conj() * (x - previous)).real.sum(event, keepdim=True) > 0
            momentum = torch.where(uphill, 0.0, momentum)
            t_next = torch.where(uphill, 1.0, t_next)
        return _FISTAState(x, x + momentum * (x - previous), t_next)

    t = torch.ones_like(x.real.sum(event, keepdim=True))
    return _iterate(update, _FISTAState(x, x, t), num_iters, tol, event)


def iht(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    sparsity: int,
    *,
    num_iters: int = 100,
    step_size: float | Tensor | None = None,
    x0: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:  # (..., n)
    r"""$x_{k+1} = H_M\bigl(x_k + s D^H (y - D x_k)\bigr)$, $H_M$ keeping the $M$ entries of largest modulus.

    Iterative hard thresholding: seeks $\min_x \|y - Dx\|^2$ over codes with at most $M$ nonzeros. It finds a local
    minimum, which depends on `x0`.

    Args:
        dictionary, y, num_iters, x0, tol: as for `ista`.
        sparsity: $M$, from 1 to n: the entries that a sample may have.
        step_size: $s$, a positive number, at most $1/\|D\|_2^2$, which is the default.

    Shape, Raises: as for `ista`.

    Example:
        >>> iht(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), sparsity=2)
        tensor([ 3., -2.,  0.])

    Reference:
        T. Blumensath and M. Davies, "Iterative Hard Thresholding for Compressed Sensing", Applied and Computational
        Harmonic Analysis 27(3), 2009.
    """
    A, s, x = _start(dictionary, y, step_size, x0)
    event = _event(A)
    size = torch.Size(A.in_shape).numel()
    if _check.integer("sparsity", sparsity) > size:
        raise ValueError(f"sparsity must be at most {size}, the number of entries of a code, got {sparsity}.")
    gradient_step = _gradient_step(A, y, s)

    def update(x: Tensor) -> Tensor:
        return top_k_threshold(gradient_step(x).flatten(event[0]), sparsity).unflatten(-1, A.in_shape)

    return _iterate(update, x, num_iters, tol, event)


def iht_penalized(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    alpha: float | Tensor,
    *,
    num_iters: int = 100,
    step_size: float | Tensor | None = None,
    x0: Tensor | None = None,
    tol: float | None = None,
) -> Tensor:  # (..., n)
    r"""$x_{k+1} = H_{\sqrt{2 \alpha s}}\bigl(x_k + s D^H (y - D x_k)\bigr)$, $H_\theta$ keeping what exceeds $\theta$.

    Seeks $\min_x \tfrac12\|y - Dx\|^2 + \alpha\|x\|_0$. It finds a local minimum, which depends on `x0`.

    Args:
        dictionary, y, num_iters, x0, tol: as for `ista`.
        alpha: the price of one nonzero, at least 0, in the units of $\|y\|^2$; a tensor is broadcast to the shape of x.
        step_size: $s$, a positive number, at most $1/\|D\|_2^2$, which is the default.

    Shape, Raises: as for `ista`.

    Example:
        >>> iht_penalized(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), alpha=0.5)
        tensor([ 3., -2.,  0.])

    Reference:
        T. Blumensath and M. Davies, "Iterative Thresholding for Sparse Approximations", Journal of Fourier Analysis
        and Applications 14, 2008.
    """
    A, s, x = _start(dictionary, y, step_size, x0)
    theta = (2 * _weight(alpha, x) * s) ** 0.5
    gradient_step = _gradient_step(A, y, s)

    def update(x: Tensor) -> Tensor:
        return hard_threshold(gradient_step(x), theta)

    return _iterate(update, x, num_iters, tol, _event(A))


class _AMPState(NamedTuple):
    x: Tensor  # (..., n)
    v: Tensor  # (..., m), the corrected residual


def amp(
    dictionary: Tensor | LinearOperator,  # (m, n), atoms as columns
    y: Tensor,  # (..., m)
    *,
    num_iters: int = 30,
    threshold: float = 1.1402,
    tol: float | None = None,
) -> Tensor:  # (..., n)
    r"""$v_{k+1} = y - D x_k + \tfrac{\|x_k\|_0}{m} v_k,\quad x_{k+1} = S_\theta(x_k + D^T v_{k+1}),\quad
    \theta = \lambda \|v_{k+1}\|_2 / \sqrt m$, approximate message passing.

    Recovers sparse codes from few measurements in tens of iterations, where ISTA takes thousands. Made for large
    dictionaries with independent entries and atoms of norm 1; for others it may diverge.

    Args:
        dictionary, y, num_iters, tol: as for `ista`, but real.
        threshold: $\lambda$, positive, in standard deviations of the noise that the iteration sees; the default suits
            codes with 10 % nonzeros at m / n = 1/2.

    Shape, Raises: as for `ista`; a complex `y` is a TypeError.

    Example:
        >>> amp(torch.eye(3), torch.tensor([3.0, 0.0, 0.0]), num_iters=1)
        tensor([1.0251, 0.0000, 0.0000])

    Reference:
        D. L. Donoho, A. Maleki and A. Montanari, "Message-passing algorithms for compressed sensing", Proceedings of
        the National Academy of Sciences 106(45), 2009, equations [1] and [2].
    """
    A, _, x = _start(dictionary, y, 1.0, None)
    if y.is_complex():
        raise TypeError(f"y is {y.dtype}: amp is for real signals, as complex ones need another correction term.")
    _check.real("threshold", threshold, above=0.0)
    m = torch.Size(A.out_shape).numel()

    per_code, per_signal = ((...,) + (None,) * len(shape) for shape in (A.in_shape, A.out_shape))

    def update(state: _AMPState) -> _AMPState:
        x, v = state
        slope = (x != 0).sum(_event(A)).to(y.dtype) / m
        v = y - A(x) + slope[per_signal] * v
        theta = threshold * torch.linalg.vector_norm(v.flatten(-len(A.out_shape)), dim=-1) / m**0.5
        return _AMPState(soft_threshold(x + A.adjoint(v), theta[per_code]), v)

    return _iterate(update, _AMPState(x, torch.zeros_like(y)), num_iters, tol, _event(A))


def _gradient_step(A: LinearOperator, y: Tensor, s: float | Tensor) -> Callable[[Tensor], Tensor]:
    """The map x -> x + s D^H (y - D x), in the cheaper of its two forms."""
    if isinstance(A, Dense) and 2 * A.out_shape[0] > A.in_shape[0]:  # n n < 2 m n multiplications a sample
        D = A.matrix
        S = torch.eye(D.shape[1], dtype=D.dtype, device=D.device) - s * (D.mH @ D)
        b = s * A.adjoint(y)
        return lambda x: b + linear(x, S)
    return lambda x: x + s * A.adjoint(y - A(x))


def _iterate(
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


def _start(
    dictionary: Tensor | LinearOperator, y: Tensor, step_size: float | Tensor | None, x0: Tensor | None
) -> tuple[LinearOperator, float | Tensor, Tensor]:
    """Check what all solvers take; return the operator, the step size s and the first x."""
    A = as_operator(dictionary)
    _check.finite("y", A.check("y", y, A.out_shape))
    if x0 is None:
        x0 = y.new_zeros(*_batch(y, A.out_shape), *A.in_shape)
    else:
        _check.finite("x0", _code("x0", x0, A, y))
    if step_size is not None:
        return A, _number("step_size", step_size, x0, shape=(), positive=True), x0
    L = A.norm().square().to(y.real.dtype)
    if _check.can_look_at(L) and not bool(L > 0):
        raise ValueError("dictionary is zero everywhere, so that its norm gives no step size. Check how it was made.")
    return A, 1 / L, x0


def _code(name: str, x: Tensor, A: LinearOperator, y: Tensor) -> Tensor:
    """Return x if it is a batch of codes that fits the batch of signals y."""
    A.check(name, x, A.in_shape)
    same_dtype = x.dtype == y.dtype or torch.is_autocast_enabled(x.device.type)
    if _batch(x, A.in_shape) != _batch(y, A.out_shape) or not same_dtype or x.device != y.device:
        raise ValueError(
            f"{name} must be like y, {describe(y)}, in batch dimensions, dtype and device, got {describe(x)}."
        )
    return x


def _number(
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


def _weight(alpha: float | Tensor, x: Tensor) -> float | Tensor:
    return _number("alpha", alpha, x, shape=tuple(x.shape))


def _batch(value: Tensor, event_shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value.shape[: value.dim() - len(event_shape)])


def _event(A: LinearOperator) -> tuple[int, ...]:
    """The dimensions of one code: (-1,) for a matrix."""
    return tuple(range(-len(A.in_shape), 0))


# ---- Low rank and sparse parts ---------------------------------------------------------------------------------------


class Decomposition(NamedTuple):
    """A signal as a low-rank part plus a sparse part, and the code of the former: $x \\approx D s + o$."""

    low_rank: Tensor  # D s, (..., m)
    sparse: Tensor  # o, (..., m)
    code: Tensor  # s, (..., q)


def separation_objective(
    dictionary: Tensor,  # (m, q)
    x: Tensor,  # (..., m)
    code: Tensor,  # (..., q)
    sparse: Tensor,  # (..., m)
    *,
    ridge: float,
    alpha: float,
) -> Tensor:  # (...)
    r"""$F(s, o) = \tfrac12\|x - D s - o\|_2^2 + \tfrac{\lambda_*}{2}\|s\|_2^2 + \lambda\|o\|_1$ of every sample.

    With the ridge on $D$ too, the least value over all $D$ and codes is that of robust PCA with a nuclear norm: that of
    $L$ is the least $\tfrac12(\|D\|_F^2 + \|S\|_F^2)$ over all $D S = L$.

    Args:
        dictionary: $D$, real.
        x: signals.
        code: $s$, the coefficients of the low-rank part.
        sparse: $o$, the sparse part.
        ridge: $\lambda_*$, at least 0.
        alpha: $\lambda$, at least 0.

    Shape:
        - dictionary: (m, q); x, sparse: (..., m); code: (..., q)
        - output: (...)

    Raises:
        TypeError, ValueError: as for `separate`.

    Example:
        >>> separation_objective(
        ...     torch.eye(2), torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]),
        ...     ridge=0.5, alpha=0.25,
        ... )
        tensor(1.)
    """
    D = _check.dictionary("dictionary", dictionary)
    m, q = D.shape
    ridge, alpha = _check.real("ridge", ridge, minimum=0.0), _check.real("alpha", alpha, minimum=0.0)
    _check.signals("x", x, D, m, of="the dictionary")
    _check.signals("code", code, D, q, of="the dictionary")
    _check.signals("sparse", sparse, D, m, of="the dictionary")
    misfit = (x - linear(code, D) - sparse).square().sum(-1) / 2
    return misfit + ridge / 2 * code.square().sum(-1) + alpha * sparse.abs().sum(-1)


def separate(
    dictionary: Tensor,  # (m, q)
    x: Tensor,  # (..., m)
    *,
    ridge: float,
    alpha: float,
    nonnegative: bool = False,
    num_iters: int = 100,
    tol: float | None = None,
) -> Decomposition:
    r"""$r_k = x - D s_k - o_k,\quad s_{k+1} = \tfrac{s_k + D^T r_k / L}{1 + \lambda_*/L},\quad
    o_{k+1} = S_{\lambda/L}(o_k + r_k / L)$ with $L = \|D\|_2^2 + 1$.

    The proximal gradient method for `separation_objective`, which never increases. $L$ is the squared norm of
    $[D, I]$. With `nonnegative`, both are cut off below zero: $s$ before it shrinks, and $o$ as
    $[o_k + r_k/L - \lambda/L]_+$.

    Args:
        dictionary: $D$, real.
        x: signals, with the dtype and device of the dictionary.
        ridge: $\lambda_*$, at least 0.
        alpha: $\lambda$, at least 0.
        nonnegative: whether $s, o \ge 0$.
        num_iters: number of iterations, at least 1.
        tol: as for `ista`, on code and sparse part together.

    Shape:
        - dictionary: (m, q); x: (..., m)
        - output: a `Decomposition`: low_rank (..., m), sparse (..., m), code (..., q)

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not fit, NaN or infinity, a number out of its range.

    Example:
        >>> constant = torch.ones(4, 1) / 2
        >>> parts = separate(constant, torch.tensor([1.0, 1.0, 6.0, 1.0]), ridge=0.0, alpha=0.3)
        >>> parts.low_rank, parts.sparse
        (tensor([1.1000, 1.1000, 1.1000, 1.1000]), tensor([0.0000, 0.0000, 4.6000, 0.0000]))

    Reference:
        P. Sprechmann, A. M. Bronstein and G. Sapiro, "Learning Efficient Sparse and Low Rank Models", IEEE Transactions
        on Pattern Analysis and Machine Intelligence 37(9), 2015.
    """
    D = _check.dictionary("dictionary", dictionary)
    m, q = D.shape
    ridge, alpha = _check.real("ridge", ridge, minimum=0.0), _check.real("alpha", alpha, minimum=0.0)
    _check.signals("x", x, D, m, of="the dictionary")
    L = lipschitz(D) + 1

    def update(z: Tensor) -> Tensor:
        code, sparse = z.split([q, m], dim=-1)
        residual = x - linear(code, D) - sparse
        code = code + linear(residual, D.mT) / L
        sparse = sparse + residual / L
        if nonnegative:
            code, sparse = code.relu(), positive_soft_threshold(sparse, alpha / L)
        else:
            sparse = soft_threshold(sparse, alpha / L)
        return torch.cat([code / (1 + ridge / L), sparse], dim=-1)

    z = _iterate(update, x.new_zeros(*x.shape[:-1], q + m), num_iters, tol, (-1,))
    code, sparse = z.split([q, m], dim=-1)
    return Decomposition(linear(code, D), sparse, code)


def nonnegative_ista(
    dictionary: Tensor,  # (m, q)
    x: Tensor,  # (..., m)
    alpha: float,
    *,
    num_iters: int = 100,
    tol: float | None = None,
) -> Tensor:  # (..., q)
    r"""$s_{k+1} = \bigl[s_k + \tfrac1L D^T (x - D s_k) - \tfrac{\alpha}{L}\bigr]_+$ with $L = \|D\|_2^2$.

    The proximal gradient method for $\min_{s \ge 0} \tfrac12\|x - D s\|^2 + \alpha\|s\|_1$: the codes of a nonnegative
    matrix factorisation, or with $\alpha = 0$ nonnegative least squares.

    Args:
        dictionary: $D$, real.
        x: signals, with the dtype and device of the dictionary.
        alpha: weight of the l1 norm, at least 0.
        num_iters: number of iterations, at least 1.
        tol: as for `ista`.

    Shape:
        - dictionary: (m, q); x: (..., m)
        - output: (..., q)

    Raises:
        TypeError, ValueError: as for `separate`.

    Example:
        >>> nonnegative_ista(torch.eye(3), torch.tensor([3.0, -2.0, 0.5]), alpha=1.0)
        tensor([2., 0., 0.])
    """
    D = _check.dictionary("dictionary", dictionary)
    alpha = _check.real("alpha", alpha, minimum=0.0)
    _check.signals("x", x, D, len(D), of="the dictionary")
    L = lipschitz(D)

    def update(code: Tensor) -> Tensor:
        return positive_soft_threshold(code + linear(x - linear(code, D), D.mT) / L, alpha / L)

    return _iterate(update, x.new_zeros(*x.shape[:-1], D.shape[1]), num_iters, tol, (-1,))


class RobustPCAResult(NamedTuple):
    """A matrix as the sum of one of low rank and a sparse one, and how many iterations that took."""

    low_rank: Tensor  # L, (m, n)
    sparse: Tensor  # S, (m, n)
    num_iters: int


def singular_value_threshold(matrix: Tensor, threshold: float | Tensor) -> Tensor:
    r"""$U\,[\Sigma - t]_+ V^H$ where $X = U \Sigma V^H$: the proximal operator of $t$ times the nuclear norm.

    Args:
        matrix: real or complex, or a batch of matrices.
        threshold: $t \ge 0$, a float or a tensor without dimensions.

    Shape:
        - matrix, output: (..., m, n)

    Raises:
        TypeError, ValueError: `matrix` has less than two dimensions or is not finite, a negative float.

    Example:
        >>> singular_value_threshold(torch.diag(torch.tensor([3.0, 1.0])), 2.0)
        tensor([[1., 0.],
                [0., 0.]])

    Reference:
        J.-F. Cai, E. J. Candès and Z. Shen, "A Singular Value Thresholding Algorithm for Matrix Completion", SIAM
        Journal on Optimization 20(4), 2010.
    """
    _check.finite("matrix", _check.tensor("matrix", matrix, allow_complex=True))
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have shape (..., m, n), got {tuple(matrix.shape)}.")
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U * positive_soft_threshold(s, threshold).unsqueeze(-2)) @ Vh


@torch.no_grad()
def robust_pca(
    matrix: Tensor,  # (m, n)
    alpha: float | None = None,
    *,
    num_iters: int = 100,
    tol: float | None = None,
) -> RobustPCAResult:
    r"""$L_{k+1} = \mathrm{SVT}_{1/\mu}(M - S_k + Y_k/\mu),\quad S_{k+1} = S_{\alpha/\mu}(M - L_{k+1} + Y_k/\mu),\quad
    Y_{k+1} = Y_k + \mu (M - L_{k+1} - S_{k+1}),\quad \mu \leftarrow 1.5\,\mu$.

    Robust PCA, also called principal component pursuit, $\min \|L\|_* + \alpha\|S\|_1$ subject to $L + S = M$, by the
    inexact method of augmented Lagrange multipliers. Where the rank of $L$ and the number of nonzeros of $S$ are small
    enough, and neither looks like the other, it recovers both exactly. Each iteration takes a singular value
    decomposition of the whole matrix. Samples may be its rows or its columns.

    No gradient flows through it.

    Args:
        matrix: $M$, real or complex, not zero everywhere.
        alpha: weight of the l1 norm, positive; $1/\sqrt{\max(m, n)}$ where not given, with which the theorem holds.
        num_iters: the most iterations, at least 1.
        tol: ends once $\|M - L - S\|_F \le \mathrm{tol}\,\|M\|_F$, positive; where not given $10^{-7}$, in half and
            single precision the square root of their machine epsilon (3e-4).

    Returns:
        A `RobustPCAResult`: low_rank and sparse, both (m, n), and num_iters, the iterations that ran. They sum to the
        matrix up to the tolerance.

    Raises:
        TypeError, ValueError: `matrix` is no finite matrix or zero everywhere, a number is out of its range.

    Example:
        >>> low_rank = torch.ones(20, 20)
        >>> sparse = torch.zeros(20, 20).index_put_((torch.arange(20), torch.arange(20)), torch.tensor(5.0))
        >>> parts = robust_pca(low_rank + sparse, tol=1e-5)
        >>> bool((parts.low_rank - low_rank).abs().max() < 1e-3)
        True

    Reference:
        Z. Lin, M. Chen and Y. Ma, "The Augmented Lagrange Multiplier Method for Exact Recovery of Corrupted Low-Rank
        Matrices", arXiv:1009.5055, 2010. The theorem is of E. J. Candès, X. Li, Y. Ma and J. Wright, "Robust Principal
        Component Analysis?", Journal of the ACM 58(3), 2011.
    """
    M = _check.finite("matrix", _check.tensor("matrix", matrix, allow_complex=True))
    if M.dim() != 2:
        raise ValueError(f"matrix must have shape (m, n), got {tuple(M.shape)}. Flatten samples into its rows.")
    if not bool(M.any()):
        raise ValueError("matrix is zero everywhere: there is nothing to decompose. Check how it was made.")
    num_iters = _check.integer("num_iters", num_iters)
    alpha = max(M.shape) ** -0.5 if alpha is None else _check.real("alpha", alpha, above=0.0)
    tol = max(1e-7, torch.finfo(M.dtype).eps ** 0.5) if tol is None else _check.real("tol", tol, above=0.0)
    norm = torch.linalg.matrix_norm(M, 2)
    size = torch.linalg.matrix_norm(M)
    Y = M / torch.maximum(norm, M.abs().max() / alpha)
    S = torch.zeros_like(M)
    mu = 1.25 / norm
    largest = 1e7 * mu
    k = 0
    residual = M
    while k < num_iters and bool(torch.linalg.matrix_norm(residual) > tol * size):
        L = singular_value_threshold(M - S + Y / mu, 1 / mu)
        S = soft_threshold(M - L + Y / mu, alpha / mu, inplace=True)
        residual = M - L - S
        Y += mu * residual
        mu = torch.minimum(1.5 * mu, largest)
        k += 1
    return RobustPCAResult(L, S, k)


def mean_field(
    logits: Tensor,  # (..., L, N)
    kernels: Sequence[Tensor],  # (..., N, N) each
    weights: Sequence[float | Tensor],
    *,
    compatibility: Tensor | None = None,  # (L, L)
    num_iters: int = 5,
    damping: float = 0.0,
) -> Tensor:  # (..., L, N)
    r"""$u_{k+1} = U - \sum_m \mu\, W_m\, \mathrm{softmax}(u_k)\, K_m^T$, from $u_0 = U$.

    Mean-field inference in a fully connected CRF of N pixels and L classes, with its kernels as matrices.

    Args:
        logits: $U$, the negative unary energies.
        kernels: $K_m$, normalised as wanted: $n^{-1} \odot K$ with $n = K 1$ for averages over the neighbours.
        weights: $W_m$, for each kernel a number, one a class (L,), or a matrix (L, L).
        compatibility: $\mu$, what a class costs next to another; Potts' $-I$ where not given.
        num_iters: number of iterations, at least 1.
        damping: how much of the last iterate stays, at least 0 and less than 1.

    Shape:
        - logits, output: (..., L, N)

    Raises:
        TypeError, ValueError: `logits` is not finite or has less than two dimensions, `kernels` and `weights` differ
            in number, `damping` or `num_iters` is out of range.

    Example:
        >>> smooth = torch.full((3, 3), 1 / 3)
        >>> noisy = torch.tensor([[2.0, 2.0, -1.0], [0.0, 0.0, 0.0]])  # the third pixel disagrees
        >>> mean_field(noisy, [smooth], [10.0]).argmax(0)
        tensor([0, 0, 0])

    Reference:
        P. Krähenbühl and V. Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
        NIPS 2011.
    """
    _check.finite("logits", _check.tensor("logits", logits))
    if logits.dim() < 2:
        raise ValueError(f"logits must have shape (..., L, N), got {tuple(logits.shape)}.")
    if len(kernels) != len(weights):
        raise ValueError(f"There are {len(kernels)} kernels and {len(weights)} weights: pass one weight a kernel.")
    num_iters = _check.integer("num_iters", num_iters)
    if not 0 <= _check.real("damping", damping) < 1:
        raise ValueError(f"damping must be at least 0 and less than 1, got {damping}.")
    mu = -torch.eye(logits.shape[-2]).to(logits) if compatibility is None else compatibility
    matrices = []
    for weight in weights:
        w = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
        matrices.append(w if w.dim() == 2 else torch.diag(w.expand(logits.shape[-2])))
    u = logits
    for _ in range(num_iters):
        q = u.softmax(-2)
        messages = sum(w @ (q @ kernel.mT) for w, kernel in zip(matrices, kernels, strict=True))
        u = damping * u + (1 - damping) * (logits - mu @ messages)
    return u
