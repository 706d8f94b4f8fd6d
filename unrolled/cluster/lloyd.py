"""k-means unrolled: iterations of Lloyd's algorithm, hard or soft, as the layers of a network over sets of points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.cluster._geometry import assignments, unit
from unrolled.gradient import Backprop, Gradient
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class _Prepared(NamedTuple):
    points: Tensor  # (..., n, d)
    weights: Tensor | None  # (..., n, 1)
    centres: Tensor  # (..., k, d), where it starts


class KMeansStep(Step):
    r"""$c_j \leftarrow c_j + s\,(\sum_i P_{ij} x_i / \sum_i P_{ij} - c_j)$ with
    $P = \mathrm{softmax}_j(-\|x_i - c_j\|^2 / \tau)$.

    An iteration of soft k-means, or with `temperature=0` of Lloyd's algorithm, on a set of points or a batch of sets.
    The state are the centres. What it learns are the step $s$ and the temperature $\tau$, both positive by their
    logarithms; gradients flow to points and starting centres too.

    Args:
        temperature, step_size, spherical, device, dtype: as for `KMeans`.
    """

    event_dim = 2

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        step_size: float = 1.0,
        spherical: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.first_temperature = _check.real("temperature", temperature, minimum=0.0)
        self.first_step_size = _check.real("step_size", step_size, above=0.0)
        self.spherical = bool(spherical)
        self.log_step_size = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        soft = self.first_temperature > 0
        self.log_temperature = nn.Parameter(torch.empty_like(self.log_step_size)) if soft else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the temperature and the step size that were given first."""
        self.log_step_size.fill_(self.first_step_size).log_()
        if self.log_temperature is not None:
            self.log_temperature.fill_(self.first_temperature).log_()

    @property
    def temperature(self) -> Tensor | float:
        r"""$\tau$, (), positive; the float 0 in a hard step."""
        return 0.0 if self.log_temperature is None else self.log_temperature.exp()

    @property
    def step_size(self) -> Tensor:
        """s, (), positive."""
        return self.log_step_size.exp()

    def check(self, points: Tensor, centres: Tensor, weights: Tensor | None = None) -> None:
        for name, value in (("points", points), ("centres", centres)):
            if isinstance(value, Tensor) and value.dim() < 2:
                raise ValueError(
                    f"{name} must have shape (..., {'n' if name == 'points' else 'k'}, d), got {tuple(value.shape)}."
                )
        size = points.shape[-1] if isinstance(points, Tensor) else 0
        _check.signals("points", points, self.log_step_size, size, of="the network")
        _check.signals("centres", centres, points, size, of="the points")
        if centres.shape[:-2] != points.shape[:-2]:
            raise ValueError(
                f"centres must have the batch dimensions of points, {tuple(points.shape[:-2])}, got shape "
                f"{tuple(centres.shape)}. Expand them: centres.expand(*points.shape[:-2], -1, -1)."
            )
        if weights is not None:
            _check.signals("weights", weights, points, points.shape[-2], of="the points")
            if weights.shape != points.shape[:-1]:
                raise ValueError(f"weights must have shape {tuple(points.shape[:-1])}, got {tuple(weights.shape)}.")
            if _check.can_look_at(weights) and bool((weights < 0).any()):
                raise ValueError(f"weights must be at least 0, got {weights.min().item():g}.")
        if self.spherical and _check.can_look_at(points) and not bool(points.any(-1).all()):
            raise ValueError(
                "points has rows that are zero, which have no direction. Give them weight 0 and any value."
            )

    def prepare(self, points: Tensor, centres: Tensor, weights: Tensor | None = None) -> _Prepared:
        if self.spherical:
            points, centres = unit(points), unit(centres)
        return _Prepared(points, None if weights is None else weights.unsqueeze(-1), centres)

    def init(self, context: _Prepared) -> Tensor:
        return context.centres

    def forward(self, centres: Tensor, context: _Prepared) -> Tensor:
        points, weights, _ = context
        with _check.full_precision(points.device):  # differences of squares: not in half precision
            # Without |x|^2, which is the same for all centres: neither softmax nor the nearest centre see it.
            logits = 2 * points @ centres.mT - centres.square().sum(-1).unsqueeze(-2)
            parts = assignments(logits, self.temperature)
            if weights is not None:
                parts = parts * weights
            sums, sizes = parts.mT @ points, parts.sum(-2).unsqueeze(-1)
            if self.spherical:
                sizes = torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
            alive = sizes > 0
            moved = torch.lerp(centres, sums / torch.where(alive, sizes, 1.0), self.step_size)
            return torch.where(alive, unit(moved) if self.spherical else moved, centres)

    def extra_repr(self) -> str:
        return f"temperature={self.first_temperature:g}, step_size={self.first_step_size:g}, spherical={self.spherical}"


class KMeans(Unroll):
    r"""$c_j \leftarrow c_j + s\,(\sum_i P_{ij} x_i / \sum_i P_{ij} - c_j)$: K iterations of k-means as a network.

    Clusters sets of points, many at a time, inside a model: takes points and starting centres, returns centres, and
    passes gradients to both. With `temperature=0`, Lloyd's algorithm, $P$ is the one-hot of the nearest centre:
    gradients flow through the means alone. With a positive one, soft k-means, they flow through the assignments too.
    Untrained it is `solvers.lloyd` or `solvers.soft_kmeans`. Trained, end to end with what makes the points, it learns
    step and temperature of every layer.

    A centre without points stays where it is, so that nothing is ever divided by 0. Start from
    `solvers.kmeans_plus_plus` of the points to have none. For single points that become an output layer, with centres
    that are learned, see `KMeansHead`.

    Args:
        num_iters: number of iterations K.
        temperature: $\tau$, at least 0, in the units of the squared distances. 0 stays 0, a positive one is learned.
        step_size: $s$, positive; 1 is the algorithm itself.
        spherical: whether points and centres are divided by their norms, in every iteration: spherical k-means.
        tied: one step for all iterations (`True`), each its own (`False`), or the names of what is shared.
        gradient: how gradients flow through the iterations, see `unrolled.gradient`.
        stop: when a set stops before the last iteration, see `unrolled.Tolerance`.
        device, dtype: of the parameters.

    Shape:
        - points: (..., n, d), the dtype and device of the parameters
        - centres: (..., k, d), where to start
        - weights: (..., n), at least 0, not required; 0 for points that only fill up a set
        - output: (..., k, d)

    Raises:
        TypeError: points, centres or weights are no floating point tensors, or of different dtypes.
        ValueError: shapes or devices that do not fit, NaN, a negative weight or temperature, `step_size <= 0`, with
            `spherical` a point of zeros.

    Example:
        >>> points = torch.randn(8, 100, 2) + 5 * torch.randint(2, (8, 100, 1))
        >>> start = kmeans_plus_plus(points, 2)
        >>> net = KMeans(num_iters=10, temperature=0.1)
        >>> torch.allclose(net(points, start), soft_kmeans(points, start, 0.1, num_iters=10), atol=1e-4)
        True

    Reference:
        S. P. Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on Information Theory 28(2), 1982.
    """

    def __init__(
        self,
        num_iters: int = 10,
        *,
        temperature: float = 0.0,
        step_size: float = 1.0,
        spherical: bool = False,
        tied: bool | Sequence[str] = True,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = KMeansStep(temperature=temperature, step_size=step_size, spherical=spherical, device=device, dtype=dtype)
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self,
        points: Tensor,
        centres: Tensor,
        weights: Tensor | None = None,
        *,
        state: State | None = None,
        num_iters: int | None = None,
    ) -> Tensor:
        return super().forward(points, centres, weights, state=state, num_iters=num_iters)
