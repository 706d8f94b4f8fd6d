r"""Gaussian filters, $(K v)_i = \sum_j \exp(-\tfrac12 \|f_i - f_j\|^2)\, v_j$ with features f, and their normalisation.

A filter is prepared once for the features of a batch. What it returns, a `Plan`, then filters any values of these
pixels, in every iteration and in the backward pass. Features are already divided by the bandwidths.
"""

from __future__ import annotations

import abc
import enum
import itertools
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from unrolled import _check


class Plan(abc.ABC):
    """A filter for the pixels of one batch: a linear map of values (B, *spatial, L), each channel by itself."""

    @abc.abstractmethod
    def __call__(self, values: Tensor) -> Tensor:
        """Filter the values, (B, *spatial, L); differentiable in them."""

    @abc.abstractmethod
    def adjoint(self, values: Tensor) -> Tensor:
        """Apply the transposed map, (B, *spatial, L)."""

    def scaled(self, before: Tensor | None, after: Tensor | None) -> Plan:
        """This filter between two weights a pixel, $v \\mapsto a \\odot K (b \\odot v)$; each (B or 1, *spatial)."""
        return self if before is None and after is None else _Scaled(self, before, after)


@runtime_checkable
class GaussianFilter(Protocol):
    """What applies a Gaussian kernel: an object with `prepare`, and whether gradients reach the features.

    Attributes:
        differentiable: whether the values that come out have gradients with respect to the features.
    """

    differentiable: bool

    def prepare(self, features: Tensor, mask: Tensor | None = None) -> Plan:
        """Do once what does not depend on the values.

        Args:
            features: (B, *spatial, d), divided by the bandwidths; B = 1 serves batches of any size.
            mask: (B, *spatial), False where a pixel is padding, which must not change what the others get.
        """


class Normalization(enum.Enum):
    r"""How a filter is normalised by $n = K 1$, what it makes of ones.

    | | filter | |
    |---|---|---|
    | `AFTER` | $n^{-1} \odot K v$ | an average over the neighbours, as in CRF-RNN |
    | `SYMMETRIC` | $n^{-1/2} \odot K (n^{-1/2} \odot v)$ | pydensecrf's default |
    | `BEFORE` | $K (n^{-1} \odot v)$ | |
    | `NONE` | $K v$ | |
    """

    AFTER = "after"
    SYMMETRIC = "symmetric"
    BEFORE = "before"
    NONE = "none"

    def apply(self, plan: Plan, ones: Tensor, mask: Tensor | None = None) -> Plan:
        """The normalised filter; pixels outside of the mask neither send nor receive.

        Args:
            plan: the bare filter K.
            ones: (B or 1, *spatial, 1), of ones.
            mask: (B, *spatial), or None for no padding.
        """
        send = None if mask is None else mask.to(ones)
        if self is Normalization.NONE:
            return plan.scaled(send, send)
        norm = plan(ones if send is None else send.unsqueeze(-1)).squeeze(-1)
        # A pixel of weight zero is padding, or so far off in float32 that it does not even meet itself.
        known = norm > 0
        norm = torch.where(known, norm, 1)
        scale = torch.where(known, norm.rsqrt() if self is Normalization.SYMMETRIC else norm.reciprocal(), 0)
        scale = scale if send is None else scale * send
        before = send if self is Normalization.AFTER else scale
        after = send if self is Normalization.BEFORE else scale
        return plan.scaled(before, after)


class _Scaled(Plan):
    def __init__(self, plan: Plan, before: Tensor | None, after: Tensor | None) -> None:
        self.plan, self.before, self.after = plan, before, after

    def __call__(self, values: Tensor) -> Tensor:
        return _times(self.plan(_times(values, self.before)), self.after)

    def adjoint(self, values: Tensor) -> Tensor:
        return _times(self.plan.adjoint(_times(values, self.after)), self.before)


def _times(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight.unsqueeze(-1)


def check_features(features: Tensor) -> None:
    """Refuse what is no (B, *spatial, d) tensor of finite features."""
    _check.finite("features", _check.tensor("features", features))
    if features.dim() < 3:
        raise ValueError(f"features must have shape (B, *spatial, d), got {tuple(features.shape)}.")


# ---- Exact -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    r"""$(K v)_i = \sum_j \exp(-\tfrac12 \|f_i - f_j\|^2)\, v_j$ over all pairs of pixels: the reference.

    Exact values and gradients, to the features as well. Time and memory grow with the square of the pixels. Images of
    at most `chunk` pixels keep their kernel; larger ones compute it anew, `chunk` rows at a time, in every call and
    again in the backward pass, so that memory grows with chunk times pixels only.

    Args:
        chunk: rows of the kernel in memory at a time, at least 1.

    Example:
        >>> features = torch.tensor([[[0.0], [0.0], [100.0]]])  # two equal pixels and one far away
        >>> Exact().prepare(features)(torch.tensor([[[1.0], [2.0], [3.0]]])).flatten()
        tensor([3., 3., 3.])
    """

    chunk: int = 4096
    differentiable = True

    def __post_init__(self) -> None:
        _check.integer("chunk", self.chunk)

    def prepare(self, features: Tensor, mask: Tensor | None = None) -> Plan:
        check_features(features)
        return _ExactPlan(features.flatten(1, -2), self.chunk)


class _ExactPlan(Plan):
    def __init__(self, points: Tensor, chunk: int) -> None:
        self.points, self.chunk = points, chunk  # (B, N, d)
        self.kernel = _gaussian(points, points) if points.shape[1] <= chunk else None

    def __call__(self, values: Tensor) -> Tensor:
        flat = values.flatten(1, -2)
        if self.kernel is not None:
            return (self.kernel @ flat).reshape(values.shape)
        graph = torch.is_grad_enabled() and (self.points.requires_grad or values.requires_grad)
        rows = [
            checkpoint(_filter_rows, some, self.points, flat, use_reentrant=False)
            if graph
            else _filter_rows(some, self.points, flat)
            for some in self.points.split(self.chunk, dim=1)
        ]
        return torch.cat(rows, dim=1).reshape(values.shape)

    adjoint = __call__  # the kernel is symmetric


def _filter_rows(rows: Tensor, points: Tensor, values: Tensor) -> Tensor:
    return _gaussian(rows, points) @ values


def _gaussian(x: Tensor, y: Tensor) -> Tensor:  # (B, n, d), (B, m, d) -> (B, n, m)
    # One feature at a time: n m numbers in memory, not n m d. Not |x|^2 - 2 x'y + |y|^2, which cancels in float32.
    distance = (x[..., :, None, 0] - y[..., None, :, 0]).square()
    for k in range(1, x.shape[-1]):
        distance = distance + (x[..., :, None, k] - y[..., None, :, k]).square()
    return torch.exp(-0.5 * distance)


# ---- Window ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvWindow:
    r"""$(K v)_i = \sum_{j \in W(i)} \exp(-\tfrac12 \|f_i - f_j\|^2)\, v_j$ over a window around each pixel.

    Exact inside the window, blind outside of it, as in convolutional CRFs. Values and gradients are exact for the
    truncated kernel. Costs one pass over the values for each pixel of the window.

    Args:
        size: pixels along each side of the window, odd.
        dilation: steps between the pixels of the window, at least 1.

    Raises:
        ValueError: `size` is even.

    Example:
        >>> ConvWindow(size=3).prepare(torch.zeros(1, 5, 1))(torch.ones(1, 5, 1)).flatten()  # how many each one sees
        tensor([2., 3., 3., 3., 2.])

    Reference:
        M. T. T. Teichmann and R. Cipolla, "Convolutional CRFs for Semantic Segmentation", BMVC 2019.
    """

    size: int = 11
    dilation: int = 1
    differentiable = True

    def __post_init__(self) -> None:
        if _check.integer("size", self.size) % 2 == 0:
            raise ValueError(f"size must be odd, so that the window has a centre, got {self.size}.")
        _check.integer("dilation", self.dilation)

    def prepare(self, features: Tensor, mask: Tensor | None = None) -> Plan:
        check_features(features)
        return _WindowPlan(features, self.size // 2, self.dilation)


class _WindowPlan(Plan):
    def __init__(self, features: Tensor, radius: int, dilation: int) -> None:
        shape = features.shape[1:-1]
        # Offsets that leave the image from every pixel contribute nothing.
        reach = [min(radius, (n - 1) // dilation) * dilation for n in shape]
        self.offsets = list(itertools.product(*(range(-r, r + 1, dilation) for r in reach)))
        self.margin = [m for r in reversed(reach) for m in (r, r)]
        self.reach = reach
        inside = self._padded(torch.ones_like(features[:1, ..., :1]))
        padded = self._padded(features)
        self.weights = [
            torch.exp(-0.5 * (features - self._shifted(padded, shape, offset)).square().sum(-1, keepdim=True))
            * self._shifted(inside, shape, offset)
            for offset in self.offsets
        ]

    def __call__(self, values: Tensor) -> Tensor:
        shape, padded = values.shape[1:-1], self._padded(values)
        out = torch.zeros_like(values)
        for weight, offset in zip(self.weights, self.offsets, strict=True):
            out = torch.addcmul(out, weight, self._shifted(padded, shape, offset))
        return out

    adjoint = __call__  # i is in the window of j where j is in that of i

    def _padded(self, values: Tensor) -> Tensor:
        return pad(values, (0, 0, *self.margin))

    def _shifted(self, padded: Tensor, shape: torch.Size, offset: tuple[int, ...]) -> Tensor:
        """Where pixel i + offset comes to lie on pixel i, a view."""
        for axis, (n, o, r) in enumerate(zip(shape, offset, self.reach, strict=True), start=1):
            padded = padded.narrow(axis, r + o, n)
        return padded


# ---- Separable -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeparableSpatial:
    r"""$K = K_1 \otimes \dots \otimes K_n$: the exact spatial kernel, one axis of the image after the other.

    For features that are the positions of the pixels and nothing else, as `Spatial` makes them. Exact values and
    gradients, to the bandwidth as well: the filter to learn theta_gamma with. Applies a matrix a side, so each pixel
    costs as many multiplications as the image has rows and columns.

    Raises:
        ValueError: features that are not the positions of a grid.

    Example:
        >>> positions = torch.tensor([[[0.0], [1.0]]])
        >>> SeparableSpatial().prepare(positions)(torch.tensor([[[1.0], [0.0]]])).flatten()
        tensor([1.0000, 0.6065])
    """

    differentiable = True

    def prepare(self, features: Tensor, mask: Tensor | None = None) -> Plan:
        check_features(features)
        axes = positions_along(features)
        return _SeparablePlan([_gaussian(axis[:, None], axis[:, None]) for axis in axes])


class _SeparablePlan(Plan):
    def __init__(self, kernels: list[Tensor]) -> None:
        self.kernels = kernels  # one (n, n) an axis

    def __call__(self, values: Tensor) -> Tensor:
        for axis, kernel in enumerate(self.kernels, start=1):
            rows = values.flatten(axis + 1)  # (B, ..., n, rest)
            values = (kernel @ rows).reshape(values.shape)
        return values

    adjoint = __call__  # each kernel is symmetric, and they commute


def grid(shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:  # (1, *spatial, n)
    """The position of every pixel, in pixels, the last axis first: (x, y) in an image, (x, y, z) in a volume."""
    axes = [torch.arange(n, dtype=like.dtype, device=like.device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1).unsqueeze(0)


def positions_along(features: Tensor) -> list[Tensor]:
    """The inverse of `grid`, up to a scale an axis: the coordinate along each axis."""
    shape = features.shape[1:-1]
    n = len(shape)
    wrong = f"features must be the positions of a grid, (1, *spatial, {n}), as Spatial makes them"
    if features.shape[0] != 1 or features.shape[-1] != n:
        raise ValueError(f"{wrong}; got shape {tuple(features.shape)}. Take Exact() or ConvWindow() for others.")
    axes = []
    for a in range(n):
        coordinate = features[0, ..., n - 1 - a]
        for _ in range(a):
            coordinate = coordinate[0]
        axes.append(coordinate.flatten(1)[:, 0] if coordinate.dim() > 1 else coordinate)
    if _check.can_look_at(features):
        there = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)
        if not torch.equal(there, features[0]):
            raise ValueError(f"{wrong}; these change along other axes too. Take Exact() or ConvWindow() for others.")
    return axes
