"""The scikit-learn estimators: its own checks, the Lasso against its solvers, streams, pickles, bad input."""

import copy
import functools
import io
import pickle

import joblib
import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, SparseCoder
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from unrolled import LISTA, StepLISTA, Unroll
from unrolled.estimators import RobustPCA, SparseEncoder
from unrolled.solvers import fista, ista, separate
from unrolled.sparse.sc2net import SC2Net

ALPHA = 0.2


@parametrize_with_checks(
    [
        SparseEncoder(n_iters=3, max_iter=3, dict_max_iter=3),
        SparseEncoder(n_iters=2, max_iter=2, dict_max_iter=2, end_to_end=True, dtype="float32"),
        RobustPCA(max_iter=3, basis_max_iter=3),
    ]
)
def test_scikit_learns_checks(estimator, check):
    """All of them, with none expected to fail."""
    check(estimator)


@pytest.fixture(scope="module")
def X():
    return load_digits().data[:400] / 16


@pytest.fixture(scope="module")
def atoms(X):
    start = X[np.random.default_rng(0).choice(len(X), 80, replace=False)]
    return start / np.linalg.norm(start, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def fitted(X):
    return quick(32, max_iter=20).fit(X)


def quick(n_components=None, **options):
    options = {"alpha": ALPHA, "n_iters": 4, "max_iter": 4, "dict_max_iter": 4, "random_state": 0} | options
    return SparseEncoder(n_components, **options)


def objective(X, codes, atoms):
    return (0.5 * np.square(X - codes @ atoms).sum(1) + ALPHA * np.abs(codes).sum(1)).mean()


# ---- What it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1.0, 3.0])
def test_untrained_is_fista(X, atoms, norm):
    encoder = quick(dictionary=norm * atoms, n_iters=12, max_iter=0).fit(X)
    np.testing.assert_array_equal(encoder.components_, norm * atoms)
    expected = fista(torch.from_numpy(norm * atoms.T), torch.from_numpy(X), ALPHA, num_iters=12)
    np.testing.assert_allclose(encoder.transform(X), expected.numpy(), rtol=0, atol=1e-10)


def test_converged_is_scikit_learns_lasso(X, atoms):
    """The same alpha in the same objective: enough untrained layers end where coordinate descent does."""
    atoms = atoms[:20]  # fewer atoms than features: one minimiser, not a set of them
    network = functools.partial(LISTA, tied=True, momentum=True)
    encoder = quick(dictionary=atoms, network=network, n_iters=3000, max_iter=0).fit(X)
    coder = SparseCoder(atoms, transform_algorithm="lasso_cd", transform_alpha=ALPHA, transform_max_iter=100_000)
    np.testing.assert_allclose(encoder.transform(X[:50]), coder.fit(X).transform(X[:50]), rtol=0, atol=1e-4)


def test_training_lowers_the_objective_on_other_samples(X, atoms):
    untrained = quick(dictionary=atoms, max_iter=0).fit(X[:300])
    trained = quick(dictionary=atoms, max_iter=60).fit(X[:300])
    coder = SparseCoder(atoms, transform_algorithm="lasso_cd", transform_alpha=ALPHA).fit(X)
    best = objective(X[300:], coder.transform(X[300:]), atoms)
    before, after = -untrained.score(X[300:]), -trained.score(X[300:])
    assert best < after
    assert after - best < 0.5 * (before - best)
    assert trained.n_iter_ == len(trained.history_) == 60


def test_training_does_not_depend_on_the_unit_of_the_data(X, atoms):
    """Scaled data and alpha: the same problem, so the same codes but for their scale."""
    small = quick(dictionary=atoms, max_iter=10).fit(X)
    large = quick(dictionary=atoms, max_iter=10, alpha=255 * ALPHA).fit(255 * X)
    before = quick(dictionary=atoms, max_iter=0).fit(X).score(X)
    assert large.score(255 * X) / 255**2 == pytest.approx(small.score(X), rel=0.02)
    assert small.score(X) > 0.9 * before


def test_score_is_the_mean_objective(X, fitted):
    assert fitted.score(X) == pytest.approx(-objective(X, fitted.transform(X), fitted.components_), rel=1e-10)


def test_the_dictionary_learns(X):
    """More batches of dictionary learning: a lower optimum. Learned atoms have norm 1."""
    scores = []
    for count in (1, 20):
        encoder = quick(64, n_iters=50, max_iter=0, dict_max_iter=count, batch_size=100).fit(X)
        np.testing.assert_allclose(np.linalg.norm(encoder.components_, axis=1), 1, rtol=0, atol=1e-12)
        scores.append(encoder.score(X))
    assert scores[0] < scores[1]


@pytest.mark.parametrize("given", [True, False])
def test_end_to_end_learns_the_dictionary(X, atoms, given):
    options = {"dictionary": 2 * atoms[:30]} if given else {"n_components": 30}
    fixed = quick(**options, max_iter=20).fit(X)
    joint = quick(**options, max_iter=20, end_to_end=True).fit(X)
    np.testing.assert_allclose(np.linalg.norm(joint.components_, axis=1), 1, rtol=0, atol=1e-12)
    start = atoms[:30] if given else fixed.components_
    assert 0.01 < np.abs(joint.components_ - start).max() < 0.5
    unit = quick(dictionary=start, max_iter=20).fit(X)
    assert joint.score(X) > unit.score(X)


def test_inverse_transform(X, fitted):
    codes = fitted.transform(X)
    np.testing.assert_allclose(fitted.inverse_transform(codes), codes @ fitted.components_, rtol=1e-12)
    assert fitted.inverse_transform(codes.astype(np.float32)).dtype == np.float32
    error = np.square(fitted.inverse_transform(codes) - X).sum() / np.square(X).sum()
    assert error < 0.3
    with pytest.raises(ValueError, match="Expected 32, got 64"):
        fitted.inverse_transform(X)


# ---- Networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [LISTA, SC2Net, StepLISTA, functools.partial(LISTA, tied=True)])
def test_other_networks(X, network):
    encoder = quick(32, network=network, max_iter=15).fit(X)
    untrained = quick(32, network=network, max_iter=0).fit(X)
    assert isinstance(encoder.network_, Unroll) and len(encoder.network_) == 4
    codes = encoder.transform(X)
    assert 0 < np.count_nonzero(codes) < codes.size
    assert encoder.score(X) > untrained.score(X)
    clone(encoder)
    pickle.loads(pickle.dumps(encoder))


def test_a_factory_gets_the_dictionary_with_atoms_as_columns(X, atoms):
    calls = []

    def factory(dictionary, num_iters, alpha):
        calls.append((dictionary, num_iters, alpha))
        return torch.nn.Linear(64, 80, dtype=dictionary.dtype)  # no Unroll: trained on its output alone

    encoder = quick(dictionary=atoms, network=factory, max_iter=1).fit(X)
    (dictionary, num_iters, alpha), *others = calls
    assert not others and (num_iters, alpha) == (4, ALPHA)
    np.testing.assert_array_equal(dictionary.numpy(), atoms.T)
    again = quick(dictionary=atoms, network=factory, max_iter=1).fit(X)
    np.testing.assert_array_equal(encoder.transform(X), again.transform(X))  # its random numbers are seeded, too
    with torch.no_grad():
        expected = encoder.network_(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(encoder.transform(X), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", ["sc2net", "", None, 3, ["lista"]])
def test_unknown_networks(X, network):
    with pytest.raises(ValueError, match=r"network must be 'lista', or a class or function"):
        quick(network=network).fit(X)


# ---- scikit-learn ----------------------------------------------------------------------------------------------------


def test_pipeline_and_grid_search(X):
    y = load_digits().target[: len(X)]
    pipeline = make_pipeline(quick(24), LogisticRegression())
    search = GridSearchCV(pipeline, {"sparseencoder__alpha": [0.1, 100.0]}, cv=2).fit(X, y)
    assert search.best_params_ == {"sparseencoder__alpha": 0.1}  # 100 makes every code zero
    assert search.best_score_ > 0.5
    alone = GridSearchCV(quick(24), {"n_iters": [1, 4]}, cv=2).fit(X)  # by `score`
    assert alone.best_params_ == {"n_iters": 4}


def test_names(X, fitted):
    assert list(fitted.get_feature_names_out()[:2]) == ["sparseencoder0", "sparseencoder1"]
    assert len(fitted.get_feature_names_out()) == 32
    assert (fitted.n_features_in_, quick().fit(X[:, :9]).components_.shape) == (64, (9, 9))


def test_the_same_seed_gives_the_same_bits_and_global_state_is_left_alone(X):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (quick(16, random_state=seed, batch_size=50).fit(X) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(one.transform(X), two.transform(X))
    assert one.history_ == two.history_
    assert not np.array_equal(one.transform(X), other.transform(X))
    random = np.random.RandomState(3)
    np.testing.assert_array_equal(quick(16, random_state=random, batch_size=50).fit(X).transform(X), one.transform(X))


@pytest.mark.parametrize("save", ["pickle", "joblib", "deepcopy"])
def test_saved_and_loaded(X, save, fitted):
    if save == "deepcopy":
        loaded = copy.deepcopy(fitted)
    elif save == "pickle":
        loaded = pickle.loads(pickle.dumps(fitted))
    else:
        buffer = io.BytesIO()
        joblib.dump(fitted, buffer)
        buffer.seek(0)
        loaded = joblib.load(buffer)
    np.testing.assert_array_equal(loaded.transform(X), fitted.transform(X))
    original = copy.deepcopy(fitted)
    np.testing.assert_array_equal(loaded.partial_fit(X).transform(X), original.partial_fit(X).transform(X))


def test_fitted_on_a_device_that_is_not_here(X, fitted, monkeypatch):
    """torch.load refuses storages of a device that is not there: then everything is loaded to the CPU."""
    saved = pickle.dumps(fitted)
    load = torch.load

    def absent(file, map_location=None, **options):
        if map_location is None:
            raise RuntimeError("Attempting to deserialize object on a CUDA device")
        return load(file, map_location=map_location, **options)

    monkeypatch.setattr(torch, "load", absent)
    np.testing.assert_array_equal(pickle.loads(saved).transform(X), fitted.transform(X))


# ---- Streams and dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("computing", "inside"),
    [(None, None), ("float32", torch.float32), (np.float64, torch.float64), (torch.float32, torch.float32)],
)
def test_dtypes(X, dtype, computing, inside):
    encoder = quick(16, dtype=computing).fit(X.astype(dtype))
    same = torch.from_numpy(np.zeros(1, dtype)).dtype
    assert next(encoder.network_.parameters()).dtype == (inside or same)
    for given in (np.float32, np.float64):
        assert encoder.transform(X.astype(given)).dtype == given
    assert encoder.transform((16 * X).astype(np.uint8)).dtype == np.float64


def test_batches_do_not_matter(X, fitted):
    smaller = copy.deepcopy(fitted).set_params(batch_size=7)
    np.testing.assert_allclose(smaller.transform(X), fitted.transform(X), rtol=0, atol=1e-12)
    assert smaller.score(X) == pytest.approx(fitted.score(X), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_memory_mapped_file_is_read_by_batches(X, tmp_path, dtype, monkeypatch):
    """No more than a batch is ever converted at once, in fit and transform alike."""
    data = (255 * X).astype(dtype)
    data.tofile(tmp_path / "X")
    mapped = np.memmap(tmp_path / "X", dtype=dtype, mode="r", shape=X.shape)
    seen = []
    convert = SparseEncoder._tensor

    def watched(self, rows, device=None):
        seen.append(len(rows))
        return convert(self, rows, device)

    encoder = quick(16, alpha=255 * ALPHA, batch_size=32)
    expected = clone(encoder).fit(data).transform(data)
    monkeypatch.setattr(SparseEncoder, "_tensor", watched)
    np.testing.assert_array_equal(encoder.fit(mapped).transform(mapped), expected)
    seen.remove(64)  # the dictionary, for the loss
    assert max(seen) <= 32 and sum(seen) >= len(X)
    assert expected.dtype == (np.float32 if dtype == np.float32 else np.float64)


# ---- partial_fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end_to_end", [False, True])
def test_partial_fit_learns_from_a_stream(X, end_to_end):
    encoder = quick(32, end_to_end=end_to_end, learning_rate=0.02)
    scores = []
    for _ in range(8):
        for rows in np.split(X[:320], 5):
            encoder.partial_fit(rows)
        scores.append(encoder.score(X[320:]))
    assert scores[-1] > scores[0]
    assert encoder.n_iter_ == len(encoder.history_) == 40
    with pytest.raises(ValueError, match="X has 63 features, but SparseEncoder is expecting 64"):
        encoder.partial_fit(X[:, 1:])


def test_partial_fit_keeps_a_given_dictionary(X, atoms):
    encoder = quick(dictionary=atoms)
    for _ in range(15):
        encoder.partial_fit(X)
    np.testing.assert_array_equal(encoder.components_, atoms)
    assert encoder.score(X) > quick(dictionary=atoms, max_iter=0).fit(X).score(X)


def test_partial_fit_goes_on_after_fit(X, fitted):
    encoder = copy.deepcopy(fitted).partial_fit(X)
    assert encoder.n_iter_ == 20 + 2  # 400 samples are two batches
    assert not np.array_equal(encoder.components_, fitted.components_)
    np.testing.assert_allclose(np.linalg.norm(encoder.components_, axis=1), 1, rtol=0, atol=1e-12)
    assert quick(16).partial_fit(X).fit(X).n_iter_ == 4  # fit forgets


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_before_fit(X):
    for method in ("transform", "inverse_transform", "score", "get_feature_names_out"):
        with pytest.raises(NotFittedError, match="This SparseEncoder instance is not fitted yet"):
            getattr(quick(), method)(*([X] if method != "get_feature_names_out" else []))


def test_bad_data(X, fitted):
    holes = X.copy()
    holes[3, 4] = np.nan
    for call in (quick().fit, quick().partial_fit, fitted.transform, fitted.score):
        with pytest.raises(ValueError, match="Input X contains NaN"):
            call(holes)
        with pytest.raises(TypeError, match="Sparse data was passed"):
            call(scipy.sparse.csr_matrix(X))
        with pytest.raises(ValueError, match="Complex data not supported"):
            call(X + 1j)
        with pytest.raises(ValueError, match="Expected 2D array, got 1D array instead"):
            call(X[0])
    with pytest.raises(ValueError, match="X has 63 features, but SparseEncoder is expecting 64 features as input"):
        fitted.transform(X[:, 1:])


@pytest.mark.parametrize(
    "data",
    [np.zeros((10, 5)), np.ones((10, 5)), np.eye(3, 5), np.tile(np.arange(5.0), (10, 1)), 1e-9 * np.eye(9, 5)],
    ids=["zeros", "ones", "fewer samples than atoms", "one sample again and again", "tiny"],
)
def test_odd_data_gives_usable_atoms(data):
    encoder = quick(8).fit(data)
    np.testing.assert_allclose(np.linalg.norm(encoder.components_, axis=1), 1, rtol=0, atol=1e-12)
    assert np.isfinite(encoder.transform(data)).all()


def test_bad_dictionaries(X, atoms):
    zero = atoms.copy()
    zero[[3, 7]] = 0
    holes = np.where(atoms > 0.2, np.nan, atoms)
    for dictionary, message in (
        (zero, r"dictionary has zero rows: \[3, 7\]"),
        (atoms[:, 1:], "Dictionary and X have different numbers of features"),
        (atoms[0], "Expected 2D array, got 1D array instead"),
        (holes, "Input dictionary contains NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            quick(dictionary=dictionary).fit(X)
    with pytest.raises(ValueError, match="n_components is 5, but dictionary has 80 rows"):
        quick(5, dictionary=atoms).fit(X)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0}, ValueError, "alpha == 0, must be > 0"),
        ({"alpha": "1"}, TypeError, "alpha must be an instance of float"),
        ({"n_components": 0}, ValueError, "n_components == 0, must be >= 1"),
        ({"n_iters": 2.5}, TypeError, "n_iters must be an instance of int"),
        ({"max_iter": -1}, ValueError, "max_iter == -1, must be >= 0"),
        ({"dict_max_iter": 0}, ValueError, "dict_max_iter == 0, must be >= 1"),
        ({"batch_size": 0}, ValueError, "batch_size == 0, must be >= 1"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate == -0.1, must be > 0"),
        ({"dtype": "int8"}, ValueError, "dtype must be None, float32 or float64"),
        ({"dtype": "decimal"}, ValueError, "dtype must be None, float32 or float64"),
        ({"device": "cuda:99"}, ValueError, "device='cuda:99' is not available here"),
        ({"device": "gpu"}, ValueError, "device='gpu' is not available here"),
        ({"random_state": "x"}, ValueError, "'x' cannot be used to seed"),
    ],
)
def test_bad_parameters(X, options, error, message):
    with pytest.raises(error, match=message):
        quick(**options).fit(X)
    with pytest.raises(error, match=message):
        quick(**options).partial_fit(X)


def test_ista_is_what_published_lista_starts_from(X, atoms):
    """The class itself as a factory, where no momentum is asked for."""
    codes = quick(dictionary=atoms, network=LISTA, max_iter=0).fit(X).transform(X)
    D, y = torch.from_numpy(atoms.T), torch.from_numpy(X)
    np.testing.assert_allclose(codes, ista(D, y, ALPHA, num_iters=4).numpy(), rtol=0, atol=1e-10)


# ---- RobustPCA -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dirty():
    """(samples of rank 2 with gross errors in a twentieth of the entries, the rank-2 part, the two directions)."""
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.standard_normal((40, 2)))[0].T
    clean = 5 * random.standard_normal((300, 2)) @ directions
    return clean + 8 * (random.random((300, 40)) < 0.05), clean, directions


def angle(components, directions):
    """Sine of the largest angle between two spans of orthonormal rows."""
    return np.linalg.norm(directions - directions @ components.T @ components, 2)


def robust(**options):
    return RobustPCA(2, **{"alpha": 0.3, "max_iter": 30, "random_state": 0} | options)


def test_outliers_do_not_bend_the_components(dirty):
    X, _, directions = dirty
    model = robust(max_iter=0).fit(X)
    np.testing.assert_allclose(model.components_ @ model.components_.T, np.eye(2), rtol=0, atol=1e-12)
    assert angle(model.components_, directions) < 0.3 * angle(PCA(2).fit(X).components_, directions)


def test_untrained_is_the_proximal_solver(dirty):
    X, *_ = dirty
    model = robust(max_iter=0, n_iters=12).fit(X)
    D, x = torch.from_numpy(model.components_.T.copy()), torch.from_numpy(X)
    low_rank, sparse, code = separate(D, x, ridge=0.01, alpha=0.3, num_iters=12)
    np.testing.assert_allclose(model.transform(X), code, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.sparse(X), sparse, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.low_rank(X), low_rank, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.inverse_transform(model.transform(X)), low_rank, rtol=0, atol=1e-10)


def test_training_separates_better(dirty):
    X, clean, _ = dirty
    before, after = robust(max_iter=0).fit(X[:200]), robust(max_iter=100).fit(X[:200])
    assert after.score(X[200:]) > before.score(X[200:])
    error = [np.square(model.low_rank(X[200:]) - clean[200:]).mean() for model in (before, after)]
    assert error[1] < 0.5 * error[0]
    assert (after.sparse(X[200:]) == 0).mean() > 0.3
    assert after.n_iter_ == len(after.history_) == 100


def test_robust_pca_in_scikit_learn(dirty, tmp_path):
    X, *_ = dirty
    model = robust(max_iter=5).fit(X)
    assert list(model.get_feature_names_out()) == ["robustpca0", "robustpca1"]
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(loaded.transform(X), model.transform(X))
    np.testing.assert_array_equal(clone(model).fit(X).transform(X), model.transform(X))
    np.save(tmp_path / "X.npy", X.astype(np.float32))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    parts = robust(max_iter=5, max_samples=50, batch_size=32).fit(mapped).sparse(mapped)
    assert parts.shape == X.shape and parts.dtype == np.float32


def test_bad_input_of_robust_pca(dirty):
    X, *_ = dirty
    for options, error, message in (
        ({"n_components": 41}, ValueError, r"n_components=41 must be between 1 and min\(.*\)=40"),
        ({"n_components": 5, "max_samples": 3}, ValueError, "n_components=5 must be between 1 and .*=3"),
        ({"ridge": 0.0}, ValueError, "ridge == 0.0, must be > 0"),
        ({"basis_max_iter": 0}, ValueError, "basis_max_iter == 0, must be >= 1"),
        ({"device": "gpu"}, ValueError, "device='gpu' is not available here"),
    ):
        with pytest.raises(error, match=message):
            robust().set_params(**options).fit(X)
    for method in ("transform", "low_rank", "sparse", "score", "inverse_transform"):
        with pytest.raises(NotFittedError, match="This RobustPCA instance is not fitted yet"):
            getattr(robust(), method)(X)
    with pytest.raises(ValueError, match="X has 40 coefficients, but 2 components were fitted"):
        robust(max_iter=0).fit(X).inverse_transform(X)
    assert np.isfinite(robust(max_iter=2).fit(np.zeros((9, 4))).transform(np.zeros((9, 4)))).all()
