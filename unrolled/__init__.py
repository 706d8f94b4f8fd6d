"""Iterative solvers as trainable PyTorch networks: every iteration a layer, every layer with a meaning."""

from . import crf as crf
from . import functional as functional
from . import gradient as gradient
from . import losses as losses
from . import lowrank as lowrank
from . import metrics as metrics
from . import operators as operators
from . import problems as problems
from . import recipes as recipes
from . import solvers as solvers
from . import sparse as sparse
from . import training as training
from .autoencoder import Autoencoder as Autoencoder
from .crf import CRFasRNN as CRFasRNN
from .gradient import Backprop as Backprop
from .gradient import Checkpointed as Checkpointed
from .gradient import Truncated as Truncated
from .lowrank import NMFEncoder as NMFEncoder
from .lowrank import RobustNMFEncoder as RobustNMFEncoder
from .lowrank import RPCAEncoder as RPCAEncoder
from .momentum import Momentum as Momentum
from .sparse import ALISTA as ALISTA
from .sparse import GLISTA as GLISTA
from .sparse import LAMP as LAMP
from .sparse import LFISTA as LFISTA
from .sparse import LISTA as LISTA
from .sparse import LISTACP as LISTACP
from .sparse import NAALISTA as NAALISTA
from .sparse import AdaptiveISTA as AdaptiveISTA
from .sparse import HyperLISTA as HyperLISTA
from .sparse import L0Encoder as L0Encoder
from .sparse import MSparseEncoder as MSparseEncoder
from .sparse import SC2Net as SC2Net
from .sparse import StepLISTA as StepLISTA
from .sparse import TiLISTA as TiLISTA
from .step import Step as Step
from .stopping import Tolerance as Tolerance
from .trace import Trace as Trace
from .training import fit as fit
from .training import fit_stagewise as fit_stagewise
from .training import freeze as freeze
from .training import unfreeze as unfreeze
from .unroll import Unroll as Unroll

__version__ = "0.1.0"
