"""`DeepKMeansNet`: k-means on the codes of an auto-encoder that learns to be clustered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import ClusterMixin
from sklearn.neighbors import NearestNeighbors
from sklearn.utils import check_random_state, gen_batches
from torch import Tensor, nn

from unrolled.cluster.deep import DeepKMeans
from unrolled.cluster.deep_losses import Contrast
from unrolled.cluster.encoders import Coders, fully_connected_coders
from unrolled.cluster.kmeans import KMeansHead
from unrolled.estimators._base import Array, TorchTransformer, check_parameters
from unrolled.training.deep_kmeans import DeepHistory, best_of_seeds, fit_deep_kmeans

PASS = 4096  # rows at a time where all are looked at


class DeepKMeansNet(ClusterMixin, TorchTransformer):
    r"""$\min_{f,g,C} \frac{1}{\sigma^2}\|x - g(h)\|^2 + \lambda\,\ell(h, C)$, $h = f(x) / \|f(x)\|$, averaged.

    Clusters by an auto-encoder and k-means on its codes, which learn together, see
    `unrolled.training.fit_deep_kmeans`. For data whose clusters are no balls, such as images; it needs thousands of
    samples to learn from. For others `KMeansNet` is faster and no worse.

    Results differ from seed to seed by several points of accuracy: `n_init` runs, of which the one with the smallest
    clustering loss is kept, make them steadier.

    Parameters:
        n_clusters: k, from 1 to the number of samples.
        n_components: length of a code.
        hidden: widths of the hidden layers of the encoder; the decoder has them in reverse.
        coders: your own networks: a function of the numbers of features and of components that returns an encoder and
            a decoder. `None` makes them from `hidden`.
        standardize: whether the features are centred, and all divided by one number, on their way into the network.
            `False` for a decoder that ends in a sigmoid, and pixels from 0 to 1.
        augment: as in `fit_deep_kmeans`, such as `RandomAffine(shape=(1, 28, 28))`; it gets rows of X.
        n_neighbors: each sample is taken to be of one cluster with so many others, those with the nearest features
            (fewer, where there are fewer). They are searched for by comparing all pairs, in a time that grows with the
            square of the number of samples. 0 for none.
        contrast: `unrolled.cluster.deep_losses.Contrast`, which draws the codes of neighbours and of augmented samples
            together; `None` for none. It needs `n_neighbors`, `augment` or both.
        pretrain_epochs: passes through the data for the auto-encoder alone.
        max_iter: passes after that, for everything together, at most.
        n_init: runs, of which the one with the smallest mean squared distance to the centres is kept.
        weight: $\lambda$, at least 0.
        batch_size: samples in a batch, in training and in `transform`.
        learning_rate: Adam's; it falls to 0 in each phase.
        tol: training ends when a smaller share of the samples changes its cluster.
        device: where the network is trained and run, such as `"cuda"`; `None` is the CPU.
        dtype: what the network computes in, float32 or float64; `None` is that of the X that it was fitted on.
        random_state: seed or `numpy.random.RandomState`. The same int gives the same result.
        verbose: show progress bars.

    Attributes:
        cluster_centers_: (n_clusters, n_components), centres of the codes, of norm 1.
        prototypes_: (n_clusters, n_features), the centres decoded: what a typical sample looks like.
        labels_: (n_samples,), the cluster of each sample.
        inertia_: sum of the squared distances of the codes to their centres.
        losses_: (n_init,), the mean squared distances of all runs.
        history_: `unrolled.training.DeepHistory` of the run that was kept.
        n_iter_: passes through the data in that run.
        network_: the `unrolled.cluster.DeepKMeans`, for features as they come out of standardisation.
        n_features_in_, feature_names_in_: as in every estimator of scikit-learn.

    Raises:
        ValueError, TypeError: as scikit-learn's estimators do; ValueError for more clusters than samples.

    Example:
        >>> from unrolled.estimators.deep_kmeans import DeepKMeansNet
        >>> from sklearn.datasets import load_digits
        >>> X = load_digits().data
        >>> model = DeepKMeansNet(10, hidden=(64,), pretrain_epochs=5, max_iter=4, random_state=0).fit(X)
        >>> model.predict(X[:3]).shape, model.encode(X[:3]).shape, model.prototypes_.shape
        ((3,), (3, 10), (10, 64))

    Reference:
        X. Peng, Y. Li, I. W. Tsang, H. Zhu, J. Lv and J. T. Zhou, "XAI Beyond Classification: Interpretable Neural
        Clustering", Journal of Machine Learning Research 23, 2022.
    """

    network_: DeepKMeans

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        n_components: int = 10,
        hidden: Sequence[int] = (500, 500, 2000),
        coders: Callable[[int, int], tuple[nn.Module, nn.Module]] | None = None,
        standardize: bool = True,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        n_neighbors: int = 5,
        contrast: Contrast | None = Contrast(),
        pretrain_epochs: int = 100,
        max_iter: int = 50,
        n_init: int = 1,
        weight: float = 0.4,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        tol: float = 0.001,
        device: torch.device | str | None = None,
        dtype: Any = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_components = n_components
        self.hidden = hidden
        self.coders = coders
        self.standardize = standardize
        self.augment = augment
        self.n_neighbors = n_neighbors
        self.contrast = contrast
        self.pretrain_epochs = pretrain_epochs
        self.max_iter = max_iter
        self.n_init = n_init
        self.weight = weight
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.tol = tol
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # ---- scikit-learn's methods --------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> DeepKMeansNet:
        """Train the auto-encoder, then everything together.

        Args:
            X: (n_samples, n_features). Only batches of it are converted: it may be a memory-mapped file.
            y: ignored.
        """
        integers = {"n_clusters": 1, "n_components": 1, "n_init": 1, "batch_size": 1, "pretrain_epochs": 0}
        check_parameters(self, ("learning_rate",), integers | {"max_iter": 0, "n_neighbors": 0})
        for name in ("weight", "tol"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}.")
        X = self._validated(X, reset=True)
        if self.n_clusters > len(X):
            raise ValueError(f"n_samples={len(X)} should be >= n_clusters={self.n_clusters}.")
        self._dtype = self._computing_dtype(X)
        place = self._computing_device()
        self._mean, self._scale = self._standard(X)
        random = check_random_state(self.random_state)
        seeds = random.randint(np.iinfo(np.int32).max, size=self.n_init).tolist()
        train = functools.partial(self._train, X, place, self._neighbours(X))
        self.network_, histories = best_of_seeds(train, seeds)
        self.losses_ = np.array([history.clustering[-1] for history in histories])
        self.history_ = histories[int(self.losses_.argmin())]
        self.n_iter_ = len(self.history_)
        with torch.no_grad():
            self.cluster_centers_ = self.network_.head.positions.cpu().numpy().copy()
            self.prototypes_ = self._outer(self.network_.prototypes()).cpu().numpy()
        self.labels_, distances = self._nearest(X)
        self.inertia_ = float(distances.sum(dtype=np.float64))
        return self

    def predict(self, X: Any) -> Array:
        """The nearest centre of each sample's code, (n_samples,).

        Args:
            X: (n_samples, n_features).
        """
        return self._nearest(self._fitted(X))[0]

    def transform(self, X: Any) -> Array:
        """The distances, not squared, of the codes to the centres, (n_samples, n_clusters).

        Args:
            X: (n_samples, n_features).
        """
        X = self._fitted(X)
        return self._in_batches(lambda x: self.network_(self._inner(x)).distances.sqrt(), X, len(self.cluster_centers_))

    def encode(self, X: Any) -> Array:
        """The codes, of norm 1, (n_samples, n_components).

        Args:
            X: (n_samples, n_features).
        """
        X = self._fitted(X)
        return self._in_batches(lambda x: self.network_.encode(self._inner(x)), X, self.n_components)

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the sum of the squared distances of the codes to their nearest centres: higher is better.

        Args:
            X: (n_samples, n_features).
            y: ignored.
        """
        return -float(self._nearest(self._fitted(X))[1].sum(dtype=np.float64))

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    # ---- Parts -------------------------------------------------------------------------------------------------------

    def _neighbours(self, X: Array) -> Tensor | None:
        """The numbers of the samples with the nearest features, (n_samples, n_neighbors)."""
        count = min(self.n_neighbors, len(X) - 1)
        if count == 0:
            return None
        return torch.from_numpy(NearestNeighbors(n_neighbors=count).fit(X).kneighbors(return_distance=False))

    def _train(
        self, X: Array, place: torch.device, neighbours: Tensor | None, seed: int
    ) -> tuple[DeepKMeans, DeepHistory]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            make = functools.partial(fully_connected_coders, hidden=self.hidden) if self.coders is None else self.coders
            encoder, decoder = Coders(*make(X.shape[1], self.n_components))
            head = KMeansHead(self.n_components, self.n_clusters)
        model = DeepKMeans(encoder, decoder, head).to(device=place, dtype=getattr(torch, self._dtype.name))
        history = fit_deep_kmeans(
            model,
            _Rows(X, lambda rows: self._inner(self._tensor(rows, place))),
            pretrain_epochs=self.pretrain_epochs,
            epochs=self.max_iter,
            batch_size=self.batch_size,
            weight=float(self.weight),
            augment=None if self.augment is None else self._augmented,
            neighbours=neighbours,
            contrast=None if len(X) == 1 else self.contrast,  # one sample has nothing to be told from
            optimizer=functools.partial(torch.optim.Adam, lr=self.learning_rate),
            tol=float(self.tol),
            progress=bool(self.verbose),
            seed=seed,
        )
        return model.eval(), history

    def _standard(self, X: Array) -> tuple[Array, float]:
        """The mean of each feature, and one standard deviation for all."""
        total, squares = np.zeros(X.shape[1]), 0.0
        if not self.standardize:
            return total.astype(self._dtype), 1.0
        for rows in gen_batches(len(X), PASS):
            total += X[rows].sum(0, dtype=np.float64)
        mean = total / len(X)
        for rows in gen_batches(len(X), PASS):
            squares += float(np.square(X[rows] - mean).sum())
        return mean.astype(self._dtype), (squares / X.size) ** 0.5 or 1.0  # all samples equal: any unit is as good

    def _inner(self, x: Tensor) -> Tensor:
        """Rows of X as the network takes them."""
        return (x - torch.from_numpy(self._mean).to(x)) / self._scale

    def _outer(self, x: Tensor) -> Tensor:
        return x * self._scale + torch.from_numpy(self._mean).to(x)

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        assert self.augment is not None
        return self._inner(self.augment(self._outer(x), generator))

    def _nearest(self, X: Array) -> tuple[Array, Array]:
        """Label and squared distance of the code to the nearest centre of every row."""
        labels, distances = np.empty(len(X), dtype=np.int32), np.empty(len(X), dtype=self._dtype)
        with torch.no_grad():
            for rows in gen_batches(len(X), PASS):
                least, label = self.network_(self._inner(self._tensor(X[rows]))).distances.min(1)
                labels[rows], distances[rows] = label.cpu().numpy(), least.cpu().numpy()
        return labels, distances


class _Rows:
    """Rows of an array, which may lie in a file, as `fit_deep_kmeans` asks for them."""

    def __init__(self, X: Array, convert: Callable[[Array], Tensor]) -> None:
        self.X, self.convert = X, convert

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.convert(self.X[index.numpy()])
