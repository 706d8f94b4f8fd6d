"""The classical solvers, as plain functions: what the networks are before training, and the oracles of the tests.

All of them are batched over the leading dimensions of y, differentiable by autograd, and answer for every sample
independently of its batch mates. `dictionary` is a matrix (m, n) with atoms as columns or a `LinearOperator`, real or
complex.
"""

from .amp import amp as amp
from .blind_deconvolution import estimate_kernel as estimate_kernel
from .blind_deconvolution import kernel_at_scale as kernel_at_scale
from .deconvolution import deconvolve as deconvolve
from .denoising import dct_atoms as dct_atoms
from .denoising import dct_shrinkage as dct_shrinkage
from .diffusion import heat as heat
from .diffusion import perona_malik as perona_malik
from .diffusion import seeded_diffusion as seeded_diffusion
from .kmeans import kmeans_objective as kmeans_objective
from .kmeans import kmeans_plus_plus as kmeans_plus_plus
from .kmeans import lloyd as lloyd
from .kmeans import soft_kmeans as soft_kmeans
from .lasso import fista as fista
from .lasso import ista as ista
from .lasso import lasso_objective as lasso_objective
from .lasso import lipschitz as lipschitz
from .lowrank import Decomposition as Decomposition
from .lowrank import RobustPCAResult as RobustPCAResult
from .lowrank import nonnegative_ista as nonnegative_ista
from .lowrank import robust_pca as robust_pca
from .lowrank import separate as separate
from .lowrank import separation_objective as separation_objective
from .lowrank import singular_value_threshold as singular_value_threshold
from .meanfield import mean_field as mean_field
from .thresholding import iht as iht
from .thresholding import iht_penalized as iht_penalized
