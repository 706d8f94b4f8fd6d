"""Training: `fit` runs the loop, `fit_stagewise` trains layer after layer, `freeze` holds parameters where they are."""

from .deep_kmeans import Alternating as Alternating
from .deep_kmeans import DeepHistory as DeepHistory
from .deep_kmeans import Joint as Joint
from .deep_kmeans import best_of_seeds as best_of_seeds
from .deep_kmeans import fit_deep_kmeans as fit_deep_kmeans
from .freezing import freeze as freeze
from .freezing import unfreeze as unfreeze
from .history import History as History
from .history import Stage as Stage
from .loop import default_optimizer as default_optimizer
from .loop import fit as fit
from .stagewise import fit_stagewise as fit_stagewise
from .windowed import WindowedLoss as WindowedLoss
