"""Sparse coding networks: one system a file."""

from .ista import LISTA as LISTA
from .ista import FactoredLISTAStep as FactoredLISTAStep
from .ista import LISTAStep as LISTAStep
