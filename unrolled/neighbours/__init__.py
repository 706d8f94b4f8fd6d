"""Neighbours: boundary trees, which classify by a walk from example to example, and encoders trained through them."""

from .differentiable import DifferentiableBoundaryTree as DifferentiableBoundaryTree
from .differentiable import Explanation as Explanation
from .forest import BoundaryForest as BoundaryForest
from .tree import BoundaryTree as BoundaryTree
from .walk import BoundaryTreeStep as BoundaryTreeStep
from .walk import Walk as Walk
