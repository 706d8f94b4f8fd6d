"""Conditional random fields as layers: dense mean-field inference, and the Gaussian filters that it is made of."""

from .filters import ConvWindow as ConvWindow
from .filters import Exact as Exact
from .filters import GaussianFilter as GaussianFilter
from .filters import Normalization as Normalization
from .filters import Plan as Plan
from .filters import SeparableSpatial as SeparableSpatial
from .kernels import Bilateral as Bilateral
from .kernels import Compatibility as Compatibility
from .kernels import Kernel as Kernel
from .kernels import Spatial as Spatial
from .kernels import Weights as Weights
from .meanfield import CRFasRNN as CRFasRNN
from .meanfield import CRFStep as CRFStep
from .permutohedral import Permutohedral as Permutohedral
