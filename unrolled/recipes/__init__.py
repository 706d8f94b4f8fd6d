"""Recipes: how to train the networks on their problems, in seconds to minutes on one CPU core.

`greedy` and `train` are for recovery of sparse codes by the networks of `unrolled.sparse`, `train_boundary_tree` for
classes; the others are for images.
"""

from .blind import train_blind as train_blind
from .deconvolution import SyntheticBlurs as SyntheticBlurs
from .deconvolution import motion_kernel as motion_kernel
from .deconvolution import train_deconvolution as train_deconvolution
from .denoising import noisy_crops as noisy_crops
from .denoising import refine_denoiser as refine_denoiser
from .denoising import train_denoiser as train_denoiser
from .diffusion import train_pde as train_pde
from .neighbours import train_boundary_tree as train_boundary_tree
from .recovery import train as train
from .search import Problem as Problem
from .search import greedy as greedy
