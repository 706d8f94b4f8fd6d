"""The kernels of a CRF: which features tie pixels together, how strongly, and what filters with them."""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unrolled import _check
from unrolled.crf.filters import GaussianFilter, Normalization, SeparableSpatial, grid
from unrolled.crf.permutohedral import Permutohedral


class Weights(enum.Enum):
    """How many weights a kernel has: one, one a class, or a matrix from class to class (as in CRF-RNN's code)."""

    SCALAR = "scalar"
    PER_CLASS = "per class"
    MATRIX = "matrix"


class Compatibility(enum.Enum):
    """What two neighbours of different classes cost: the same for all (Potts), or a learned matrix that starts so."""

    POTTS = "Potts"
    LEARNED = "learned"


@dataclass(frozen=True, kw_only=True)
class Kernel(abc.ABC):
    """A Gaussian kernel over features of the pixels. Subclasses say which features; `Bilateral` and `Spatial` do.

    Args:
        weight: how much the messages count, one number or one a class; the untrained weight.
        filter: what applies the kernel.
        normalization: how the filter is normalised.
        learn: whether the bandwidths are parameters; needs a filter that is differentiable in them.
    """

    weight: float | Sequence[float] = 1.0
    filter: GaussianFilter = field(default_factory=Permutohedral)
    normalization: Normalization = Normalization.AFTER
    learn: bool = False

    def __post_init__(self) -> None:
        for number in self.weight if isinstance(self.weight, Sequence) else (self.weight,):
            _check.real("weight", number)
        if not isinstance(self.filter, GaussianFilter) or isinstance(self.filter, type):
            raise TypeError(f"filter must be a filter object such as Permutohedral(), got {self.filter!r}.")
        if not isinstance(self.normalization, Normalization):
            raise TypeError(f"normalization must be a Normalization, got {self.normalization!r}.")
        if self.learn and not self.filter.differentiable:
            raise ValueError(
                f"learn=True needs a filter that is differentiable in its bandwidths, {self.filter!r} is not. Take "
                "SeparableSpatial() for a spatial kernel, ConvWindow(...) or Exact() for others."
            )
        for name, value in self.bandwidths().items():
            for number in value if isinstance(value, Sequence) else (value,):
                _check.real(name, number, above=0.0, hint="It is a bandwidth, the standard deviation of a Gaussian.")

    @abc.abstractmethod
    def bandwidths(self) -> dict[str, float | Sequence[float]]:
        """The untrained bandwidths by name, positive."""

    @abc.abstractmethod
    def features(self, image: Tensor, bandwidths: Mapping[str, Tensor]) -> Tensor:
        """The features of every pixel, divided by the bandwidths.

        Args:
            image: (B, *spatial, C)
            bandwidths: the present value of each bandwidth.

        Returns:
            (B, *spatial, d), or (1, *spatial, d) where they do not depend on the image.
        """


@dataclass(frozen=True, kw_only=True)
class Bilateral(Kernel):
    r"""$\exp\bigl(-\|p_i - p_j\|^2 / 2\theta_\alpha^2 - \|I_i - I_j\|^2 / 2\theta_\beta^2\bigr)$: near and alike.

    Args:
        theta_alpha: bandwidth of the position, in pixels; one number, or one for each spatial axis in their order.
        theta_beta: bandwidth of the colour, in levels of 0..255; one number, or one for each channel.
        color_range: which number stands for 255 levels in the image: 255 as it is, 1 for images in 0..1. Nothing is
            guessed; where images are standardised, it is the width that they have spread 0..255 to.
        weight, filter, normalization, learn: as for `Kernel`.

    Raises:
        TypeError, ValueError: a bandwidth or `color_range` that is not positive; `learn` with the lattice.

    Example:
        >>> Bilateral(theta_alpha=80.0, theta_beta=13.0, weight=10.0, color_range=1.0).theta_beta
        13.0

    Reference:
        P. Krähenbühl and V. Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
        NIPS 2011.
    """

    theta_alpha: float | Sequence[float] = 160.0
    theta_beta: float | Sequence[float] = 3.0
    weight: float | Sequence[float] = 5.0
    color_range: float = 255.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.real("color_range", self.color_range, above=0.0)

    def bandwidths(self) -> dict[str, float | Sequence[float]]:
        return {"theta_alpha": self.theta_alpha, "theta_beta": self.theta_beta}

    def features(self, image: Tensor, bandwidths: Mapping[str, Tensor]) -> Tensor:
        position = _positions("theta_alpha", image, bandwidths["theta_alpha"])
        theta = bandwidths["theta_beta"]
        if theta.dim() == 1 and len(theta) != image.shape[-1]:
            raise ValueError(f"theta_beta has {len(theta)} entries, the image {image.shape[-1]} channels.")
        color = image * (255 / self.color_range) / theta
        return torch.cat([position.expand(*image.shape[:-1], -1), color], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Spatial(Kernel):
    r"""$\exp\bigl(-\|p_i - p_j\|^2 / 2\theta_\gamma^2\bigr)$: near, whatever the colour.

    Args:
        theta_gamma: bandwidth of the position, in pixels; one number, or one for each spatial axis in their order.
        weight, normalization, learn: as for `Kernel`.
        filter: as for `Kernel`; where not given, the lattice, or `SeparableSpatial()` with `learn=True`.

    Raises:
        TypeError, ValueError: a bandwidth that is not positive; `learn` with the lattice.

    Example:
        >>> Spatial(learn=True).filter
        SeparableSpatial()
    """

    theta_gamma: float | Sequence[float] = 3.0
    weight: float | Sequence[float] = 3.0
    filter: GaussianFilter | None = None  # type: ignore[assignment]  # never None once built

    def __post_init__(self) -> None:
        if self.filter is None:
            object.__setattr__(self, "filter", SeparableSpatial() if self.learn else Permutohedral())
        super().__post_init__()

    def bandwidths(self) -> dict[str, float | Sequence[float]]:
        return {"theta_gamma": self.theta_gamma}

    def features(self, image: Tensor, bandwidths: Mapping[str, Tensor]) -> Tensor:
        return _positions("theta_gamma", image, bandwidths["theta_gamma"])


def _positions(name: str, image: Tensor, theta: Tensor) -> Tensor:  # (1, *spatial, n)
    shape = image.shape[1:-1]
    if theta.dim() == 1 and len(theta) != len(shape):
        raise ValueError(f"{name} has {len(theta)} entries, the image {len(shape)} spatial axes.")
    # The grid has the last axis first.
    return grid(shape, image) / (theta.flip(0) if theta.dim() == 1 else theta)
