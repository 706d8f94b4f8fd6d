"""k-means: Lloyd's algorithm, its soft and spherical forms, the objective, and k-means++ starts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unrolled import _check


def kmeans_objective(
    points: Tensor,  # (..., n, d)
    centres: Tensor,  # (..., k, d)
    *,
    weights: Tensor | None = None,  # (..., n)
    spherical: bool = False,
) -> Tensor:  # (...)
    r"""$\sum_i w_i \min_j \|x_i - c_j\|^2$ of every set of points; scikit-learn's `inertia_`.

    Args:
        points: $x_i$, a set of points or a batch of sets.
        centres: $c_j$, for every set.
        weights: $w_i$, at least 0; 1 where not given.
        spherical: whether points and centres are divided by their norms first, so that
            $\|x - c\|^2 = 2 - 2\cos(x, c)$.

    Shape:
        - points: (..., n, d); centres: (..., k, d); weights: (..., n)
        - output: (...)

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, NaN or infinity, a negative weight, a point
            without a direction where `spherical`.

    Example:
        >>> kmeans_objective(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [4.0]]))
        tensor(2.)
    """
    x, c, w = _checked(points, centres, weights, spherical)
    return (w * _squared_distances(x, c).amin(-1)).sum(-1)


def lloyd(
    points: Tensor,  # (..., n, d)
    centres: Tensor,  # (..., k, d)
    *,
    weights: Tensor | None = None,  # (..., n)
    spherical: bool = False,
    step_size: float = 1.0,
    num_iters: int = 100,
) -> Tensor:  # (..., k, d)
    r"""$c_j \leftarrow c_j + s\,(\bar x_j - c_j)$, $\bar x_j$ the mean of the points whose nearest centre is $c_j$.

    Lloyd's algorithm, for $s = 1$, from given centres. With `spherical` all points and centres are on the unit sphere,
    and $\bar x_j$ is the sum of its points divided by its norm: spherical k-means. A centre without points stays where
    it is. Of two centres equally near, the first has the point.

    Args:
        points: $x_i$, a set of points or a batch of sets.
        centres: where to start, such as `kmeans_plus_plus` of the points.
        weights: of the points, at least 0; 1 where not given.
        spherical: whether the points and centres are divided by their norms.
        step_size: $s$, positive. From 0 to 2 the objective never increases (where not `spherical`).
        num_iters: number of iterations, at least 1. Iterations after the last change are not run.

    Shape:
        - points: (..., n, d); centres, output: (..., k, d); weights: (..., n)

    Raises:
        TypeError, ValueError: as for `kmeans_objective`, and numbers out of range.

    Example:
        >>> lloyd(torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([[0.5000],
                [5.5000]])

    Reference:
        S. P. Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on Information Theory 28(2), 1982. The
        spherical form is of I. S. Dhillon and D. S. Modha, "Concept Decompositions for Large Sparse Text Data Using
        Clustering", Machine Learning 42, 2001.
    """
    x, c, w = _checked(points, centres, weights, spherical)
    s = _check.real("step_size", step_size, above=0.0)
    every = torch.arange(c.shape[-2], device=c.device)
    for _ in range(_check.integer("num_iters", num_iters)):
        nearest = _squared_distances(x, c).argmin(-1, keepdim=True)
        new = _moved(x, c, w.unsqueeze(-1) * (nearest == every), spherical, s)
        if _check.can_look_at(new) and torch.equal(new, c):
            return new
        c = new
    return c


def soft_kmeans(
    points: Tensor,  # (..., n, d)
    centres: Tensor,  # (..., k, d)
    temperature: float,
    *,
    weights: Tensor | None = None,  # (..., n)
    spherical: bool = False,
    step_size: float = 1.0,
    num_iters: int = 100,
) -> Tensor:  # (..., k, d)
    r"""$P = \mathrm{softmax}_j(-\|x_i - c_j\|^2 / \tau)$,
    $c_j \leftarrow c_j + s\,(\sum_i P_{ij} x_i / \sum_i P_{ij} - c_j)$.

    Soft k-means: each point belongs to every centre in part. For $s = 1$ it is expectation maximisation for a mixture
    of equal Gaussians of variance $\tau / 2$ in every direction. For $\tau \to 0$ it is `lloyd`. For a large $\tau$ all
    centres go to the mean.

    Args:
        points: $x_i$, a set of points or a batch of sets.
        centres: where to start. Two equal centres stay equal.
        temperature: $\tau$, positive, in the units of the squared distances.
        weights, spherical, step_size: as for `lloyd`.
        num_iters: number of iterations, at least 1.

    Shape:
        - points: (..., n, d); centres, output: (..., k, d); weights: (..., n)

    Raises:
        TypeError, ValueError: as for `lloyd`.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
        >>> soft_kmeans(points, torch.tensor([[0.0], [1.0]]), temperature=4.0)
        tensor([[0.5155],
                [5.4845]])
    """
    x, c, w = _checked(points, centres, weights, spherical)
    tau = _check.real("temperature", temperature, above=0.0, hint="For the limit 0 use lloyd.")
    s = _check.real("step_size", step_size, above=0.0)
    for _ in range(_check.integer("num_iters", num_iters)):
        c = _moved(x, c, w.unsqueeze(-1) * torch.softmax(-_squared_distances(x, c) / tau, -1), spherical, s)
    return c


@torch.no_grad()
def kmeans_plus_plus(
    points: Tensor,  # (..., n, d)
    num_clusters: int,
    *,
    weights: Tensor | None = None,  # (..., n)
    spherical: bool = False,
    num_candidates: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # (..., k, d)
    r"""$P(c_{j+1} = x_i) \propto w_i \min_{l \le j} \|x_i - c_l\|^2$: centres to start from, far from one another.

    The first centre is a point drawn at random, each next one is drawn with a probability proportional to its squared
    distance to those before: so never a copy of one, as long as there is another point. Where there are fewer distinct
    points than clusters, the surplus centres are copies. Each draw takes the best of `num_candidates`, the one that
    lowers the objective most.

    Args:
        points: $x_i$, a set of points or a batch of sets.
        num_clusters: k, from 1 to n.
        weights: $w_i$, at least 0; 1 where not given.
        spherical: whether the points are divided by their norms.
        num_candidates: draws for every centre, at least 1; $2 + \lfloor\ln k\rfloor$ where not given, as in
            scikit-learn. The theorem is that of 1.
        generator: of the random numbers. The draws are made on its device, on the CPU where not given, so that the
            same seed gives the same start wherever the points are.

    Shape:
        - points: (..., n, d); weights: (..., n)
        - output: (..., k, d)

    Raises:
        TypeError, ValueError: as for `kmeans_objective`; more clusters than points.

    Example:
        >>> start = kmeans_plus_plus(torch.tensor([[0.0], [0.0], [7.0]]), 2)
        >>> start.sort(0).values
        tensor([[0.],
                [7.]])

    Reference:
        D. Arthur and S. Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
    """
    k = _check.integer("num_clusters", num_clusters)
    x, _, w = _checked(points, None, weights, spherical)
    n = x.shape[-2]
    if k > n:
        raise ValueError(f"num_clusters must be at most {n}, the number of points, got {k}.")
    trials = 2 + int(math.log(k)) if num_candidates is None else _check.integer("num_candidates", num_candidates)
    norms = x.square().sum(-1)
    chosen = draw(w, 1, generator)
    distances = _to_points(x, norms, chosen).squeeze(-2)
    for _ in range(k - 1):
        candidates = draw(w * distances, trials, generator)
        after = torch.minimum(_to_points(x, norms, candidates), distances.unsqueeze(-2))
        best = (after * w.unsqueeze(-2)).sum(-1).argmin(-1, keepdim=True)
        distances = after.take_along_dim(best.unsqueeze(-1), -2).squeeze(-2)
        chosen = torch.cat([chosen, candidates.take_along_dim(best, -1)], -1)
    return _rows(x, chosen)


def draw(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:  # (..., n) -> (..., count)
    """Indices drawn with replacement in proportion to the weights; all alike where every weight is 0.

    Not `torch.multinomial`, which takes at most 2^24 weights and whose draws differ from device to device.
    """
    weights = weights.detach().cpu().double()
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)
    total = weights.cumsum(-1)
    device = "cpu" if generator is None else generator.device
    where = torch.rand(*weights.shape[:-1], count, dtype=torch.float64, device=device, generator=generator).cpu()
    # The first entry beyond what was drawn is never one of weight 0.
    index = torch.searchsorted(total, where * total[..., -1:], right=True)
    return index.clamp(max=weights.shape[-1] - 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:  # (..., n, d), (..., m) -> (..., m, d)
    return x.take_along_dim(index.to(x.device).unsqueeze(-1), -2)


def _to_points(x: Tensor, norms: Tensor, index: Tensor) -> Tensor:  # (..., m, n)
    """Squared distances of some points to all; exactly 0 to themselves and their copies."""
    rows = _rows(x, index)
    square = norms.unsqueeze(-2) - 2 * rows @ x.mT + norms.take_along_dim(index.to(x.device), -1).unsqueeze(-1)
    # What rounding leaves of a copy's distance must not be drawn as if it were another point.
    noise = 4 * torch.finfo(x.dtype).eps * x.shape[-1] ** 0.5 * (norms.unsqueeze(-2) + norms.amax(-1)[..., None, None])
    return torch.where(square > noise, square, 0.0)


def _squared_distances(x: Tensor, c: Tensor) -> Tensor:  # (..., n, d), (..., k, d) -> (..., n, k)
    if x.shape[:-1].numel() * c.shape[-2] * x.shape[-1] < 1e6:  # without the rounding of the form below
        return (x.unsqueeze(-2) - c.unsqueeze(-3)).square().sum(-1)
    squares = x.square().sum(-1, keepdim=True) + c.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * x @ c.mT).clamp_min(0.0)


def _moved(x: Tensor, c: Tensor, parts: Tensor, spherical: bool, step_size: float) -> Tensor:
    """Centres moved towards the mean (the mean direction) of their parts of the points; parts: (..., n, k)."""
    sums, sizes = parts.mT @ x, parts.sum(-2).unsqueeze(-1)
    size = torch.linalg.vector_norm(sums, dim=-1, keepdim=True) if spherical else sizes
    alive = size > 0
    new = c + step_size * (sums / torch.where(alive, size, 1.0) - c)
    return torch.where(alive, unit(new) if spherical else new, c)


def unit(x: Tensor) -> Tensor:  # (..., d)
    """x / |x|, and 0 for 0, with finite gradients there."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def _checked(
    points: Tensor, centres: Tensor | None, weights: Tensor | None, spherical: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Points, centres (the points themselves where there are none) and weights, as they are needed."""
    _check.finite("points", _check.tensor("points", points))
    if points.dim() < 2:
        raise ValueError(f"points must have shape (..., n, d), got {tuple(points.shape)}.")
    batch, d = points.shape[:-2], points.shape[-1]
    if centres is not None:
        _check.signals("centres", centres, points, d, of="the points")
        if centres.shape[:-2] != batch or centres.dim() != points.dim():
            raise ValueError(f"centres must have shape {(*batch, 'k', d)}, got {tuple(centres.shape)}.")
    if weights is None:
        weights = points.new_ones(points.shape[:-1])
    elif _check.signals("weights", weights, points, points.shape[-2], of="the points").shape != points.shape[:-1]:
        raise ValueError(f"weights must have shape {tuple(points.shape[:-1])}, got {tuple(weights.shape)}.")
    elif _check.can_look_at(weights) and bool((weights < 0).any()):
        raise ValueError(f"weights must be at least 0, got {weights.min().item():g}.")
    if spherical:
        if _check.can_look_at(points) and not bool(points.any(-1).all()):
            raise ValueError(
                "points has rows that are zero, which have no direction. Remove them, or take spherical=False."
            )
        points, centres = unit(points), None if centres is None else unit(centres)
    return points, points if centres is None else centres, weights
