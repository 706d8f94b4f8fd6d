"""How gradients flow through an unrolled loop.

A strategy is an object over one function: `gradient(advance, state, num_iters) -> state`, where
`advance(state, start, stop)` runs the iterations `start .. stop - 1`. Anything callable like that can be passed to
`Unroll(gradient=...)`.
"""

from .contraction import ContractionMeter as ContractionMeter
from .contraction import GradientWarning as GradientWarning
from .contraction import contraction_factor as contraction_factor
from .implicit import Implicit as Implicit
from .phantom import Phantom as Phantom
from .protocol import Advance as Advance
from .protocol import Gradient as Gradient
from .protocol import Loop as Loop
from .solvers import Anderson as Anderson
from .solvers import Neumann as Neumann
from .solvers import Solution as Solution
from .solvers import Solver as Solver
from .strategies import Backprop as Backprop
from .strategies import Checkpointed as Checkpointed
from .strategies import Truncated as Truncated
