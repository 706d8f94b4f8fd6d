"""Theories of the algorithms that the networks unroll."""

from .diffusion import DiffusionTheory as DiffusionTheory
from .ista import FISTATheory as FISTATheory
from .ista import ISTATheory as ISTATheory
from .lloyd import LloydTheory as LloydTheory
from .meanfield import MeanFieldTheory as MeanFieldTheory
