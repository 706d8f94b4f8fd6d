"""The solvers for low-rank plus sparse models: optimality conditions, exact recovery, other libraries."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrolled.solvers import (
    Decomposition,
    nonnegative_ista,
    robust_pca,
    separate,
    separation_objective,
    singular_value_threshold,
)

F64 = torch.float64
quick = settings(max_examples=8, deadline=None)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def objective(D, x, parts, **weights):
    return separation_objective(D, x, parts.code, parts.sparse, **weights)


# ---- Separation for a given dictionary -------------------------------------------------------------------------------


def test_the_objective_is_its_formula():
    D, x, s, o = randn(6, 3), randn(4, 6, seed=1), randn(4, 3, seed=2), randn(4, 6, seed=3)
    for i, value in enumerate(separation_objective(D, x, s, o, ridge=0.3, alpha=0.7)):
        misfit = x[i] - D @ s[i] - o[i]
        expected = 0.5 * misfit @ misfit + 0.15 * s[i] @ s[i] + 0.7 * o[i].abs().sum()
        torch.testing.assert_close(value, expected)


@quick
@given(power=st.floats(-0.7, 0.0), ridge=st.floats(0.1, 2.0), alpha=st.floats(0.2, 1.0), seed=st.integers(0, 99))
def test_separate_meets_the_optimality_conditions(power, ridge, alpha, seed):
    D, x = 10**power * randn(8, 2, seed=seed), 2 * randn(3, 8, seed=seed + 1)
    parts = separate(D, x, ridge=ridge, alpha=alpha, num_iters=20_000, tol=1e-10)
    residual = x - parts.low_rank - parts.sparse
    torch.testing.assert_close(parts.low_rank, parts.code @ D.T)
    # The derivative by s is 0; that by o is alpha sign(o) on the support and at most alpha elsewhere.
    torch.testing.assert_close(residual @ D, ridge * parts.code, rtol=0, atol=1e-6)
    on = parts.sparse != 0
    torch.testing.assert_close(residual[on], alpha * parts.sparse[on].sign(), rtol=0, atol=1e-6)
    assert bool((residual.abs() <= alpha + 1e-6).all())


@quick
@given(ridge=st.floats(0.0, 2.0), alpha=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_nonnegative_separation_meets_the_optimality_conditions(ridge, alpha, seed):
    D, x = randn(8, 2, seed=seed).abs(), 2 * randn(3, 8, seed=seed + 1)
    parts = separate(D, x, ridge=ridge, alpha=alpha, nonnegative=True, num_iters=4000, tol=1e-12)
    residual = x - parts.low_rank - parts.sparse
    for value, slope in ((parts.code, residual @ D - ridge * parts.code), (parts.sparse, residual - alpha)):
        assert bool((value >= 0).all())
        torch.testing.assert_close(slope[value > 0], torch.zeros_like(slope[value > 0]), rtol=0, atol=1e-6)
        assert bool((slope <= 1e-6).all())


@pytest.mark.parametrize("nonnegative", [False, True])
def test_the_objective_never_increases(nonnegative):
    D, x = 2 * randn(8, 3).abs(), randn(5, 8, seed=1)
    weights = {"ridge": 0.2, "alpha": 0.3}
    values = [
        objective(D, x, separate(D, x, nonnegative=nonnegative, num_iters=k, **weights), **weights)
        for k in range(1, 40)
    ]
    assert all(bool((after <= before + 1e-12).all()) for before, after in itertools.pairwise(values))
    assert bool((values[-1] < values[0]).all())


def test_without_a_sparse_part_it_is_ridge_regression():
    D, x = randn(8, 3), randn(5, 8, seed=1)
    parts = separate(D, x, ridge=0.5, alpha=1e3, num_iters=4000, tol=1e-13)
    expected = torch.linalg.solve(D.T @ D + 0.5 * torch.eye(3, dtype=F64), D.T @ x.T).T
    assert not bool(parts.sparse.any())
    torch.testing.assert_close(parts.code, expected, rtol=0, atol=1e-9)


def test_a_factor_of_the_dictionary_goes_into_the_ridge():
    D, x = 0.3 * randn(8, 3), randn(5, 8, seed=1)
    one = separate(D, x, ridge=0.5, alpha=0.3, num_iters=4000, tol=1e-12)
    other = separate(2 * D, x, ridge=2.0, alpha=0.3, num_iters=4000, tol=1e-12)
    torch.testing.assert_close(other.low_rank, one.low_rank, rtol=0, atol=1e-8)
    torch.testing.assert_close(other.code, one.code / 2, rtol=0, atol=1e-8)


def test_each_sample_stops_for_itself():
    D, x = randn(8, 3), randn(5, 8, seed=1)
    weights = {"ridge": 0.2, "alpha": 0.3, "num_iters": 500, "tol": 1e-3}
    together = separate(D, x, **weights)
    for i in range(5):
        for part, alone in zip(together, separate(D, x[i], **weights)):
            torch.testing.assert_close(part[i], alone, rtol=0, atol=1e-12)


def test_separate_is_differentiable():
    D, x = randn(5, 2).requires_grad_(), randn(2, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda D, x: separate(D, x, ridge=0.3, alpha=0.2, num_iters=5), (D, x))


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_nonnegative_ista_against_scipy(alpha):
    from scipy.optimize import nnls

    D, x = randn(8, 4).abs(), randn(6, 8, seed=1) + 1
    found = nonnegative_ista(D, x, alpha, num_iters=4000, tol=1e-12)
    # alpha |s|_1 is linear on s >= 0: least squares of [x; 0] on D with a shift, D' x - alpha = D' (x - shift).
    shift = alpha * torch.linalg.pinv(D.T) @ torch.ones(4, dtype=F64)
    expected = np.stack([nnls(D.numpy(), (row - shift).numpy())[0] for row in x])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-8)


# ---- Robust PCA ------------------------------------------------------------------------------------------------------


@quick
@given(threshold=st.floats(0.1, 3.0), seed=st.integers(0, 99), wide=st.booleans())
def test_singular_value_threshold_is_the_prox_of_the_nuclear_norm(threshold, seed, wide):
    A = randn(4, 6, seed=seed) if wide else randn(6, 4, seed=seed)
    X = singular_value_threshold(A, threshold)
    # The subgradient: A - X has spectral norm at most t, and <A - X, X> = t |X|_*.
    assert torch.linalg.matrix_norm(A - X, 2) <= threshold + 1e-10
    inner = ((A - X) * X).sum()
    torch.testing.assert_close(inner, threshold * torch.linalg.matrix_norm(X, "nuc"), rtol=0, atol=1e-10)


def corrupted(m, n, rank, share, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    low_rank = randn(m, rank, seed=seed, dtype=dtype) @ randn(rank, n, seed=seed + 1, dtype=dtype)
    support = torch.rand(m, n, generator=generator) < share
    sparse = torch.where(support, 10 * (torch.rand(m, n, generator=generator, dtype=F64) - 0.5), 0.0).to(dtype)
    return low_rank, sparse


@pytest.mark.parametrize(("m", "n"), [(80, 80), (60, 120), (120, 60)])
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_robust_pca_recovers_both_parts(m, n, dtype):
    low_rank, sparse = corrupted(m, n, rank=2, share=0.05, dtype=dtype)
    found = robust_pca(low_rank + sparse)
    size = torch.linalg.matrix_norm(low_rank)
    assert torch.linalg.matrix_norm(found.low_rank - low_rank) < 1e-5 * size
    assert torch.linalg.matrix_norm(found.sparse - sparse) < 1e-5 * size
    assert torch.linalg.matrix_rank(found.low_rank, rtol=1e-5) == 2
    assert found.num_iters < 100


def test_robust_pca_turned_round_is_the_same():
    low_rank, sparse = corrupted(30, 50, rank=2, share=0.05)
    one, other = robust_pca(low_rank + sparse), robust_pca((low_rank + sparse).T)
    torch.testing.assert_close(other.low_rank.T, one.low_rank, rtol=0, atol=1e-8)
    assert other.num_iters == one.num_iters


def test_robust_pca_ends_at_the_tolerance_or_the_number_of_iterations():
    low_rank, sparse = corrupted(30, 50, rank=2, share=0.05)
    M = low_rank + sparse
    few = robust_pca(M, num_iters=3)
    assert few.num_iters == 3
    loose, tight = robust_pca(M, tol=1e-2), robust_pca(M, tol=1e-8)
    assert loose.num_iters < tight.num_iters
    for parts, tol in ((loose, 1e-2), (tight, 1e-8)):
        gap = torch.linalg.matrix_norm(M - parts.low_rank - parts.sparse)
        assert gap <= tol * torch.linalg.matrix_norm(M)
    assert robust_pca(M.float()).low_rank.dtype == torch.float32


def test_the_weight_of_the_l1_norm_moves_the_border():
    low_rank, sparse = corrupted(40, 40, rank=2, share=0.05)
    M = low_rank + sparse
    all_low_rank, all_sparse = robust_pca(M, alpha=10.0), robust_pca(M, alpha=1e-3)
    torch.testing.assert_close(all_low_rank.low_rank, M, rtol=0, atol=1e-5)
    torch.testing.assert_close(all_sparse.sparse, M, rtol=0, atol=1e-5)


# ---- What they refuse ------------------------------------------------------------------------------------------------

D, X = randn(6, 3), randn(4, 6, seed=1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: separate(D, X[:, :5], ridge=0.1, alpha=0.1), ValueError, r"x must have shape \(\.\.\., 6\)"),
        (lambda: separate(D, X, ridge=-0.1, alpha=0.1), ValueError, "ridge must be at least 0"),
        (lambda: separate(D, X, ridge=0.1, alpha="0.1"), TypeError, "alpha must be a real number"),
        (lambda: separate(D, X, ridge=0.1, alpha=0.1, num_iters=0), ValueError, "num_iters must be at least 1"),
        (lambda: separate(D, X, ridge=0.1, alpha=0.1, tol=0.0), ValueError, "tol must be greater than 0"),
        (lambda: separate(D[0], X, ridge=0.1, alpha=0.1), ValueError, "dictionary must be a matrix"),
        (lambda: separate(0 * D, X, ridge=0.1, alpha=0.1), ValueError, "dictionary has 3 zero atoms"),
        (lambda: separation_objective(D, X, X, X, ridge=0.1, alpha=0.1), ValueError, r"code must have shape"),
        (lambda: nonnegative_ista(D, X.float(), 0.1), TypeError, "x is torch.float32"),
        (lambda: nonnegative_ista(D, X, -1.0), ValueError, "alpha must be at least 0"),
        (lambda: robust_pca(torch.zeros(3, 4)), ValueError, "matrix is zero everywhere"),
        (lambda: robust_pca(torch.ones(3)), ValueError, r"matrix must have shape \(m, n\)"),
        (lambda: robust_pca(torch.full((3, 4), torch.nan)), ValueError, "matrix has 12 NaN"),
        (lambda: robust_pca(torch.ones(3, 4, dtype=torch.int)), TypeError, "matrix must be floating point"),
        (lambda: robust_pca(torch.ones(3, 4), alpha=0.0), ValueError, "alpha must be greater than 0"),
        (lambda: singular_value_threshold(torch.ones(3), 0.1), ValueError, "matrix must have shape"),
        (lambda: singular_value_threshold(torch.ones(3, 3), -0.1), ValueError, "threshold must be at least 0"),
    ],
)
def test_what_they_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_parts_have_names():
    assert Decomposition._fields == ("low_rank", "sparse", "code")
