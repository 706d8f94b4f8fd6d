"""Thresholds, projections and the operator norm: the plain functions that every iteration is made of.

Every result has the dtype of `x`: thresholds given as tensors are converted to it. Thresholds are floats (checked) or
tensors that broadcast with `x` and are non-negative by construction, e.g. the exp of a parameter. Tensors are not
looked at, because these functions run once per iteration and a look would cost as much as the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unrolled import _check


def soft_threshold(x: Tensor, threshold: float | Tensor, *, inplace: bool = False) -> Tensor:
    r"""$S_t(x) = \mathrm{sgn}(x) \max(|x| - t, 0)$, the proximal operator of $t\,|x|$.

    For complex `x`, $\mathrm{sgn}(x) = x / |x|$: the modulus shrinks, the phase stays. Where the result is 0, so is the
    gradient, also at the kinks and at a complex 0.

    Args:
        x: real or complex tensor.
        threshold: $t \ge 0$, a float or a real tensor that broadcasts with `x`.
        inplace: whether `x` may be overwritten, which saves memory traffic where no gradient is asked for. Its shape
            must then be that of the output.

    Shape:
        - Output: the shapes of `x` and `threshold` broadcast together, with the dtype of `x`.

    Raises:
        ValueError, TypeError: for a negative or non-finite float, a complex threshold, an `x` of integers.

    Example:
        >>> soft_threshold(torch.tensor([-2.0, -0.5, 0.0, 1.0]), 0.75)
        tensor([-1.2500,  0.0000,  0.0000,  0.2500])

    Reference:
        D. L. Donoho, "De-noising by soft-thresholding", IEEE Transactions on Information Theory 41(3), 1995.
    """
    _check.tensor("x", x, allow_complex=True)
    t = _threshold("threshold", threshold, x)
    if x.is_complex():
        x = _without_subnormals(x)
        return torch.sgn(x) * torch.relu(x.abs() - t)
    # Two forms that agree to the last bit. Forward and backward with a learned threshold on (1024, 500) took 1.6 ms by
    # relus, 1.9 ms by sign * relu and 6.5 ms by clamp, whose backward with tensor bounds is slow. Where no gradient is
    # asked for, clamp needs half the time of the relus; finishing in its own memory saves an allocation.
    if torch.is_grad_enabled() and (x.requires_grad or (isinstance(t, Tensor) and t.requires_grad)):
        return torch.relu(x - t) - torch.relu(-x - t)
    clamped = torch.clamp(x, -t, t)  # type: ignore[arg-type]  # both bounds are of one kind
    return x.sub_(clamped) if inplace else clamped.neg_().add_(x)


def positive_soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    r"""$S^+_t(x) = \max(x - t, 0)$, the proximal operator of $t\,x$ on $x \ge 0$.

    Args:
        x: real tensor.
        threshold: $t \ge 0$, a float or a real tensor that broadcasts with `x`.

    Shape:
        - Output: the shapes of `x` and `threshold` broadcast together, with the dtype of `x`.

    Raises:
        ValueError, TypeError: for a negative or non-finite float, a complex or integer `x`, a complex threshold.

    Example:
        >>> positive_soft_threshold(torch.tensor([-2.0, 0.5, 1.0]), 0.75)
        tensor([0.0000, 0.0000, 0.2500])
    """
    _check.tensor("x", x)
    return torch.relu(x - _threshold("threshold", threshold, x))


def hard_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    r"""$H_t(x) = x$ where $|x| > t$, else $0$: the proximal operator of $\lambda \|x\|_0$ with $t = \sqrt{2\lambda}$.

    The gradient passes where `x` is kept. None reaches the threshold: the derivative to it is 0 almost everywhere.

    Args:
        x: real or complex tensor.
        threshold: $t \ge 0$, a float or a real tensor that broadcasts with `x`.

    Shape:
        - Output: the shapes of `x` and `threshold` broadcast together, with the dtype of `x`.

    Raises:
        ValueError, TypeError: for a negative or non-finite float, a complex threshold, an `x` of integers.

    Example:
        >>> hard_threshold(torch.tensor([-2.0, 0.5, 1.0]), 0.75)
        tensor([-2.,  0.,  1.])

    Reference:
        T. Blumensath and M. E. Davies, "Iterative thresholding for sparse approximations", Journal of Fourier Analysis
        and Applications 14, 2008.
    """
    _check.tensor("x", x, allow_complex=True)
    # Asking what to drop, not what to keep, lets NaN through.
    return torch.where(x.detach().abs() <= _threshold("threshold", threshold, x), 0.0, x)


def helu(x: Tensor, threshold: float | Tensor, slope: float | Tensor) -> Tensor:
    r"""$h(x) = 0$ up to $|x| = (1 - s) t$, $x$ from $|x| = t$ on, $\mathrm{sgn}(x)\,(|x| - (1 - s) t) / s$ in between.

    The hard threshold with its jump replaced by a ramp, so that a gradient reaches the threshold: there
    $\partial h / \partial t = -\mathrm{sgn}(x) (1 - s) / s$. At $s = 0$ it is `hard_threshold`, at $s = 1$ the
    identity, and in between `firm_threshold` from $(1 - s) t$ to $t$.

    Args:
        x: real or complex tensor.
        threshold: $t \ge 0$, a float or a real tensor that broadcasts with `x`.
        slope: $s$, the width of the ramp as a fraction of the threshold, from 0 to 1; a float or a real tensor that
            broadcasts with `x`.

    Shape:
        - Output: the shapes of all three broadcast together, with the dtype of `x`.

    Raises:
        ValueError, TypeError: for a negative or non-finite float, a slope above 1, complex thresholds or slopes, an `x`
            of integers.

    Example:
        >>> helu(torch.tensor([-2.0, 0.5, 0.875, 1.0]), 1.0, 0.25)
        tensor([-2.0000,  0.0000,  0.5000,  1.0000])

    Reference:
        Z. Wang, Q. Ling and T. S. Huang, "Learning Deep l0 Encoders", AAAI 2016.
    """
    _check.tensor("x", x, allow_complex=True)
    t, s = _threshold("threshold", threshold, x), _threshold("slope", slope, x)
    if isinstance(s, float):
        if s > 1:
            raise ValueError(f"slope must be at most 1, got {slope}. It is a fraction of the threshold.")
        if s == 0:
            return hard_threshold(x, t)
    if x.is_complex():
        x = _without_subnormals(x)
    modulus = x.abs()
    # Cut off at t, so that the ramp is finite, and its derivatives too, where x is taken in its place. At s = 0, which
    # a tensor may hold, nothing rises above 0.
    ceiling = modulus.clamp(max=t) if isinstance(t, float) else torch.minimum(modulus, t)
    height = torch.relu(ceiling - (1 - s) * t)
    ramp = height / (s.clamp(min=torch.finfo(s.dtype).eps) if isinstance(s, Tensor) else s)
    return torch.where(modulus > t, x, torch.sgn(x) * ramp)


def firm_threshold(x: Tensor, lower: float | Tensor, upper: float | Tensor) -> Tensor:
    r"""$F(x) = 0$ up to $|x| = l$, $x$ from $|x| = u$ on, and $\mathrm{sgn}(x)\,u\,(|x| - l) / (u - l)$ in between.

    Firm shrinkage is continuous like the soft threshold (its limit for $u \to \infty$) and leaves large values unbiased
    like the hard one (its limit for $u \to l$).

    Args:
        x: real or complex tensor.
        lower: $l \ge 0$, a float or a real tensor that broadcasts with `x`.
        upper: $u > l$, finite, a float or a real tensor that broadcasts with `x`.

    Shape:
        - Output: the shapes of all three broadcast together, with the dtype of `x`.

    Raises:
        ValueError, TypeError: for floats that are not $0 \le l < u < \infty$, complex thresholds, an `x` of integers.

    Example:
        >>> firm_threshold(torch.tensor([0.5, -1.5, 3.0]), 1.0, 2.0)
        tensor([ 0., -1.,  3.])

    Reference:
        H.-Y. Gao and A. G. Bruce, "WaveShrink with firm shrinkage", Statistica Sinica 7, 1997.
    """
    _check.tensor("x", x, allow_complex=True)
    l, u = _threshold("lower", lower, x), _threshold("upper", upper, x)
    if isinstance(l, float) and isinstance(u, float):
        _check.real("upper", u, above=l, hint="It must exceed lower; for lower = upper take hard_threshold.")
    if x.is_complex():
        x = _without_subnormals(x)
    modulus = x.abs()
    # The middle line lies below |x| before u and above it behind, so that the smaller one is the right one.
    return torch.sgn(x) * torch.minimum(modulus, torch.relu(modulus - l) * (u / (u - l)))


def double_tanh(x: Tensor, threshold: float | Tensor) -> Tensor:
    r"""$\tanh(x + u) + \tanh(x - u)$, a smooth shrinkage with plateaus at -2, 0 and 2.

    Odd and increasing. Its slope at 0 is $2 (1 - \tanh^2 u)$, never 0: small values become smaller but not zero, and
    that only where $u > \mathrm{artanh}(1/\sqrt2) \approx 0.88$. Unlike the thresholds it has a scale of its own: it
    stays below 2, so that the units of `x` matter.

    Args:
        x: real tensor.
        threshold: $u \ge 0$, a float or a real tensor that broadcasts with `x`.

    Shape:
        - Output: the shapes of `x` and `threshold` broadcast together, with the dtype of `x`.

    Raises:
        ValueError, TypeError: for a negative or non-finite float, a complex or integer `x`, a complex threshold.

    Example:
        >>> double_tanh(torch.tensor([-9.0, 0.0, 0.1, 9.0]), 2.0)
        tensor([-2.0000,  0.0000,  0.0142,  2.0000])

    Reference:
        J. T. Zhou et al., "SC2Net: Sparse LSTMs for Sparse Coding", AAAI 2018.
    """
    _check.tensor("x", x)
    u = _threshold("threshold", threshold, x)
    return torch.tanh(x + u) + torch.tanh(x - u)


def top_k_threshold(x: Tensor, k: int, dim: int = -1) -> Tensor:
    r"""$T_k(x) = \arg\min_z \|z - x\|_2$ over $\|z\|_0 \le k$: the `k` largest magnitudes along `dim`, zero elsewhere.

    Exactly `k` entries are kept; `torch.topk` breaks ties. The gradient passes where `x` is kept.

    Args:
        x: real or complex tensor with at least one dimension.
        k: how many to keep, from 1 to the size of `dim`.
        dim: the dimension to choose along.

    Shape:
        - Output: the shape of `x`.

    Raises:
        ValueError, TypeError: for `k` or `dim` out of range, an `x` of integers.

    Example:
        >>> top_k_threshold(torch.tensor([-2.0, 0.5, 1.0]), 2)
        tensor([-2.,  0.,  1.])
    """
    _check.tensor("x", x, allow_complex=True)
    _dimension(dim, x)
    if _check.integer("k", k) > x.shape[dim]:
        raise ValueError(f"k must be at most {x.shape[dim]}, the size of dimension {dim} of x, got {k}.")
    magnitude = x.detach().abs()
    dropped = torch.ones_like(magnitude, dtype=torch.bool).scatter(dim, magnitude.topk(k, dim).indices, False)
    return x.masked_fill(dropped, 0.0)


def project_simplex(x: Tensor, dim: int = -1) -> Tensor:
    r"""$P(x) = \max(x - \tau, 0)$ with $\tau$ such that it sums to 1: the nearest point of the probability simplex.

    Args:
        x: real tensor with at least one dimension.
        dim: the dimension that shall sum to 1.

    Shape:
        - Output: the shape of `x`.

    Raises:
        ValueError, TypeError: for `dim` out of range, a complex or integer `x`.

    Example:
        >>> project_simplex(torch.tensor([1.0, 0.5, -3.0]))
        tensor([0.7500, 0.2500, 0.0000])

    Reference:
        J. Duchi, S. Shalev-Shwartz, Y. Singer and T. Chandra, "Efficient projections onto the l1-ball for learning in
        high dimensions", ICML 2008.
    """
    _check.tensor("x", x)
    _dimension(dim, x)
    # Adding a constant to x does not change the projection; without the largest entry the sums are accurate.
    x = x - x.detach().amax(dim, keepdim=True)
    largest_first = x.movedim(dim, -1).sort(dim=-1, descending=True).values
    size = torch.arange(1, x.shape[dim] + 1, dtype=x.dtype, device=x.device)
    # A support of the j largest would need tau_j = (their sum - 1) / j; tau_j grows up to the true support, then falls.
    tau = ((largest_first.cumsum(-1) - 1) / size).amax(-1, keepdim=True).movedim(-1, dim)
    return torch.relu(x - tau)


def project_l2_ball(x: Tensor, radius: float | Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    r"""$P(x) = x / \max(\|x\|_2 / r, 1)$: the nearest point of the ball of radius $r$ around 0.

    Args:
        x: real or complex tensor with at least one dimension.
        radius: $r > 0$, a float or a positive real tensor that broadcasts with the norms, where `dim` has size 1.
        dim: the dimension or dimensions that form a vector.

    Shape:
        - Output: the shape of `x`.

    Raises:
        ValueError, TypeError: for a float radius that is not positive, `dim` out of range, an `x` of integers.

    Example:
        >>> project_l2_ball(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    _check.tensor("x", x, allow_complex=True)
    _dimension(dim, x)
    r = _threshold("radius", radius, x)
    if isinstance(r, float):
        _check.real("radius", r, above=0.0)
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) / r).clamp(min=1.0)


def normalize_columns(dictionary: Tensor) -> Tensor:
    r"""$d_j \leftarrow d_j / \|d_j\|_2$ for every atom (column) $d_j$.

    Args:
        dictionary: real or complex matrix without zero columns.

    Shape:
        - Output: (m, n), the shape of `dictionary`.

    Raises:
        ValueError, TypeError: if `dictionary` is no finite matrix or has zero columns.

    Example:
        >>> normalize_columns(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
        tensor([[0.6000, 0.0000],
                [0.8000, 1.0000]])
    """
    _check.dictionary("dictionary", dictionary, allow_complex=True)
    return dictionary / torch.linalg.vector_norm(dictionary, dim=0)


def operator_norm(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    like: Tensor,
    *,
    num_iters: int = 1000,
    tol: float = 1e-5,
) -> Tensor:
    r"""$\|A\|_2 = \|A v\|_2$ at the limit $v$ of $v_{k+1} = A^H A v_k / \|A^H A v_k\|_2$ (power iteration).

    The iterations run without a graph; the last $\|A v\|$ has the gradient $u^H\,dA\,v$ of the largest singular value
    to whatever `forward` closes over. The result approaches the norm from below, and the start is fixed, so that equal
    operators have equal results.

    The iteration stops at $\|v_{k+1} - v_k\|_2 \le$ `tol`. The error of the norm goes with the square of that, so the
    default gives it to about 1e-7, the error of the gradient is proportional to it. Singular values close to the
    largest slow it down: random dictionaries take 100 to 1000 iterations; smooth convolutions run into `num_iters` with
    a relative error of up to about 1e-4. On accelerators, under vmap and where compiled, nothing is looked at and
    `num_iters` iterations run; a compiled form unrolls them, so call this outside or pass a small number.

    Args:
        forward: $A$, a linear map of tensors shaped as `like`.
        adjoint: $A^H$; for real `like` the real adjoint. With another map in its place the result means nothing.
        like: tensor with the shape (no batch), dtype and device of the input of `forward`; its values do not matter.
        num_iters: the most iterations, at least 1.
        tol: change of the unit vector $v$ to stop at, at least 0.

    Returns:
        The largest singular value, a real tensor without dimensions.

    Raises:
        ValueError, TypeError: if `adjoint` does not lead back to the shape and kind of `like`, for `num_iters < 1`.

    Example:
        >>> A = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        >>> operator_norm(lambda x: A @ x, lambda y: A.mT @ y, torch.empty(2))
        tensor(4.)
    """
    _check.tensor("like", like, allow_complex=True)
    _check.integer("num_iters", num_iters)
    _check.real("tol", tol, minimum=0.0)
    # Almost any start will do. Random numbers are refused by vmap and torch.compile; cos(i^2) is as good as random,
    # has no symmetry and holds all frequencies.
    index = torch.arange(1, like.numel() + 1, dtype=torch.float64, device="cpu")
    v = torch.cos(index * index).reshape(like.shape).to(like.device, like.dtype)
    v = v / torch.linalg.vector_norm(v)
    tiny = torch.finfo(v.dtype).tiny  # keeps the zero operator from dividing by 0
    with torch.no_grad():
        for _ in range(num_iters):
            w = adjoint(forward(v))
            if w.shape != v.shape or w.is_complex() != v.is_complex():
                raise ValueError(
                    f"adjoint(forward(x)) must be like x, {v.dtype} {tuple(v.shape)}, got {w.dtype} {tuple(w.shape)}. "
                    "Check that adjoint is the adjoint of forward (its real part for real x) and like has no batch."
                )
            w = w.to(v.dtype)  # autocast
            w = w / torch.linalg.vector_norm(w).clamp(min=tiny)
            change = torch.linalg.vector_norm(w - v)
            v = w
            if _check.can_look_at(change) and change <= tol:
                break
    return torch.linalg.vector_norm(forward(v))


def _threshold(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A checked float, or a tensor in the real dtype of `x`."""
    if not isinstance(value, Tensor):
        return _check.real(name, value, minimum=0.0)
    if value.dtype == x.dtype and not value.is_complex():
        return value
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}. Take its modulus, {name}.abs().")
    return value.to(x.real.dtype)


def _without_subnormals(x: Tensor) -> Tensor:
    """Complex `x` with 0 where |x| is subnormal (below 1.2e-38 for complex64): torch.sgn would make that NaN."""
    return torch.where(x.detach().abs() < torch.finfo(x.dtype).tiny, 0.0, x)


def _dimension(dim: int | tuple[int, ...], x: Tensor) -> None:
    for d in dim if isinstance(dim, tuple) else (dim,):
        if not -x.dim() <= d < x.dim():
            raise ValueError(f"dim must be from {-x.dim()} to {x.dim() - 1} for x of shape {tuple(x.shape)}, got {d}.")


def generalized_threshold(x: Tensor, threshold: float | Tensor, p: float | Tensor) -> Tensor:
    r"""$G_{t,p}(x) = \arg\min_z \tfrac12 (z - x)^2 + t\,|z|^p$, the shrinkage of the $l_p$ penalty, $-1 \le p \le 1$.

    Zero up to $|x| = \tau = t^{1/(2-p)}\,(2-p)\,(2-2p)^{(p-1)/(2-p)}$; above it the larger root of
    $z + t\,p\,z^{p-1} = |x|$ with the sign of x. At $p = 1$ it is the soft threshold at $t$, at $p = 0$ the hard one at
    $\sqrt{2t}$. For $p < 0$ the penalty (taken as 0 at $z = 0$) falls with $|z|$, so that what is kept grows: edges
    become sharper.

    Newton's method finds the root, from one side, to rounding in four or five steps; the iteration of the paper,
    $z \leftarrow |x| - t\,p\,z^{p-1}$, costs as much a step but contracts by $|p|/2$ only.
    The backward pass keeps none of the steps. With $D = 1 + t\,p\,(p-1)\,z^{p-2}$, which is at least $1 - |p|/2$,

    $$\frac{\partial z}{\partial x} = \frac1D,\quad \frac{\partial z}{\partial t} = -\frac{p\,z^{p-1}}{D},\quad
    \frac{\partial z}{\partial p} = -\frac{t\,z^{p-1}(1 + p \log z)}{D},$$

    and 0 where the result is 0. No gradient sees the jump at $\tau$. $\partial z/\partial t$ is large for small t:
    learn the logarithm of a threshold. A second derivative raises an error.

    Args:
        x: real or complex tensor; of a complex one the modulus shrinks, the phase stays.
        threshold: $t \ge 0$, the weight of the penalty, a float or a real tensor that broadcasts with `x`.
        p: the exponent, from -1 to 1, a float or a real tensor that broadcasts with `x`. A tensor is not looked at.

    Shape:
        - Output: the shapes of all three broadcast together, with the dtype of `x`.

    Raises:
        ValueError, TypeError: for a negative or non-finite float, a float `p` not from -1 to 1, complex thresholds or
            exponents, an `x` of integers.

    Example:
        >>> generalized_threshold(torch.tensor([-2.0, 0.5, 1.0]), 0.75, 1.0)
        tensor([-1.2500,  0.0000,  0.2500])
        >>> generalized_threshold(torch.tensor([-2.0, 0.5, 1.0]), 0.2, -0.5)
        tensor([-2.0345,  0.0000,  1.0881])

    Reference:
        W. Zuo, D. Meng, L. Zhang, X. Feng and D. Zhang, "A Generalized Iterated Shrinkage Algorithm for Non-convex
        Sparse Coding", ICCV 2013; for p < 0 W. Zuo, D. Ren, D. Zhang, S. Gu and L. Zhang, "Learning Iteration-wise
        Generalized Shrinkage-Thresholding Operators for Blind Deconvolution", IEEE Transactions on Image Processing
        25(4), 2016.
    """
    _check.tensor("x", x, allow_complex=True)
    t = _threshold("threshold", threshold, x)
    if x.is_complex():
        x = _without_subnormals(x)
        modulus = generalized_threshold(x.abs(), t, p)
        return torch.sgn(x) * modulus
    if not isinstance(p, Tensor):
        _check.real("p", p, minimum=-1.0)
        if p > 1:
            raise ValueError(f"p must be at most 1, got {p}. Penalties |z|^p with p > 1 give no zeros.")
    elif p.is_complex():
        raise TypeError(f"p must be real, got {p.dtype}.")
    t, q = (torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in (t, p))
    if torch.compiler.is_compiling():
        return _compiled_generalized_threshold(x, t, q)
    return _GeneralizedThreshold.apply(x, t, q)


def _jump(modulus: Tensor, t: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The unit in which the penalty has weight 1, the jump in this unit, and what is above it."""
    unit = t ** (1 / (2 - p))
    tau = (2 - p) * (2 - 2 * p) ** ((p - 1) / (2 - p))
    return unit, tau, ~(modulus <= unit * tau)  # NaN is kept


def _root(modulus: Tensor, unit: Tensor, tau: Tensor, p: Tensor) -> Tensor:
    """The larger root of z + t p z^(p-1) = modulus, by Newton's method from the right (p > 0) or the left (p < 0)."""
    # In the unit nothing overflows for the small thresholds of float32. What is below the jump becomes 0 in the end;
    # until then the jump in its place keeps the powers finite.
    v = torch.maximum(modulus / unit.clamp(min=torch.finfo(modulus.dtype).tiny ** 0.5), tau)
    z = v
    for _ in range(5 if modulus.dtype == torch.float64 else 4):
        # Inductor copies what makes z into each place where z stands, and that again in every step: 5^5 times in the
        # end, half a minute for each threshold. Exponentials are what it computes once.
        power = ((p - 2) * z.log()).exp() if torch.compiler.is_compiling() else z ** (p - 2)
        slope = p * power
        z = z - (z + slope * z - v) / (1 + slope * (p - 1))
    # Once more the equation itself, in the units of x: exact where t is 0.
    return modulus - unit * (p * z ** (p - 1))


def _compiled_generalized_threshold(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
    """The same without an autograd.Function: the root without a graph, then one step of Newton's method with one."""
    modulus = x.abs()
    with torch.no_grad():
        unit, tau, kept = _jump(modulus, t, p)
        z = torch.where(kept, _root(modulus, unit, tau, p), 1.0)
        D = (1 + t * p * (p - 1) * z ** (p - 2)).clamp(min=0.5)
    z = z - (z + t * p * z ** (p - 1) - modulus) / D
    return torch.where(kept, torch.sgn(x) * z, 0.0)


class _GeneralizedThreshold(torch.autograd.Function):
    """`generalized_threshold` of three real tensors that broadcast, with a backward pass in closed form.

    Most entries become 0 as a rule, and powers are dear. So both passes go through the others alone, where looking at
    the values is free of side effects.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
        modulus = x.abs()
        unit, tau, kept = _jump(modulus, t, p)
        return torch.sgn(x) * _where(kept, _root, modulus, unit, tau, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x, t, p = inputs
        ctx.save_for_backward(output, t, p)
        ctx.shape = x.shape

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        output, t, p = ctx.saved_tensors
        kept, modulus = output != 0, output.abs()

        def to_x(z: Tensor, t: Tensor, p: Tensor) -> Tensor:
            z = torch.where(z == 0, 1.0, z)
            # D is not below 1/2 in exact arithmetic; the bound holds it where t z^(p-2) was rounded.
            return 1 / (1 + t * p * (p - 1) * z ** (p - 2)).clamp(min=0.5)

        def to_t(z: Tensor, to_x: Tensor, p: Tensor) -> Tensor:
            return -p * to_x * torch.where(z == 0, 1.0, z) ** (p - 1)

        def to_p(z: Tensor, to_x: Tensor, t: Tensor, p: Tensor) -> Tensor:
            z = torch.where(z == 0, 1.0, z)
            return -t * to_x * z ** (p - 1) * (1 + p * z.log())

        slope = _where(kept, to_x, modulus, t, p)
        signed = gradient * torch.sgn(output)
        return (
            (gradient * slope).sum_to_size(ctx.shape),
            (signed * _where(kept, to_t, modulus, slope, p)).sum_to_size(t.shape) if ctx.needs_input_grad[1] else None,
            (signed * _where(kept, to_p, modulus, slope, t, p)).sum_to_size(p.shape)
            if ctx.needs_input_grad[2]
            else None,
        )


def _where(kept: Tensor, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """function(*values) where `kept` is True and 0 elsewhere; computed there alone where one may look."""
    if not _check.can_look_at(kept):
        return torch.where(kept, function(*values), 0.0)
    places = kept.flatten().nonzero().squeeze(1)
    few = [
        value.reshape(()) if value.numel() == 1 else value.expand(kept.shape).reshape(-1).index_select(0, places)
        for value in values
    ]
    found = function(*few)
    return found.new_zeros(kept.numel()).index_copy(0, places, found).reshape(kept.shape)
