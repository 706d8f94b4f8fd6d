"""`RobustPCA`: low-rank plus sparse, sample by sample, by a trained network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from unrolled.estimators._base import Array, TorchTransformer, check_parameters, relative_adam, shuffled
from unrolled.losses import SeparationObjective
from unrolled.lowrank import RPCAEncoder, fit_basis
from unrolled.solvers import separation_objective
from unrolled.training import History, fit


class RobustPCA(TorchTransformer):
    r"""$x \approx s\,C + o$ with few components $C$ = `components_` and a sparse $o$, the minimiser of
    $\tfrac12\|x - s\,C - o\|_2^2 + \tfrac{\lambda_*}{2}\|s\|_2^2 + \alpha\|o\|_1$, approximately.

    Learns components that outliers do not bend, and a network that splits each sample into a part in their span and a
    part with few nonzeros. `transform` gives the coefficients $s$, as PCA does: `n_components` features. The parts
    themselves come from `low_rank` and `sparse`. Data are not centred: a mean takes one of
    the components.

    Parameters:
        n_components: number of components, at most the smaller of the numbers of samples and features; choose few.
        alpha: weight of the l1 norm, positive, in the units of the data: entries of the sparse part below it are zero.
        ridge: $\lambda_*$, weight of the squared coefficients, positive; the components have norm 1.
        n_iters: number of layers.
        max_iter: updates of the network, each on one batch; 0 leaves the proximal gradient method.
        basis_max_iter: turns of the alternating minimisation that finds the components.
        max_samples: the components are found from at most so many samples, drawn at random, which are in memory.
        batch_size: samples in a batch, in training and in `transform`.
        learning_rate: Adam's, relative to the size of what is learned, as in `SparseEncoder`.
        device: where the network is trained and run, such as `"cuda"`; `None` is the CPU.
        dtype: what the network computes in, float32 or float64; `None` is that of the X that it was fitted on.
        random_state: seed or `numpy.random.RandomState`. The same int gives the same result.
        verbose: show a progress bar.

    Attributes:
        components_: (n_components, n_features), orthonormal rows.
        network_: the trained `unrolled.lowrank.RPCAEncoder`, from (..., n_features) to a `Decomposition`.
        history_: `unrolled.training.History` with the loss of every update.
        n_iter_: updates of the network.
        n_features_in_, feature_names_in_: as in every estimator of scikit-learn.

    Raises:
        ValueError, TypeError: as scikit-learn's estimators do.

    Example:
        >>> from unrolled.estimators import RobustPCA
        >>> import numpy as np
        >>> random = np.random.RandomState(0)
        >>> clean = random.randn(200, 1) @ random.randn(1, 20)
        >>> X = clean + 10 * (random.rand(200, 20) < 0.05)
        >>> model = RobustPCA(1, alpha=0.2, max_iter=20, random_state=0).fit(X)
        >>> model.transform(X).shape, model.sparse(X).shape
        ((200, 1), (200, 20))

    Reference:
        P. Sprechmann, A. M. Bronstein and G. Sapiro, "Learning Efficient Sparse and Low Rank Models", IEEE Transactions
        on Pattern Analysis and Machine Intelligence 37(9), 2015.
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        alpha: float = 1.0,
        ridge: float = 0.01,
        n_iters: int = 8,
        max_iter: int = 300,
        basis_max_iter: int = 50,
        max_samples: int = 2000,
        batch_size: int = 256,
        learning_rate: float = 0.05,
        device: torch.device | str | None = None,
        dtype: Any = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.alpha = alpha
        self.ridge = ridge
        self.n_iters = n_iters
        self.max_iter = max_iter
        self.basis_max_iter = basis_max_iter
        self.max_samples = max_samples
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # ---- scikit-learn's methods --------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> RobustPCA:
        """Find the components, then train the network on them.

        Args:
            X: (n_samples, n_features). Only `max_samples` of it, and batches, are converted: it may be a memory-mapped
                file.
            y: ignored.
        """
        integers = {"n_components": 1, "n_iters": 1, "batch_size": 1, "max_iter": 0, "basis_max_iter": 1}
        check_parameters(self, ("alpha", "ridge", "learning_rate"), integers | {"max_samples": 1})
        X = self._validated(X, reset=True)
        most = min(self.max_samples, *X.shape)
        if self.n_components > most:
            raise ValueError(
                f"n_components={self.n_components} must be between 1 and min(n_samples, n_features, max_samples)={most}"
            )
        random = check_random_state(self.random_state)
        self._dtype = self._computing_dtype(X)
        place = self._computing_device()
        rows = np.sort(random.permutation(len(X))[: self.max_samples])
        basis = self._basis(self._tensor(X[rows], place), random)
        self.components_ = basis.mT.cpu().numpy().copy()
        self.network_ = RPCAEncoder(basis, self.n_iters, ridge=float(self.ridge), alpha=float(self.alpha))
        self.network_.eval()
        self.history_ = History()
        self.n_iter_ = self.max_iter
        if self.max_iter > 0:
            optimizer = relative_adam(self.network_, self.learning_rate)
            self.history_ = fit(
                self.network_,
                (self._tensor(X[rows]) for rows in shuffled(len(X), self.batch_size, random)),
                SeparationObjective(basis, ridge=float(self.ridge), alpha=float(self.alpha)),
                num_steps=self.max_iter,
                optimizer=optimizer,
                scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_iter),
                progress=bool(self.verbose),
            )
        return self

    def transform(self, X: Any) -> Array:
        """The coefficients s of the low-rank part, (n_samples, n_components).

        Args:
            X: (n_samples, n_features).
        """
        X = self._fitted(X)
        return self._in_batches(lambda x: self.network_(x).code, X, len(self.components_))

    def inverse_transform(self, X: Any) -> Array:
        """Low-rank parts from their coefficients: `X @ components_`, (n_samples, n_features).

        Args:
            X: coefficients, (n_samples, n_components).
        """
        check_is_fitted(self)
        X = check_array(X, dtype=[np.float64, np.float32])
        if X.shape[1] != len(self.components_):
            raise ValueError(f"X has {X.shape[1]} coefficients, but {len(self.components_)} components were fitted.")
        return X @ self.components_.astype(X.dtype, copy=False)

    def low_rank(self, X: Any) -> Array:
        """The low-rank part of each sample as the network gives it, (n_samples, n_features).

        Close to `inverse_transform(transform(X))`: the network's last layer has a dictionary of its own.

        Args:
            X: (n_samples, n_features).
        """
        X = self._fitted(X)
        return self._in_batches(lambda x: self.network_(x).low_rank, X, X.shape[1])

    def sparse(self, X: Any) -> Array:
        """The sparse part of each sample, (n_samples, n_features), most of it exactly zero.

        Args:
            X: (n_samples, n_features).
        """
        X = self._fitted(X)
        return self._in_batches(lambda x: self.network_(x).sparse, X, X.shape[1])

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the mean objective of the samples, split as the network does: higher is better.

        Args:
            X: (n_samples, n_features).
            y: ignored.
        """
        X = self._fitted(X)
        basis = self._tensor(self.components_.T)

        def objective(x: Tensor) -> Tensor:  # (batch, 1)
            _, sparse, code = self.network_(x)
            return separation_objective(basis, x, code, sparse, ridge=self.ridge, alpha=self.alpha)[:, None]

        return -float(self._in_batches(objective, X, 1).mean(dtype=np.float64))

    # ---- Parts -------------------------------------------------------------------------------------------------------

    def _basis(self, x: Tensor, random: np.random.RandomState) -> Tensor:
        if not bool(x.any()):  # nothing to learn from: any directions are as good
            noise = random.standard_normal((x.shape[1], self.n_components)).astype(self._dtype)
            return torch.linalg.qr(torch.from_numpy(noise).to(x)).Q
        return fit_basis(
            x,
            self.n_components,
            alpha=float(self.alpha),
            ridge=float(self.ridge),
            num_iters=self.basis_max_iter,
        )
