"""`KMeansNet`: k-means by a one-layer network, on batches of rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sklearn.base import ClusterMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state, gen_batches
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor

from unrolled.cluster import DataPoints, KMeansHead, KMeansPlusPlus
from unrolled.cluster._geometry import euclidean_move, spherical_move, unit
from unrolled.cluster.kmeans import revived
from unrolled.cluster.restarts import Batch, best_of_restarts, default_annealing, least_share, starts, totals, window
from unrolled.cluster.starts import Start
from unrolled.estimators._base import Array, TorchTransformer, check_parameters, shuffled

INITS: dict[str, Start] = {"k-means++": KMeansPlusPlus(), "random": DataPoints()}
PASS = 4096  # rows at a time where all are looked at: more is not faster, less is slower


class KMeansNet(ClusterMixin, TorchTransformer):
    r"""$\min_C \sum_i w_i \min_j \|x_i - c_j\|^2$, with $x_i$ and $c_j$ on the unit sphere: spherical k-means.

    Clusters by a network of one layer whose weights are the centres, `unrolled.cluster.KMeansHead`. It is trained on
    batches, all restarts at a time, with soft assignments that become hard; the restart with the least loss over all
    samples is refined by Lloyd's algorithm. So the work hardly grows with the number of samples, and the data need not
    fit into memory.

    By default samples are divided by their norms, which suits images, spectra, counts and embeddings: what is compared
    is their direction. Where the length or the place of zero matters not at all or in another way, as for coordinates
    in the plane, take `spherical=False`.

    Parameters:
        n_clusters: k, from 1 to the number of samples.
        spherical: whether samples and centres are divided by their norms.
        n_init: restarts, of which the one with the least inertia is kept.
        init: `"k-means++"`, `"random"` for samples drawn at random, an array of centres (n_clusters, n_features), or an
            object such as `unrolled.cluster.KMeansPlusPlus(num_candidates=1)`. With an array there is one run.
        max_iter: updates of the centres, each on one batch, whatever the number of samples.
        batch_size: samples in a batch.
        step_size: of the first update; in `fit` it falls linearly to 0, in `partial_fit` it stays. On the sphere it is
            the length of the step towards the mean direction of a centre's samples, off the sphere its share of the way
            to their mean (no more than all of it).
        temperature: $\tau$ of the first update's soft assignments, at least 0, in the units of squared distances on the
            sphere (at most 4); off the sphere it is multiplied by the mean squared distance of the samples to their
            mean. 0 makes all assignments hard.
        final_temperature: $\tau$ of the last fifth of the updates, positive.
        tol: the refinement ends when an iteration lowers the inertia by less than this share of it; 0 goes on to the
            end.
        device: where it computes, such as `"cuda"`; `None` is the CPU.
        dtype: what it computes in, float32 or float64; `None` is that of the X that it was fitted on.
        random_state: seed or `numpy.random.RandomState`. The same int gives the same result.
        verbose: show a progress bar.

    Attributes:
        cluster_centers_: (n_clusters, n_features), of norm 1 where spherical.
        labels_: (n_samples,), the cluster of each sample of `fit`, or of the last `partial_fit`.
        inertia_: sum of the squared distances of these samples to their centres, times their weights; on the sphere a
            squared distance is $2 - 2\cos$.
        losses_: (n_init,), the mean squared distances of the restarts, before the best was refined.
        n_iter_: updates and iterations of the run that was kept.
        network_: the `KMeansHead`, a PyTorch module that gives assignments and squared distances.
        n_features_in_, feature_names_in_: as in every estimator of scikit-learn.

    Raises:
        ValueError, TypeError: as scikit-learn's estimators do; ValueError for more clusters than samples, and where
            spherical for a sample of zeros.

    Warns:
        ConvergenceWarning: fewer distinct samples than clusters. Each distinct sample then has a centre, and the
            surplus centres are copies to which no sample is assigned.

    Example:
        >>> from unrolled.estimators import KMeansNet
        >>> from sklearn.datasets import load_digits
        >>> X = load_digits().data
        >>> model = KMeansNet(10, max_iter=100, random_state=0).fit(X)
        >>> model.predict(X[:3]).shape, model.transform(X[:3]).shape
        ((3,), (3, 10))

    Reference:
        X. Peng, Y. Li, I. W. Tsang, H. Zhu, J. Lv and J. T. Zhou, "XAI Beyond Classification: Interpretable Neural
        Clustering", Journal of Machine Learning Research 23, 2022.
    """

    network_: KMeansHead

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        spherical: bool = True,
        n_init: int = 5,
        init: Any = "k-means++",
        max_iter: int = 800,
        batch_size: int = 256,
        step_size: float = 0.1,
        temperature: float = 0.1,
        final_temperature: float = 0.005,
        tol: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: Any = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.spherical = spherical
        self.n_init = n_init
        self.init = init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.step_size = step_size
        self.temperature = temperature
        self.final_temperature = final_temperature
        self.tol = tol
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # ---- scikit-learn's methods --------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeansNet:
        """Find the centres.

        Args:
            X: (n_samples, n_features). Only batches of it are converted and moved, so it may be a memory-mapped file.
            y: ignored.
            sample_weight: (n_samples,), at least 0; 1 where not given.
        """
        X, weights, random = self._begin(X, sample_weight)
        generator = _generator(random)
        order = random.permutation(len(X))
        order = order[np.argsort(weights[order] == 0, kind="stable")]  # what counts comes first
        rows = np.sort(order[: max(3 * self.batch_size, 3 * self.n_clusters)])
        sample, sample_weights = self._batch(X, weights, rows)
        centres = self._starts(sample, sample_weights, generator)
        found = best_of_restarts(
            centres,
            (self._batch(X, weights, rows) for rows in shuffled(len(X), self.batch_size, random)),
            lambda: (self._batch(X, weights, rows) for rows in gen_batches(len(X), PASS)),
            spherical=bool(self.spherical),
            num_steps=self.max_iter,
            step_size=float(self.step_size),
            anneal=default_annealing(
                self.max_iter,
                sample,
                sample_weights,
                bool(self.spherical),
                float(self.temperature),
                float(self.final_temperature),
            ),
            tol=float(self.tol),
            generator=generator,
            progress=_progress if self.verbose else iter,
        )
        self._head(found.centres, random)
        self.losses_ = found.losses.numpy()
        self.n_iter_ = found.num_iters
        self._label(X, weights)
        alive = len(np.unique(self.labels_))
        if alive < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({alive}) found smaller than n_clusters ({self.n_clusters}). Possibly "
                "due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeansNet:
        """Move the centres once by each batch of `batch_size` rows of X, in their order.

        The first call starts them, at the best of `n_init` starts; a `fit` before does it better. Every update has the
        size `step_size`, so that the centres follow data that change. A centre that had hardly any of the last ten
        thousand samples starts again at one that is far from the others. `labels_` and `inertia_` are those of X after
        the updates.

        Args:
            X: (n_samples, n_features); in the first call at least `n_clusters` samples.
            y: ignored.
            sample_weight: (n_samples,), at least 0; 1 where not given.
        """
        if not hasattr(self, "network_"):
            X, weights, random = self._begin(X, sample_weight)
            sample = self._batch(X, weights, slice(None, max(3 * self.batch_size, 3 * self.n_clusters)))
            self._head(self._best_start(*sample, _generator(random)), random)
            self.n_iter_ = 0
        else:
            self._check_parameters()
            X = self._validated(X, reset=False)
            weights = self._weights(sample_weight, X)
            self._check_rows(X)
        for rows in gen_batches(len(X), self.batch_size):
            self._update(*self._batch(X, weights, rows))
            self.n_iter_ += 1
        self.cluster_centers_ = self.network_.positions.detach().cpu().numpy().copy()
        self._label(X, weights)
        return self

    def predict(self, X: Any) -> Array:
        """The nearest centre of each sample, (n_samples,).

        Args:
            X: (n_samples, n_features).
        """
        X = self._fitted(X)
        self._check_rows(X)
        return self._nearest(X)[0]

    def transform(self, X: Any) -> Array:
        """The distances, not squared, of the samples to the centres, (n_samples, n_clusters).

        Args:
            X: (n_samples, n_features).
        """
        X = self._fitted(X)
        self._check_rows(X)
        return self._in_batches(lambda x: self.network_(x).distances.sqrt(), X, len(self.cluster_centers_))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of the samples, their sum of squared distances to the nearest centres: higher is better.

        Args:
            X: (n_samples, n_features).
            y: ignored.
            sample_weight: (n_samples,), at least 0; 1 where not given.
        """
        X = self._fitted(X)
        self._check_rows(X)
        return -float(self._weights(sample_weight, X) @ self._nearest(X)[1])

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    # ---- Parts -------------------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        integers = {"n_clusters": 1, "n_init": 1, "max_iter": 1, "batch_size": 1}
        check_parameters(self, ("step_size", "final_temperature"), integers)
        for name in ("temperature", "tol"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}.")
        known = self.init in INITS if isinstance(self.init, str) else not isinstance(self.init, type)
        if not known:
            raise ValueError(
                f"init must be {' or '.join(map(repr, INITS))}, an array of centres, or an object such as "
                f"KMeansPlusPlus(), got {self.init!r}."
            )

    def _begin(self, X: Any, sample_weight: Any) -> tuple[Array, Array, np.random.RandomState]:
        """What every fit from scratch begins with: data and weights checked, dtype, device, random numbers."""
        self._check_parameters()
        X = self._validated(X, reset=True)
        if self.n_clusters > len(X):
            raise ValueError(f"n_samples={len(X)} should be >= n_clusters={self.n_clusters}.")
        self._dtype = self._computing_dtype(X)
        self._place = self._computing_device()
        self._check_rows(X)
        return X, self._weights(sample_weight, X), check_random_state(self.random_state)

    def _check_rows(self, X: Array) -> None:
        """No zero rows where only directions count."""
        if not self.spherical:
            return
        for rows in gen_batches(len(X), PASS):
            zero = np.flatnonzero(~X[rows].any(axis=1))
            if len(zero):
                raise ValueError(
                    f"X has a row of zeros (row {rows.start + zero[0]}), which has no direction: remove such rows, or "
                    "use spherical=False."
                )

    def _weights(self, sample_weight: Any, X: Array) -> Array:
        weights = _check_sample_weight(sample_weight, X, dtype=self._dtype)
        if np.any(weights < 0):
            raise ValueError("Negative values in data passed to `sample_weight`.")
        if not np.any(weights):
            raise ValueError("sample_weight is zero everywhere: at least one sample must count.")
        return weights

    def _batch(self, X: Array, weights: Array, rows: Any) -> Batch:
        """Rows of X in the network's dtype and on its device, where spherical of norm 1, with their weights."""
        x = torch.from_numpy(np.array(X[rows], dtype=self._dtype, order="C")).to(self._place)
        if self.spherical:
            x = unit(x)
        return x, torch.from_numpy(weights[rows]).to(self._place)

    def _starts(self, x: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:  # (r, k, d)
        """The centres that each run starts from."""
        if isinstance(self.init, str) or callable(self.init):
            init = INITS[self.init] if isinstance(self.init, str) else self.init
            return starts(init, x, weights, self.n_clusters, self.n_init, generator)
        given = check_array(self.init, dtype=self._dtype, input_name="init", copy=True)
        if given.shape != (self.n_clusters, x.shape[1]):
            raise ValueError(
                f"init must have shape (n_clusters, n_features) = {(self.n_clusters, x.shape[1])}, got {given.shape}."
            )
        if self.spherical and not given.any(axis=1).all():
            raise ValueError("init has a row of zeros, which has no direction: replace it, or use spherical=False.")
        centres = torch.from_numpy(given).to(self._place)
        if self.spherical:
            centres = unit(centres)
        return centres.unsqueeze(0)

    def _best_start(self, x: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Of the starts for `partial_fit`, the one with the least loss on the first samples."""
        centres = self._starts(x, weights, generator)
        distances = torch.stack([torch.cdist(x, start).amin(1).square() for start in centres])
        return centres[int((distances @ weights).argmin())]

    def _head(self, centres: Tensor, random: np.random.RandomState) -> None:
        """The network at these centres."""
        k, d = centres.shape
        with torch.random.fork_rng(devices=[]):  # its own start is not used
            head = KMeansHead(d, k, spherical=bool(self.spherical), device=centres.device, dtype=centres.dtype)
        with torch.no_grad():
            head.centres.copy_(centres)
        self.network_ = head.eval()
        self.cluster_centers_ = centres.cpu().numpy().copy()
        self._random = random
        # The samples of each centre since partial_fit last looked for dead ones, by weight, and their number.
        self._window, self._seen = np.zeros(k), 0

    @torch.no_grad()
    def _update(self, x: Tensor, weights: Tensor) -> None:
        """One step of the centres, and now and then a look for dead ones."""
        centres, head = self.network_.positions, self.network_
        sums, sizes, _ = totals(centres.unsqueeze(0), x, weights, 0.0)
        rate = float(self.step_size)
        head.centres.copy_(
            spherical_move(centres, sums[0], rate)
            if head.spherical
            else euclidean_move(centres, sums[0], sizes[0], min(rate, 1.0))
        )
        self._window = self._window + sizes[0].cpu().numpy()
        self._seen += len(x)
        share = least_share(head.num_clusters)
        if self._seen >= window(share):
            dead = torch.from_numpy(self._window < share * self._window.sum()).to(x.device)
            places, _ = revived(head.positions, dead, x, weights, _generator(self._random))
            head.centres.copy_(places)
            self._window, self._seen = np.zeros(head.num_clusters), 0

    def _nearest(self, X: Array) -> tuple[Array, Array]:
        """Label and squared distance to the nearest centre of every row."""
        labels, distances = np.empty(len(X), dtype=np.int32), np.empty(len(X), dtype=self._dtype)
        with torch.no_grad():
            for rows in gen_batches(len(X), PASS):
                least, label = self.network_(self._tensor(X[rows])).distances.min(1)
                labels[rows], distances[rows] = label.cpu().numpy(), least.cpu().numpy()
        return labels, distances

    def _label(self, X: Array, weights: Array) -> None:
        self.labels_, distances = self._nearest(X)
        self.inertia_ = float(weights.astype(np.float64) @ distances)


def _generator(random: np.random.RandomState) -> torch.Generator:
    """On the CPU, so that the draws are the same on every device."""
    return torch.Generator().manual_seed(random.randint(np.iinfo(np.int32).max))


def _progress(updates: Iterable[int]) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(updates, desc="k-means", unit="update")
