"""Restoration of images: reaction diffusion, deconvolution, learned differential equations, diffusion from seeds."""

from ._jpeg import JPEGBox as JPEGBox
from ._jpeg import quantisation_table as quantisation_table
from ._resampling import Downsampling as Downsampling
from .blind import BlindDeconvolution as BlindDeconvolution
from .blind import Deblurred as Deblurred
from .blind import KernelEstimation as KernelEstimation
from .deconvolution import NonBlindDeconvolution as NonBlindDeconvolution
from .diffusion import LearnedPDE as LearnedPDE
from .diffusion import LearnedPDEStep as LearnedPDEStep
from .diffusion import PDEState as PDEState
from .elliptic import grid_edges as grid_edges
from .elliptic import solve_elliptic as solve_elliptic
from .invariants import derivatives as derivatives
from .invariants import differential_invariants as differential_invariants
from .seeded import SeededDiffusion as SeededDiffusion
from .seeds import Seeds as Seeds
from .seeds import greedy_seeds as greedy_seeds
from .tiling import tiled as tiled
from .tnrd import TNRD as TNRD
from .tnrd import TNRDStep as TNRDStep
