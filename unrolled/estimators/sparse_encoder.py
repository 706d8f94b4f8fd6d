"""`SparseEncoder`: sparse codes as features, by a trained network in place of a solver."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array, check_random_state, gen_batches
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from unrolled.autoencoder import Autoencoder
from unrolled.estimators._base import Array, TorchTransformer, check_parameters, relative_adam, shuffled
from unrolled.estimators._dictionary import OnlineDictionary
from unrolled.losses import DictionaryLearning, Lasso
from unrolled.solvers import lasso_objective
from unrolled.sparse import LISTA
from unrolled.training import History, fit
from unrolled.unroll import Unroll

NETWORKS = {"lista": functools.partial(LISTA, factored=True, momentum=True)}


class SparseEncoder(TorchTransformer):
    r"""$c(x) \approx \arg\min_c \tfrac12\|x - c\,D\|_2^2 + \alpha\|c\|_1$, with $D$ = `components_`, atoms as rows.

    Learns a dictionary, and a network that finds the sparse codes of samples on it in `n_iters` layers. The network is
    trained on that objective itself, without labels and without codes computed beforehand. The objective is that of
    `sklearn.decomposition.SparseCoder(transform_algorithm="lasso_cd", transform_alpha=alpha)`, with the same `alpha`;
    codes come in a small fraction of its time, near the optimum in place of at it.

    Parameters:
        n_components: number of atoms, which is the number of features that come out; by default that of `dictionary`,
            or as many as there are features in.
        alpha: weight of the l1 norm, positive, in the units of the data: the objective above is that of one sample,
            not divided by the number of samples or features. Where data are scaled by a number, scale it too.
        n_iters: number of layers.
        network: `"lista"`, which is LISTA in its factored form with momentum; or a class or function that is called as
            `network(dictionary, num_iters=n_iters, alpha=alpha)` with the dictionary as a tensor (n_features,
            n_components), atoms as *columns*, and returns an `Unroll` (or another module from samples to codes).
            For pickling it must be importable: `functools.partial(LISTA, tied=True)`, no lambda.
        dictionary: (n_components, n_features), atoms as rows, used as given, of any norm; `None` learns one by
            scikit-learn's MiniBatchDictionaryLearning.
        end_to_end: learn the dictionary together with the network, by the gradient of the objective, its atoms kept at
            norm 1; `dictionary` or MiniBatchDictionaryLearning is where it starts.
        max_iter: updates of the network, each on one batch, whatever the number of samples; 0 leaves the classical
            solver, which for `"lista"` is FISTA.
        dict_max_iter: batches from which the dictionary is learned, at least 1.
        batch_size: samples in a batch, in training and in `transform`.
        learning_rate: Adam's, relative to the size of what is learned: an update changes the entries of a matrix by
            about this share of their root mean square, and logarithms of thresholds by about this number. So it need
            not be tuned to the scale of data and dictionary. In `fit` it falls to 0 by a cosine, in `partial_fit` it
            stays.
        device: where the network is trained and run, such as `"cuda"`; `None` is the CPU.
        dtype: what the network computes in, float32 or float64; `None` is that of the X that it was fitted on. Codes
            come in the dtype of the X that goes in.
        random_state: seed or `numpy.random.RandomState`. The same int gives the same result.
        verbose: show a progress bar.

    Attributes:
        components_: (n_components, n_features), atoms as rows, of norm 1 where learned.
        network_: the trained network, a PyTorch module from (..., n_features) to (..., n_components).
        history_: `unrolled.training.History` with the loss of every update: the objective of the last layer plus the
            mean of those before.
        n_iter_: updates of the network so far.
        n_features_in_, feature_names_in_: as in every estimator of scikit-learn.

    Raises:
        ValueError, TypeError: as scikit-learn's estimators do.

    Example:
        >>> from unrolled.estimators import SparseEncoder
        >>> from sklearn.datasets import load_digits
        >>> X = load_digits().data / 16
        >>> encoder = SparseEncoder(64, alpha=0.2, n_iters=4, max_iter=20, dict_max_iter=5, random_state=0)
        >>> encoder.fit_transform(X).shape
        (1797, 64)

    Reference:
        K. Gregor and Y. LeCun, "Learning Fast Approximations of Sparse Coding", ICML 2010.
    """

    _online: OnlineDictionary | None  # while the dictionary is learned from batches
    _model: nn.Module  # what is trained: the network, or the Autoencoder around it
    _optimizer: torch.optim.Optimizer  # of partial_fit

    def __init__(
        self,
        n_components: int | None = None,
        *,
        alpha: float = 1.0,
        n_iters: int = 16,
        network: str | Callable[..., nn.Module] = "lista",
        dictionary: Any = None,
        end_to_end: bool = False,
        max_iter: int = 300,
        dict_max_iter: int = 100,
        batch_size: int = 256,
        learning_rate: float = 0.05,
        device: torch.device | str | None = None,
        dtype: Any = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.alpha = alpha
        self.n_iters = n_iters
        self.network = network
        self.dictionary = dictionary
        self.end_to_end = end_to_end
        self.max_iter = max_iter
        self.dict_max_iter = dict_max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # ---- scikit-learn's methods --------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> SparseEncoder:
        """Learn the dictionary, then train the network on it.

        Args:
            X: (n_samples, n_features). Only batches of it are converted and moved, so it may be a memory-mapped file.
            y: ignored.
        """
        self._check_parameters()
        X = self._validated(X, reset=True)
        random = self._begin(X)
        batches = shuffled(len(X), self.batch_size, random)
        if self._online is not None:
            for _ in range(self.dict_max_iter):
                self._online.update(np.asarray(X[next(batches)], dtype=self._dtype))
        self._build(random)
        if self.max_iter > 0:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, self.max_iter)
            self._train((self._tensor(X[rows]) for rows in batches), self.max_iter, schedule)
        # partial_fit starts afresh, at the full learning rate.
        self._optimizer = relative_adam(self._model, self.learning_rate)
        return self

    def partial_fit(self, X: Any, y: Any = None) -> SparseEncoder:
        """Update the dictionary and the network once by each batch of `batch_size` rows of X, in their order.

        A dictionary that was learned goes on learning; one that was given stays. `max_iter` and `dict_max_iter` have no
        say here. After the first call the network no longer starts from the dictionary but follows it: the more often
        this is called, the better.

        Args:
            X: (n_samples, n_features).
            y: ignored.
        """
        self._check_parameters()
        first = not hasattr(self, "network_")
        X = self._validated(X, reset=first)
        random = self._begin(X) if first else None
        batches = list(gen_batches(len(X), self.batch_size))
        if self._online is not None and (first or not self.end_to_end):
            for rows in batches:
                self._online.update(np.asarray(X[rows], dtype=self._dtype))
        if random is not None:
            self._build(random)
        elif self._online is not None and not self.end_to_end:
            self.components_ = self._online.atoms()
        self._train((self._tensor(X[rows]) for rows in batches), len(batches))
        return self

    def transform(self, X: Any) -> Array:
        """The codes, (n_samples, n_components), of the rows of X, computed batch by batch.

        Args:
            X: (n_samples, n_features).
        """
        X = self._fitted(X)
        return self._in_batches(self.network_, X, len(self.components_))

    def inverse_transform(self, X: Any) -> Array:
        """Samples from their codes: `X @ components_`, (n_samples, n_features).

        Args:
            X: codes, (n_samples, n_components).
        """
        check_is_fitted(self)
        X = check_array(X, dtype=[np.float64, np.float32])
        if X.shape[1] != len(self.components_):
            raise ValueError(
                "The number of components in the code is different from the number of components in the dictionary. "
                f"Expected {len(self.components_)}, got {X.shape[1]}."
            )
        return X @ self.components_.astype(X.dtype, copy=False)

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the mean objective of the samples with the codes that the network gives them: higher is better.

        Args:
            X: (n_samples, n_features).
            y: ignored.
        """
        X = self._fitted(X)

        dictionary = self._dictionary()

        def objective(y: Tensor) -> Tensor:  # (batch, 1)
            return lasso_objective(dictionary, y, self.network_(y), self.alpha)[:, None]

        return -float(self._in_batches(objective, X, 1).mean(dtype=np.float64))

    # ---- Parts of fitting --------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        integers = {"n_iters": 1, "batch_size": 1, "max_iter": 0, "dict_max_iter": 1}
        if self.n_components is not None:
            integers["n_components"] = 1
        check_parameters(self, ("alpha", "learning_rate"), integers)
        if not callable(self.network) and not (isinstance(self.network, str) and self.network in NETWORKS):
            raise ValueError(
                f"network must be {' or '.join(map(repr, NETWORKS))}, or a class or function called as "
                f"network(dictionary, num_iters=n_iters, alpha=alpha) such as unrolled.LISTA, got {self.network!r}."
            )

    def _begin(self, X: Array) -> np.random.RandomState:
        """Forget what was learned before; what everything starts from."""
        random = check_random_state(self.random_state)
        self._dtype = self._computing_dtype(X)
        self._place = self._computing_device()
        self._online = None
        if self.dictionary is None:
            count = X.shape[1] if self.n_components is None else self.n_components
            rows = np.sort(random.permutation(len(X))[: max(self.batch_size, 4 * count)])
            self._online = OnlineDictionary(np.asarray(X[rows], dtype=self._dtype), count, self.alpha, random)
        else:
            self.components_ = self._given(X)
        return random

    def _given(self, X: Array) -> Array:
        """The dictionary that was passed, checked."""
        atoms = check_array(self.dictionary, dtype=self._dtype, input_name="dictionary", copy=True)
        if atoms.shape[1] != X.shape[1]:
            raise ValueError(
                f"Dictionary and X have different numbers of features: dictionary.shape: {atoms.shape} "
                f"X.shape: {X.shape}"
            )
        if self.n_components not in (None, len(atoms)):
            raise ValueError(f"n_components is {self.n_components}, but dictionary has {len(atoms)} rows (atoms).")
        zero = np.flatnonzero(~atoms.any(1))
        if len(zero):
            raise ValueError(f"dictionary has zero rows: {zero[:5].tolist()}. Remove them: no code could use them.")
        if self.end_to_end:
            atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
        return atoms

    def _build(self, random: np.random.RandomState) -> None:
        """The untrained network on the dictionary, and what trains it."""
        if self._online is not None:
            self.components_ = self._online.atoms()
        dictionary = torch.from_numpy(self.components_.T.copy()).to(self._place)
        network = NETWORKS[self.network] if isinstance(self.network, str) else self.network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.randint(np.iinfo(np.int32).max))
            self.network_ = network(dictionary, num_iters=self.n_iters, alpha=float(self.alpha))
        self.network_.eval()
        self._model = Autoencoder(self.network_, dictionary) if self.end_to_end else self.network_
        self._optimizer = relative_adam(self._model, self.learning_rate)
        self.history_ = History()
        self.n_iter_ = 0

    def _train(self, batches: Iterable[Tensor], num_steps: int, schedule: Any = None) -> None:
        # A loss on every layer where the network has layers to look into.
        supervision = float(isinstance(self.network_, Unroll))
        loss = (
            DictionaryLearning(self.alpha, supervision=supervision)
            if self.end_to_end
            else Lasso(self._dictionary(), self.alpha, supervision=supervision)
        )
        done = fit(
            self._model,
            batches,
            loss,
            num_steps=num_steps,
            optimizer=self._optimizer,
            scheduler=schedule,
            progress=bool(self.verbose),
        )
        self.history_.loss += done.loss
        self.history_.seconds += done.seconds
        self.n_iter_ += num_steps
        if isinstance(self._model, Autoencoder):
            self.components_ = self._model.dictionary.detach().mT.cpu().numpy().copy()

    def _dictionary(self) -> Tensor:  # (n_features, n_components)
        return self._tensor(self.components_.T)
