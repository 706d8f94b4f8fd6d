"""Decoupled neural interfaces: synthetic gradients for unrolled networks, chains of modules and recurrent networks."""

from .chain import DecoupledChain as DecoupledChain
from .chain import DecoupledModule as DecoupledModule
from .pipeline import PipelineStage as PipelineStage
from .recurrent import Border as Border
from .recurrent import SyntheticBPTT as SyntheticBPTT
from .synthesisers import ConvSynthesiser as ConvSynthesiser
from .synthesisers import LinearSynthesiser as LinearSynthesiser
from .synthesisers import MLPSynthesiser as MLPSynthesiser
from .synthesisers import Synthesiser as Synthesiser
from .synthesisers import ZeroSynthesiser as ZeroSynthesiser
from .unroll import SyntheticGradients as SyntheticGradients
