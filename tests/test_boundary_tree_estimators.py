"""The boundary trees as scikit-learn estimators: its rules, what they find, streams, explanations, bad input."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits, make_moons
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from unrolled.estimators.boundary_tree import BoundaryTreeClassifier, BoundaryTreeRegressor


@parametrize_with_checks(
    [
        BoundaryTreeClassifier(),
        BoundaryTreeClassifier(k=2, n_trees=3, shuffle=False),
        BoundaryTreeRegressor(),
        BoundaryTreeRegressor(n_trees=3, threshold=0.1, weighted=False),
    ]
)
def test_scikit_learns_checks(estimator, check):
    """All of them, with none expected to fail."""
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    names = np.array([f"digit {c}" for c in range(10)])
    return X[:1200], names[y[:1200]], X[1200:], names[y[1200:]]


def test_a_forest_is_better_than_a_tree(digits):
    X, y, X_test, y_test = digits
    tree = BoundaryTreeClassifier(random_state=0).fit(X, y)
    forest = BoundaryTreeClassifier(n_trees=10, random_state=0).fit(X, y)
    assert tree.n_prototypes_ < len(X) / 3
    assert 0.8 < tree.score(X_test, y_test) < forest.score(X_test, y_test)
    shares = forest.predict_proba(X_test)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=0, atol=1e-12)
    # Votes tell how sure an answer is.
    right = forest.predict(X_test) == y_test
    assert shares.max(1)[right].mean() > shares.max(1)[~right].mean() + 0.1
    assert set(np.unique(tree.predict_proba(X_test))) == {0.0, 1.0}


def test_the_walk_explains_the_class(digits):
    X, y, X_test, _ = digits
    model = BoundaryTreeClassifier(n_trees=2, random_state=0).fit(X, y)
    paths = model.explain(X_test[:20])
    roots = [0, len(model.forest_.trees[0])]
    for sample, (first, second) in zip(X_test, paths):
        assert [first[0], second[0]] == roots
        for path in (first, second):
            for parent, child in itertools.pairwise(path):
                near, far = (np.linalg.norm(model.prototypes_[node] - sample) for node in (child, parent))
                assert near < far or len(path) > 2  # a full node passes on what is nearer to itself
    tree = BoundaryTreeClassifier(random_state=0).fit(X, y)
    ends = [path[-1] for (path,) in tree.explain(X_test[:20])]
    np.testing.assert_array_equal(tree.prototype_labels_[ends], tree.predict(X_test[:20]))
    visited = tree.decision_path(X_test[:20])
    assert visited.shape == (20, tree.n_prototypes_)
    for i, (path,) in enumerate(tree.explain(X_test[:20])):
        assert sorted(path) == visited[i].indices.tolist()


def test_prototypes_are_samples(digits):
    X, y, *_ = digits
    model = BoundaryTreeClassifier(n_trees=3, random_state=0).fit(X, y)
    np.testing.assert_array_equal(model.prototypes_, X[model.prototype_indices_])
    np.testing.assert_array_equal(model.prototype_labels_, y[model.prototype_indices_])


def test_a_stream_is_one_fit(digits):
    X, y, X_test, _ = digits
    whole = BoundaryTreeClassifier(n_trees=2, shuffle=False).fit(X, y)
    parts = BoundaryTreeClassifier(n_trees=2)
    for rows in np.array_split(np.arange(len(X)), 7):
        parts.partial_fit(X[rows], y[rows], classes=np.unique(y))
    np.testing.assert_array_equal(whole.prototype_indices_, parts.prototype_indices_)
    np.testing.assert_array_equal(whole.predict_proba(X_test), parts.predict_proba(X_test))
    with pytest.raises(ValueError, match="that `classes` of the first call had not"):
        parts.partial_fit(X[:1], ["letter a"])
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        BoundaryTreeClassifier().partial_fit(X, y)


def test_regression():
    random = np.random.RandomState(0)
    X = random.uniform(-3, 3, (1000, 1))
    y = np.sin(2 * X[:, 0])
    grid = np.linspace(-2.9, 2.9, 300)[:, None]
    found = {}
    for threshold in (0.02, 0.2):
        for n_trees in (1, 10):
            model = BoundaryTreeRegressor(threshold=threshold, n_trees=n_trees, random_state=0).fit(X, y)
            found[threshold, n_trees] = model
            error = np.abs(model.predict(grid) - np.sin(2 * grid[:, 0]))
            assert np.quantile(error, 0.9) < 2 * threshold
            assert np.abs(model.prototype_values_ - np.sin(2 * model.prototypes_[:, 0])).max() < 1e-12
    assert found[0.2, 1].n_prototypes_ < found[0.02, 1].n_prototypes_ < len(X) / 3
    assert found[0.02, 10].score(grid, np.sin(2 * grid[:, 0])) > 0.999
    stream = BoundaryTreeRegressor(threshold=0.02)
    for rows in np.array_split(np.arange(len(X)), 5):
        stream.partial_fit(X[rows], y[rows])
    whole = BoundaryTreeRegressor(threshold=0.02, shuffle=False).fit(X, y)
    np.testing.assert_array_equal(stream.predict(grid), whole.predict(grid))


def test_seeds_copies_and_searches(digits):
    X, y, X_test, _ = digits
    one, two, other = (BoundaryTreeClassifier(random_state=seed).fit(X, y) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.prototype_indices_, two.prototype_indices_)
    assert one.prototype_indices_.tolist() != other.prototype_indices_.tolist()
    loaded = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(loaded.predict(X_test), one.predict(X_test))
    assert clone(one).get_params() == one.get_params()
    moons, sides = make_moons(300, noise=0.1, random_state=0)
    pipeline = make_pipeline(StandardScaler(), BoundaryTreeClassifier(random_state=0))
    search = GridSearchCV(pipeline, {"boundarytreeclassifier__n_trees": [1, 9]}, cv=3).fit(moons, sides)
    assert search.best_score_ > 0.95


def test_bad_input(digits):
    X, y, *_ = digits
    for options, error, message in (
        ({"k": 1}, ValueError, "k == 1, must be >= 2"),
        ({"k": 2.0}, TypeError, "k must be an instance of int"),
        ({"n_trees": 0}, ValueError, "n_trees == 0, must be >= 1"),
    ):
        with pytest.raises(error, match=message):
            BoundaryTreeClassifier(**options).fit(X, y)
    with pytest.raises(ValueError, match="threshold == -1, must be >= 0"):
        BoundaryTreeRegressor(threshold=-1).fit(X, X[:, 0])
    with pytest.raises(ValueError, match="Unknown label type"):
        BoundaryTreeClassifier().fit(X, X[:, 5] + 0.5)
    with pytest.raises(NotFittedError):
        BoundaryTreeClassifier().explain(X)
    model = BoundaryTreeClassifier().fit(X, y)
    with pytest.raises(ValueError, match="expecting 64 features"):
        model.explain(X[:, :5])
    with pytest.raises(ValueError, match="contains NaN"):
        model.predict(np.full((1, 64), np.nan))
    # One class is no error: there is one answer.
    only = BoundaryTreeClassifier().fit(X[:50], ["a"] * 50)
    assert only.n_prototypes_ == 1 and set(only.predict(X)) == {"a"}
