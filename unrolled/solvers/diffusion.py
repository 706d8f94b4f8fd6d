"""Diffusion of images: by heat, by Perona and Malik's equation, and from seeds over a weighted graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from unrolled import _check

MOST_DIFFUSIVITY = 0.3  # the nine-point scheme gives the pixel itself a weight of 1 - 10/3 d


def heat(
    image: Tensor,  # (..., H, W)
    *,
    num_iters: int,
    diffusivity: float = 0.1,
) -> Tensor:
    r"""$u \leftarrow u + d\,\Delta u$: the heat equation in explicit Euler steps of time 1, with pixels of side 1.

    The Laplacian is the nine-point one, (1, 4, 1; 4, -20, 4; 1, 4, 1)/6. Nothing flows over the border, so the mean
    stays. Up to a diffusivity of 0.3 a step averages over neighbours with weights that are not negative: no value
    leaves the range of those before.

    Args:
        image: floating point.
        num_iters: how many steps, at least 1. As many as n with diffusivity d blur like a Gaussian of variance 2 n d.
        diffusivity: d, above 0 and less than 0.3.

    Shape:
        - image, output: (..., H, W)

    Raises:
        TypeError, ValueError: an image that is not floating point, has less than two dimensions, NaN or infinity; a
            number out of its range.

    Example:
        >>> spot = torch.zeros(5, 5)
        >>> spot[2, 2] = 1.0
        >>> heat(spot, num_iters=1)[2]
        tensor([0.0000, 0.0667, 0.6667, 0.0667, 0.0000])
    """
    u = _image(image)
    _check.integer("num_iters", num_iters)
    d = diffusivity_in_bounds("diffusivity", diffusivity)
    laplacian = u.new_tensor([[[[1, 4, 1], [4, -20, 4], [1, 4, 1]]]]) / 6
    for _ in range(num_iters):
        u = u + d * conv2d(pad(u, (1, 1, 1, 1), mode="replicate"), laplacian)
    return u.reshape(image.shape)


def perona_malik(
    image: Tensor,  # (..., H, W)
    *,
    contrast: float,
    num_iters: int,
    step_size: float = 0.2,
    data_range: float = 1.0,
) -> Tensor:
    r"""$u_p \leftarrow u_p + \eta \sum_{q \sim p} \frac{u_q - u_p}{1 + (u_q - u_p)^2 / \kappa^2}$, over 4 neighbours.

    Anisotropic diffusion: neighbours that differ by much less than the contrast $\kappa$ are averaged, edges stay.

    Args:
        image: floating point.
        contrast: $\kappa$ in grey levels of 0..255, positive.
        num_iters: how many steps, at least 1.
        step_size: $\eta$, above 0 and at most 0.25, where the scheme is stable.
        data_range: the range of the image without noise is [0, `data_range`].

    Shape:
        - image, output: (..., H, W)

    Raises:
        TypeError, ValueError: as for `heat`, a number out of its range.

    Example:
        >>> edge = torch.tensor([[0.0, 0.1, 0.9, 1.0]])
        >>> perona_malik(edge, contrast=25.0, num_iters=10)
        tensor([[0.0576, 0.0648, 0.9352, 0.9424]])

    Reference:
        P. Perona and J. Malik, "Scale-space and edge detection using anisotropic diffusion", IEEE TPAMI 1990, (7)-(8).
    """
    _image(image)
    _check.integer("num_iters", num_iters)
    kappa = _check.real("contrast", contrast, above=0.0) / 255 * _check.real("data_range", data_range, above=0.0)
    if _check.real("step_size", step_size, above=0.0) > 0.25:
        raise ValueError(f"step_size must be at most 0.25, where four neighbours weigh 1 together, got {step_size}.")
    u = image
    for _ in range(num_iters):
        change = torch.zeros_like(u)
        for dim in (-2, -1):
            difference = u.diff(dim=dim)
            flow = difference / (1 + (difference / kappa).square())
            before = torch.cat([flow, torch.zeros_like(u.narrow(dim, 0, 1))], dim)
            change = change + before - before.roll(1, dim)
        u = u + step_size * change
    return u


def seeded_diffusion(
    edges: Tensor,  # (2, E)
    weights: Tensor,  # (..., E)
    guidance: Tensor,  # (..., N)
    *,
    absorption: float | Tensor,
    seeds: Tensor | None = None,  # (..., N)
    values: Tensor | None = None,  # (..., N)
) -> Tensor:
    r"""$\min_f \sum_{pq} w_{pq} (f_p - f_q)^2 + \sum_p \lambda_p (f_p - g_p)^2$ where $f = s$ at the seeds.

    A linear elliptic system on a graph: values flow from the seeds along the edges, and the guidance $g$ pulls. Without
    seeds it is $(D - W + \Lambda) f = \Lambda g$. Solved sample by sample with SciPy's sparse LU, in float64; no
    gradients.

    Args:
        edges: the two ends of each edge, integers in 0..N-1.
        weights: $w$, at least 0.
        guidance: $g$.
        absorption: $\lambda$, positive, a number or one for each node.
        seeds: True where f is prescribed; nowhere if not given.
        values: $s$, used at the seeds only; 1 if not given.

    Shape:
        - output: (..., N), in the dtype and on the device of `guidance`

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit each other, negative weights, `absorption <= 0`, NaN.

    Example:
        >>> chain = torch.tensor([[0, 1, 2], [1, 2, 3]])
        >>> ends = torch.tensor([True, False, False, False])
        >>> seeded_diffusion(chain, torch.ones(3), torch.zeros(4), absorption=0.5, seeds=ends)
        tensor([1.0000, 0.5116, 0.2791, 0.1860])
    """
    import scipy.sparse
    import scipy.sparse.linalg

    n = _graph(edges, weights, guidance)
    batch = guidance.shape[:-1]
    count, e = batch.numel(), edges.shape[1]
    pull = torch.as_tensor(absorption, dtype=torch.float64, device="cpu").detach()
    if not bool((pull > 0).all()) or not bool(pull.isfinite().all()):
        raise ValueError(f"absorption must be positive, got {pull.min().item():g} at the least.")
    marked = torch.zeros_like(guidance, dtype=torch.bool) if seeds is None else _fitting("seeds", seeds, guidance)
    if marked.dtype != torch.bool:
        raise TypeError(f"seeds must be a bool tensor, True where f is prescribed, got {marked.dtype}.")
    given = torch.ones_like(guidance) if values is None else _fitting("values", values, guidance)
    first, second = edges.detach().cpu().numpy()
    w_all = weights.detach().double().cpu().expand(*batch, e).reshape(count, e).numpy()
    pulls = pull.expand(guidance.shape).reshape(count, n).numpy()
    columns = [x.detach().cpu().reshape(count, n).numpy() for x in (guidance.double(), marked, given.double())]
    out = torch.empty(count, n, dtype=torch.float64)
    for i, (w, lam, g, seed, s) in enumerate(zip(w_all, pulls, *columns, strict=True)):
        W = scipy.sparse.coo_matrix((w, (first, second)), shape=(n, n)).tocsr()
        W = W + W.T
        free = ~seed
        f = s.copy()
        if free.any():
            A = scipy.sparse.diags(lam + W.sum(1).A1) - W
            right = (lam * g)[free] - A[free][:, seed] @ s[seed]
            f[free] = scipy.sparse.linalg.spsolve(A[free][:, free].tocsc(), right)
        out[i] = torch.from_numpy(f)
    return out.reshape(guidance.shape).to(guidance)


def diffusivity_in_bounds(name: str, value: float) -> float:
    """Return `value` if the nine-point scheme is an average with it.

    Args:
        name: of the argument, for the error.
        value: the diffusivity.
    """
    if _check.real(name, value, above=0.0) >= MOST_DIFFUSIVITY:
        raise ValueError(f"{name} must be less than {MOST_DIFFUSIVITY}, got {value}: take more and shorter steps.")
    return float(value)


def _image(image: Tensor) -> Tensor:  # (..., H, W) -> (N, 1, H, W)
    _check.finite("image", _check.tensor("image", image))
    if image.dim() < 2:
        raise ValueError(f"image must have shape (..., H, W), got {tuple(image.shape)}.")
    return image.reshape(-1, 1, *image.shape[-2:])


def _graph(edges: Tensor, weights: Tensor, guidance: Tensor) -> int:
    """Check that the three fit each other; return the number of nodes."""
    _check.finite("weights", _check.tensor("weights", weights))
    _check.finite("guidance", _check.tensor("guidance", guidance))
    if edges.dim() != 2 or len(edges) != 2 or edges.is_floating_point() or edges.dtype == torch.bool:
        raise ValueError(f"edges must be integers of shape (2, E), got {edges.dtype} {tuple(edges.shape)}.")
    n = guidance.shape[-1] if guidance.dim() else 0
    if n == 0 or (edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= n)):
        raise ValueError(f"edges must be between nodes 0..{n - 1}, as many as guidance has, got other numbers.")
    if weights.dim() == 0 or weights.shape[-1] != edges.shape[1]:
        raise ValueError(f"weights must have shape (..., {edges.shape[1]}), one an edge, got {tuple(weights.shape)}.")
    if bool((weights < 0).any()):
        raise ValueError(f"weights must be at least 0, got {weights.min().item():g}.")
    return n


def _fitting(name: str, value: Tensor, guidance: Tensor) -> Tensor:
    """Return `value` with the shape of the guidance, if it broadcasts to that."""
    try:
        return value.expand(guidance.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to the shape of guidance, {tuple(guidance.shape)}, got {tuple(value.shape)}."
        ) from None
