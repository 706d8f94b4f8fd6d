"""Encoders that split signals into a low-rank and a sparse part, and nonnegative ones: one system a file."""

from .basis import fit_basis as fit_basis
from .nmf import NMFEncoder as NMFEncoder
from .nmf import NMFStep as NMFStep
from .rnmf import RobustNMFEncoder as RobustNMFEncoder
from .rnmf import RobustNMFStep as RobustNMFStep
from .rpca import RPCAEncoder as RPCAEncoder
from .rpca import RPCAStep as RPCAStep
