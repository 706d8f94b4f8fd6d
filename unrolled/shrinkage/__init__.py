"""Learnable shrinkage operators: what a step may call in place of the soft threshold, see `Shrinkage`."""

from ._base import Shrinkage as Shrinkage
from .generalized import GeneralizedShrinkage as GeneralizedShrinkage
from .piecewise import PiecewiseLinear as PiecewiseLinear
from .radial_basis import RadialBasis as RadialBasis
from .soft import SoftThreshold as SoftThreshold
