"""Training: `fit` runs the loop, `fit_stagewise` trains layer after layer, `freeze` holds parameters where they are."""

from .freezing import freeze as freeze
from .freezing import unfreeze as unfreeze
from .history import History as History
from .history import Stage as Stage
from .loop import default_optimizer as default_optimizer
from .loop import fit as fit
from .stagewise import fit_stagewise as fit_stagewise
from .windowed import WindowedLoss as WindowedLoss
