"""scikit-learn estimators around the networks. Not loaded by `import unrolled`: `from unrolled import estimators`."""

from .boundary_tree import BoundaryTreeClassifier as BoundaryTreeClassifier
from .boundary_tree import BoundaryTreeRegressor as BoundaryTreeRegressor
from .deep_kmeans import DeepKMeansNet as DeepKMeansNet
from .kmeans_net import KMeansNet as KMeansNet
from .robust_pca import RobustPCA as RobustPCA
from .sparse_encoder import SparseEncoder as SparseEncoder
