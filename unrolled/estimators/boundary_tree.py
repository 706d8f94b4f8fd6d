"""`BoundaryTreeClassifier` and `BoundaryTreeRegressor`: prediction by a walk over a few kept examples, online."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.multiclass import _check_partial_fit_first_call, check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from unrolled.estimators._base import Array, check_parameters
from unrolled.neighbours import BoundaryForest


class _BoundaryTrees(BaseEstimator):
    """What both share: the forest, its examples, the walks that explain a prediction."""

    forest_: BoundaryForest
    k: int
    n_trees: int
    weighted: bool
    shuffle: bool
    random_state: Any

    def explain(self, X: Any) -> list[list[list[int]]]:
        """The walk of each sample down each tree, from the root to where it ends, as rows of `prototypes_`.

        Args:
            X: (n_samples, n_features).
        """
        x = self._fitted(X)
        offsets = np.concatenate([[0], np.cumsum([len(tree) for tree in self.forest_.trees])]).tolist()
        trees = list(zip(self.forest_.trees, offsets, strict=False))
        return [[[offset + node for node in tree.path(row)] for tree, offset in trees] for row in x]

    def decision_path(self, X: Any) -> Any:
        """Which examples the walks pass by, as scikit-learn's trees tell it: sparse ones, (n_samples, n_prototypes).

        Args:
            X: (n_samples, n_features).
        """
        from scipy.sparse import csr_matrix

        rows = [[node for path in paths for node in path] for paths in self.explain(X)]
        ends = np.cumsum([0, *map(len, rows)])
        places = np.array([node for row in rows for node in row], dtype=np.intp)
        return csr_matrix((np.ones(len(places), dtype=np.intp), places, ends), shape=(len(rows), self.n_prototypes_))

    @property
    def n_prototypes_(self) -> int:
        """How many examples all trees keep."""
        return sum(len(tree) for tree in self.forest_.trees)

    @property
    def prototypes_(self) -> Array:
        """(n_prototypes, n_features), the examples that the trees keep, tree after tree, each tree's root first."""
        prototypes: Array = torch.cat([tree.points for tree in self.forest_.trees]).numpy()
        return prototypes

    @property
    def prototype_indices_(self) -> Array:
        """(n_prototypes,), which of the samples seen, over all calls, each prototype was."""
        indices: Array = torch.cat([tree.indices for tree in self.forest_.trees]).numpy()
        return indices

    def _prototype_labels(self) -> Array:
        labels: Array = torch.cat([tree.labels for tree in self.forest_.trees]).numpy()
        return labels

    def _check_parameters(self) -> None:
        check_parameters(self, (), {"k": 2, "n_trees": 1})

    def _new_forest(self, threshold: float | None) -> BoundaryForest:
        return BoundaryForest(self.n_trees, k=self.k, threshold=threshold, weighted=bool(self.weighted))

    def _grow(self, X: Array, labels: Array, *, shuffle: bool) -> None:
        generator = None
        if shuffle:
            seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
            generator = torch.Generator().manual_seed(int(seed))
        self.forest_.train(_tensor(X), torch.from_numpy(np.array(labels)), generator=generator)

    def _fitted(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return _tensor(validate_data(self, X, reset=False, dtype=(np.float64, np.float32)))


class BoundaryTreeClassifier(ClassifierMixin, _BoundaryTrees):
    r"""$v \leftarrow \arg\min_{w \in C(v)} \|x_w - x\|$ from the root on; the class is that of the node where it ends.

    Keeps only the samples that the others would classify wrongly, in a tree, see `unrolled.neighbours.BoundaryTree`. A
    prediction is a walk by a few of them, which `explain` tells. It learns online: `partial_fit` takes samples as they
    come. It is fast, but not as accurate as all nearest neighbours; `n_trees` makes up for part of that.

    Features count by their scale, as for nearest neighbours: put a `StandardScaler` in front where their units differ.

    Parameters:
        k: how many children a node may have, at least 2.
        n_trees: several trees, which differ in the order of the samples, vote.
        weighted: whether votes count by one over the distance, see `unrolled.neighbours.BoundaryForest`.
        shuffle: whether `fit` draws an order of the samples for each tree. Without, they come as they are, and the
            trees differ in the first sample only. `partial_fit` never shuffles.
        random_state: seed or `numpy.random.RandomState` of these orders. The same int gives the same result.

    Attributes:
        classes_: (n_classes,), the labels.
        forest_: the `unrolled.neighbours.BoundaryForest`.
        prototypes_: (n_prototypes, n_features), the samples kept, tree after tree.
        prototype_labels_: (n_prototypes,), their classes.
        prototype_indices_: (n_prototypes,), which of the samples seen each was.
        n_prototypes_: how many they are.
        n_features_in_, feature_names_in_: as in every estimator of scikit-learn.

    Raises:
        ValueError, TypeError: as scikit-learn's estimators do.

    Example:
        >>> from unrolled.estimators.boundary_tree import BoundaryTreeClassifier
        >>> from sklearn.datasets import load_digits
        >>> X, y = load_digits(return_X_y=True)
        >>> model = BoundaryTreeClassifier(n_trees=10, random_state=0).fit(X[:1297], y[:1297])
        >>> model.score(X[1297:], y[1297:]) > 0.9
        True

    Reference:
        C. Mathy, N. Derbinsky, J. Bento, J. Rosenthal and J. Yedidia, "The Boundary Forest Algorithm for Online
        Supervised and Unsupervised Learning", AAAI 2015.
    """

    def __init__(
        self,
        k: int = 50,
        *,
        n_trees: int = 1,
        weighted: bool = True,
        shuffle: bool = True,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.k = k
        self.n_trees = n_trees
        self.weighted = weighted
        self.shuffle = shuffle
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> BoundaryTreeClassifier:
        """Grow the trees anew.

        Args:
            X: (n_samples, n_features).
            y: (n_samples,), classes.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        self.forest_ = self._new_forest(None)
        self._grow(X, labels, shuffle=bool(self.shuffle))
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> BoundaryTreeClassifier:
        """Show more samples to the trees, in the order in which they are.

        Args:
            X: (n_samples, n_features).
            y: (n_samples,), classes.
            classes: all that may ever come; needed in the first call, unless `fit` came before.
        """
        first = not hasattr(self, "forest_")
        self._check_parameters()
        X, y = validate_data(self, X, y, reset=first, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        _check_partial_fit_first_call(self, classes)
        if unknown := sorted(set(np.unique(y).tolist()) - set(self.classes_.tolist())):
            raise ValueError(f"y has classes {unknown} that `classes` of the first call had not: {self.classes_}.")
        if first:
            self.forest_ = self._new_forest(None)
        self._grow(X, np.searchsorted(self.classes_, y), shuffle=False)
        return self

    @property
    def prototype_labels_(self) -> Array:
        """(n_prototypes,), the classes of the samples kept."""
        labels: Array = self.classes_[self._prototype_labels()]
        return labels

    def predict_proba(self, X: Any) -> Array:
        """The shares of the votes, (n_samples, n_classes); of a single tree, a one.

        Args:
            X: (n_samples, n_features).
        """
        x = self._fitted(X)
        shares: Array = self.forest_.shares(x, len(self.classes_)).numpy()
        return shares

    def predict(self, X: Any) -> Array:
        """The class with the largest share, (n_samples,).

        Args:
            X: (n_samples, n_features).
        """
        shares = self.predict_proba(X)
        classes: Array = self.classes_[shares.argmax(1)]
        return classes


class BoundaryTreeRegressor(RegressorMixin, _BoundaryTrees):
    r"""$v \leftarrow \arg\min_{w \in C(v)} \|x_w - x\|$ from the root on; the value is that of the node where it ends.

    Keeps only the samples whose value the others would miss by more than `threshold`, in a tree, see
    `unrolled.neighbours.BoundaryTree`. It learns online by `partial_fit`. Several trees answer with their weighted
    mean, which is smoother and closer.

    Parameters:
        k: how many children a node may have, at least 2.
        threshold: how far a prediction may be off before the sample is kept, at least 0, in the units of y. At 0 nearly
            every sample is kept; a larger one makes a smaller tree, and predictions that are off by about as much.
        n_trees: several trees, which differ in the order of the samples.
        weighted: whether their answers count by one over the distance, see `unrolled.neighbours.BoundaryForest`.
        shuffle: whether `fit` draws an order of the samples for each tree. `partial_fit` never shuffles.
        random_state: seed or `numpy.random.RandomState` of these orders. The same int gives the same result.

    Attributes:
        forest_: the `unrolled.neighbours.BoundaryForest`.
        prototypes_: (n_prototypes, n_features), the samples kept, tree after tree.
        prototype_values_: (n_prototypes,), their values.
        prototype_indices_: (n_prototypes,), which of the samples seen each was.
        n_prototypes_: how many they are.
        n_features_in_, feature_names_in_: as in every estimator of scikit-learn.

    Raises:
        ValueError, TypeError: as scikit-learn's estimators do.

    Example:
        >>> from unrolled.estimators.boundary_tree import BoundaryTreeRegressor
        >>> x = torch.linspace(0, 6, 200).numpy()[:, None]
        >>> model = BoundaryTreeRegressor(threshold=0.1, n_trees=5, random_state=0).fit(x, x[:, 0] ** 2)
        >>> bool(abs(model.predict([[2.0]])[0] - 4) < 0.2)
        True

    Reference:
        C. Mathy, N. Derbinsky, J. Bento, J. Rosenthal and J. Yedidia, "The Boundary Forest Algorithm for Online
        Supervised and Unsupervised Learning", AAAI 2015. The weighted mean is our choice.
    """

    def __init__(
        self,
        k: int = 50,
        *,
        threshold: float = 0.0,
        n_trees: int = 1,
        weighted: bool = True,
        shuffle: bool = True,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.k = k
        self.threshold = threshold
        self.n_trees = n_trees
        self.weighted = weighted
        self.shuffle = shuffle
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> BoundaryTreeRegressor:
        """Grow the trees anew.

        Args:
            X: (n_samples, n_features).
            y: (n_samples,), real numbers.
        """
        X, y = self._validated(X, y, reset=True)
        self.forest_ = self._new_forest(float(self.threshold))
        self._grow(X, y, shuffle=bool(self.shuffle))
        return self

    def partial_fit(self, X: Any, y: Any) -> BoundaryTreeRegressor:
        """Show more samples to the trees, in the order in which they are.

        Args:
            X: (n_samples, n_features).
            y: (n_samples,), real numbers.
        """
        first = not hasattr(self, "forest_")
        X, y = self._validated(X, y, reset=first)
        if first:
            self.forest_ = self._new_forest(float(self.threshold))
        self._grow(X, y, shuffle=False)
        return self

    @property
    def prototype_values_(self) -> Array:
        """(n_prototypes,), the values of the samples kept."""
        return self._prototype_labels()

    def predict(self, X: Any) -> Array:
        """The value, or the weighted mean of the trees' values, (n_samples,).

        Args:
            X: (n_samples, n_features).
        """
        x = self._fitted(X)
        values: Array = self.forest_.predict(x).numpy()
        return values

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        self._check_parameters()
        check_scalar(self.threshold, "threshold", (int, float, np.integer, np.floating), min_val=0)
        X, y = validate_data(self, X, y, reset=reset, dtype=(np.float64, np.float32), y_numeric=True)
        return X, y.astype(np.float64)


def _tensor(X: Array) -> Tensor:
    """A copy: X may be read-only, which torch warns of."""
    return torch.from_numpy(np.array(X, order="C"))
