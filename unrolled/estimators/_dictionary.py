"""`OnlineDictionary`: scikit-learn's online dictionary learning, fed batch by batch."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.decomposition import MiniBatchDictionaryLearning
from sklearn.exceptions import ConvergenceWarning

from unrolled.estimators._base import Array


class OnlineDictionary:
    """scikit-learn's MiniBatchDictionaryLearning by `partial_fit`, started at samples of the first batch.

    Its own start, the singular vectors padded with zeros, leaves zero atoms where there are more atoms than features or
    samples; and its `fit` copies the data.
    """

    def __init__(self, first: Array, num_atoms: int, alpha: float, random: np.random.RandomState) -> None:
        self.random = random
        self.learner = MiniBatchDictionaryLearning(
            num_atoms,
            alpha=alpha,
            fit_algorithm="cd",
            transform_max_iter=100,  # codes need not be exact while the dictionary is still moving
            dict_init=self._start(first, num_atoms),
            random_state=random.randint(np.iinfo(np.int32).max),
        )

    def _start(self, first: Array, num_atoms: int) -> Array:
        """Samples, the strong ones more often (the weak look like noise); noise where there are too few."""
        energy = np.square(first.astype(np.float64)).sum(1)
        candidates = np.flatnonzero(energy > 0)
        count = min(num_atoms, len(candidates))
        chosen = candidates[:0]
        if count:
            weights = energy[candidates] / energy.sum()
            chosen = candidates[self.random.choice(len(candidates), count, replace=False, p=weights)]
        atoms = np.concatenate([first[chosen], self._noise(num_atoms - count, first)])
        return _unit(atoms)

    def _noise(self, count: int, like: Array) -> Array:
        return self.random.standard_normal((count, like.shape[1])).astype(like.dtype)

    def update(self, batch: Array) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.learner.partial_fit(batch)

    def atoms(self) -> Array:
        """The atoms as rows of norm 1; one that was never used and is zero becomes noise."""
        found = self.learner.components_.copy()
        dead = ~(np.linalg.norm(found, axis=1) > 1e-6)
        found[dead] = self._noise(int(dead.sum()), found)
        return _unit(found)


def _unit(atoms: Array) -> Array:
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
