"""The classical solvers: against scikit-learn, optimality conditions, the theorems about them, and each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import sparse_encode
from sklearn.linear_model import Lasso, orthogonal_mp

from unrolled.operators import Boundary, Composition, Convolution, Dense, LinearOperator, Subsampling
from unrolled.solvers import fista, iht, iht_penalized, ista, lasso_objective, lipschitz

F64, C128 = torch.float64, torch.complex128
quick = settings(max_examples=25, deadline=None)

# (name, solver of (dictionary, y)): for what all of them must do
SOLVERS = {
    "ista": lambda D, y, **kw: ista(D, y, 0.2, **kw),
    "fista": lambda D, y, **kw: fista(D, y, 0.2, **kw),
    "fista-restart": lambda D, y, **kw: fista(D, y, 0.2, restart=True, **kw),
    "iht": lambda D, y, **kw: iht(D, y, 3, **kw),
    "iht_penalized": lambda D, y, **kw: iht_penalized(D, y, 0.05, **kw),
}
every_solver = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS.keys())
lasso_solver = pytest.mark.parametrize("solve", [ista, fista])


class ByResidual(LinearOperator):
    """A matrix that does not say so: the solvers cannot form its Gram matrix."""

    def __init__(self, matrix):
        super().__init__(matrix.shape[1:], matrix.shape[:1])
        self.register_buffer("matrix", matrix)

    def forward(self, x):
        return x @ self.matrix.mT

    def adjoint(self, y):
        return y @ self.matrix.conj()


def problem(m, n, batch=(6,), seed=0, dtype=F64):
    """Unit atoms, and signals made of a few of them plus noise."""
    g = torch.Generator().manual_seed(seed)
    D = torch.nn.functional.normalize(torch.randn(m, n, generator=g, dtype=dtype), dim=0)
    x = torch.randn(*batch, n, generator=g, dtype=dtype) * (torch.rand(*batch, n, generator=g) < 0.15)
    return D, x @ D.mT + 0.05 * torch.randn(*batch, m, generator=g, dtype=dtype)


def kkt_violation(D, y, x, alpha):
    """0 at the Lasso's solution: D^H r = alpha sgn(x) on the support and |D^H r| <= alpha off it."""
    c = (y - x @ D.mT) @ D.conj()
    return torch.where(x.abs() > 0, (c - alpha * torch.sgn(x)).abs(), torch.relu(c.abs() - alpha)).max()


# --- against scikit-learn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30), (20, 50)])  # the first two by Gram matrix, the last not
@lasso_solver
def test_lasso_is_that_of_sklearn(solve, m, n):
    D, y = problem(m, n)
    x = solve(D, y, 0.1, num_iters=4000)
    model = Lasso(alpha=0.1 / m, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(D, y.mT)
    np.testing.assert_allclose(x, model.coef_, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["lasso_cd", "lasso_lars"])
def test_lasso_is_that_of_sparse_encode(algorithm):
    D, y = problem(20, 30)
    codes = sparse_encode(y.numpy(), D.mT.numpy(), algorithm=algorithm, alpha=0.1, max_iter=10_000)
    np.testing.assert_allclose(fista(D, y, 0.1, restart=True, num_iters=1000), codes, rtol=0, atol=1e-6)


def test_iht_finds_the_atoms_that_omp_finds():
    g = torch.Generator().manual_seed(3)
    D = torch.nn.functional.normalize(torch.randn(80, 100, generator=g, dtype=F64), dim=0)
    x = torch.zeros(5, 100, dtype=F64)
    for row in x:
        row[torch.randperm(100, generator=g)[:3]] = torch.tensor([2.0, -1.5, 1.0], dtype=F64)
    y = x @ D.mT
    found = iht(D, y, 3, num_iters=200)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found, orthogonal_mp(D.numpy(), y.mT.numpy(), n_nonzero_coefs=3).T, rtol=0, atol=1e-10)


def test_objective_by_hand():
    D = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    y, x = torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    # residuals (2, 2) and (0, 0)
    torch.testing.assert_close(lasso_objective(D, y, x, 0.5), torch.tensor([5.0, 0.0]))
    assert lasso_objective(D, y[0], x[0], torch.tensor([0.5, 2.0])) == 6.5


def test_objective_of_a_network_under_autocast():
    D, y = (v.float() for v in problem(8, 12))
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)).bfloat16()  # what a network gives there
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lasso_objective(D, y, x, 0.1)
    torch.testing.assert_close(found.float(), lasso_objective(D, y, x.float(), 0.1), rtol=5e-2, atol=0)  # 8 bits


def test_lipschitz():
    D, _ = problem(8, 12)
    expected = torch.linalg.eigvalsh(D.mT @ D)[-1]
    torch.testing.assert_close(lipschitz(D), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(lipschitz(Dense(D)), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lipschitz, D.requires_grad_())


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("dtype", [F64, C128])
def test_fista_is_the_algorithm_as_published(restart, dtype):
    D, y = problem(10, 30, batch=(4,), dtype=dtype)
    L, found = float(lipschitz(D)), fista(D, y, 0.05, restart=restart, num_iters=150)
    D = D.numpy()
    restarts = 0
    for signal, answer in zip(y.numpy(), found.numpy(), strict=True):
        x = z = np.zeros(30, D.dtype)
        t = 1.0
        for _ in range(150):
            u = z + D.conj().T @ (signal - D @ z) / L
            x_next = np.exp(1j * np.angle(u)) * np.maximum(np.abs(u) - 0.05 / L, 0)
            x_next = x_next if dtype is C128 else x_next.real
            t_next = (1 + np.sqrt(1 + 4 * t**2)) / 2
            if restart and np.vdot(z - x_next, x_next - x).real > 0:
                z, t, restarts = x_next, 1.0, restarts + 1
            else:
                z, t = x_next + (t - 1) / t_next * (x_next - x), t_next
            x = x_next
        np.testing.assert_allclose(answer, x, rtol=0, atol=1e-10)
    assert (restarts > 4) == restart


# --- theorems -------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(2, 12), st.integers(2, 12), st.floats(0, 2), st.floats(0.1, 1), st.integers(0, 1000))
def test_ista_never_increases_the_objective(m, n, alpha, fraction, seed):
    D, y = problem(m, n, batch=(), seed=seed)
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for _ in range(8):
        new = ista(D, y, alpha, num_iters=1, step_size=fraction / float(lipschitz(D)), x0=x)
        before, after = lasso_objective(D, y, x, alpha), lasso_objective(D, y, new, alpha)
        assert after <= before + 1e-12 * (1 + before)
        x = new


@quick
@given(st.integers(2, 10), st.integers(2, 10), st.floats(0.01, 0.5), st.integers(0, 1000))
def test_penalized_iht_never_increases_its_objective(m, n, alpha, seed):
    D, y = problem(m, n, batch=(), seed=seed)

    def objective(x):
        return lasso_objective(D, y, x, 0.0) + alpha * (x != 0).sum()

    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for _ in range(8):
        new = iht_penalized(D, y, alpha, num_iters=1, x0=x)
        assert objective(new) <= objective(x) * (1 + 1e-12)
        x = new


def test_rates():
    """F(x_k) - F* <= L |x*|^2 / (2 k) for ISTA and <= 2 L |x*|^2 / (k + 1)^2 for FISTA, and FISTA is ahead."""
    D, y = problem(20, 50)
    best = fista(D, y, 0.02, restart=True, num_iters=3000)
    assert kkt_violation(D, y, best, 0.02) < 1e-12
    constant = lipschitz(D) * best.square().sum(-1)
    for k in (10, 30, 100):
        gaps = {
            solve: lasso_objective(D, y, solve(D, y, 0.02, num_iters=k), 0.02) - lasso_objective(D, y, best, 0.02)
            for solve in (ista, fista)
        }
        assert (gaps[ista] <= constant / (2 * k)).all()
        assert (gaps[fista] <= 2 * constant / (k + 1) ** 2).all()
        assert gaps[fista].mean() < gaps[ista].mean()
    assert gaps[fista].mean() < gaps[ista].mean() / 10


def test_restart_is_sooner_there():
    D, y = problem(20, 40)
    best = lasso_objective(D, y, fista(D, y, 0.05, restart=True, num_iters=1500), 0.05)

    def gap(**options):
        return ((lasso_objective(D, y, fista(D, y, 0.05, **options), 0.05) - best) / best).max()

    assert gap(num_iters=400, restart=True) < 1e-10 < 1e-8 < gap(num_iters=400)


@pytest.mark.parametrize(("m", "n"), [(15, 20), (10, 30)])
@lasso_solver
def test_kkt_conditions_of_the_complex_lasso(solve, m, n):
    D, y = problem(m, n, dtype=C128)
    x = solve(D, y, 0.2, num_iters=3000)
    assert kkt_violation(D, y, x, 0.2) < 1e-9
    assert 0 < (x != 0).double().mean() < 0.5


@every_solver
def test_the_answer_is_a_fixed_point(solve):
    D, y = problem(20, 30)
    x = solve(D, y, num_iters=3000)
    torch.testing.assert_close(solve(D, y, num_iters=3, x0=x), x, rtol=0, atol=1e-9)


def test_iht_keeps_that_many():
    D, y = problem(20, 30)
    for M in (1, 4, 30):
        assert ((iht(D, y, M, num_iters=10) != 0).sum(-1) == M).all()


def test_penalized_iht_keeps_what_pays():
    D, y = problem(20, 30)
    x = iht_penalized(D, y, 0.05, num_iters=5000)
    nonzero = x.abs()[x != 0]
    assert len(nonzero) and (nonzero > (0.1 / lipschitz(D)).sqrt()).all()


# --- the forms agree ------------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize(("m", "n"), [(20, 30), (10, 30)])
def test_gram_residual_and_operator_forms_agree(solve, dtype, m, n):
    D, y = problem(m, n, dtype=dtype)
    s = 0.9 / lipschitz(D)
    expected = solve(D, y, num_iters=30, step_size=s)
    torch.testing.assert_close(solve(Dense(D), y, num_iters=30, step_size=s), expected, rtol=0, atol=0)
    torch.testing.assert_close(solve(ByResidual(D), y, num_iters=30, step_size=s), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(solve(D, y, num_iters=30, step_size=float(s)), expected, rtol=0, atol=1e-12)


@every_solver
def test_default_step_of_an_operator(solve):
    D, y = problem(20, 30)
    # Its norm comes from power iteration, good to 1e-6 here; thirty iterations do not amplify that.
    torch.testing.assert_close(solve(ByResidual(D), y, num_iters=30), solve(D, y, num_iters=30), rtol=0, atol=1e-4)


@every_solver
def test_images(solve):
    blur = Convolution(torch.full((1, 2, 3, 3), 1 / 9, dtype=F64), (2, 6, 5), boundary=Boundary.CIRCULAR)
    A = Composition(Subsampling(torch.arange(30).reshape(1, 6, 5) % 3 > 0), blur)
    D = A(torch.eye(60, dtype=F64).reshape(60, 2, 6, 5)).mT
    y = torch.randn(2, 3, *A.out_shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = solve(A, y, num_iters=20, step_size=0.5)
    assert x.shape == (2, 3, 2, 6, 5)
    # Both channels see the same blur, which ties the atoms: start off the tie, where hard thresholds are unique.
    x0 = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = solve(A, y, num_iters=20, step_size=0.5, x0=x0)
    expected = solve(D, y, num_iters=20, step_size=0.5, x0=x0.flatten(-3))
    torch.testing.assert_close(found.flatten(-3), expected, rtol=0, atol=1e-12)


@every_solver
def test_default_step_is_one_over_lipschitz(solve):
    D, y = problem(20, 30)
    assert torch.equal(solve(D, y), solve(D, y, num_iters=100, step_size=1 / lipschitz(D)))


@every_solver
def test_single_precision(solve):
    D, y = problem(20, 30)
    x = solve(D.float(), y.float(), num_iters=20)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), solve(D, y, num_iters=20), rtol=0, atol=1e-4)


# --- samples by themselves ------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize(("m", "n"), [(20, 30), (10, 30)])
def test_batch_mates_do_not_matter(solve, tol, m, n):
    D, y = problem(m, n)
    others = torch.cat((y[:1], 100 * y[1:].flip(0)))
    x = solve(D, y, tol=tol, num_iters=200)
    assert torch.equal(solve(D, others, tol=tol, num_iters=200)[0], x[0])
    torch.testing.assert_close(solve(D, y[:1], tol=tol, num_iters=200), x[:1], rtol=0, atol=1e-12)
    torch.testing.assert_close(solve(D, y[0], tol=tol, num_iters=200), x[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        solve(D, y.reshape(3, 2, m), tol=tol, num_iters=200), x.reshape(3, 2, n), rtol=0, atol=1e-12
    )


@every_solver
def test_tol_stops_each_sample_when_it_has_settled(solve):
    D, y = problem(20, 30)
    stopped = solve(D, y, tol=1e-2, num_iters=3000)
    path = [torch.zeros_like(stopped), *(solve(D, y, num_iters=k) for k in range(1, 60))]
    stops = set()
    for i, answer in enumerate(stopped):
        first = next(
            k
            for k in range(1, len(path))
            if (path[k][i] - path[k - 1][i]).norm() <= 1e-2 * path[k][i].norm()  # the rule as documented
        )
        torch.testing.assert_close(answer, path[first][i], rtol=0, atol=1e-12)
        stops.add(first)
    assert len(stops) > 1  # the samples did not stop together


def test_tol_leaves_the_loop():
    D, y = problem(20, 30)
    calls = []

    class Counting(ByResidual):
        def adjoint(self, y):
            calls.append(1)
            return super().adjoint(y)

    ista(Counting(D), y, 0.2, step_size=0.3, tol=1e-2, num_iters=10_000)
    assert len(calls) < 1000


def test_a_diverging_sample_has_not_settled():
    D, y = problem(20, 30)
    # The norm of x overflows two iterations before x does, and inf <= tol * inf.
    assert not torch.isfinite(ista(D, y, 0.0, step_size=1e150, num_iters=50, tol=1e-3)).any()


@every_solver
def test_vmap(solve):
    D, y = problem(20, 30)
    torch.testing.assert_close(
        torch.func.vmap(lambda y: solve(D, y, num_iters=20))(y), solve(D, y, num_iters=20), rtol=0, atol=1e-12
    )


def test_alpha_may_differ_by_sample_and_atom():
    D, y = problem(20, 30)
    alpha = 0.05 + torch.rand(6, 30, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = fista(D, y, alpha, restart=True, num_iters=1000)
    assert kkt_violation(D, y, x, alpha) < 1e-10
    each = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.4, 0.5], dtype=F64)
    x = ista(D, y, each[:, None])
    torch.testing.assert_close(x[2], ista(D, y[2], 0.2), rtol=0, atol=1e-12)


# --- derivatives ----------------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize(("m", "n"), [(5, 4), (4, 9)])
@pytest.mark.parametrize("dtype", [F64, C128])
def test_gradients(solve, m, n, dtype):
    D, y = problem(m, n, batch=(2,), seed=2, dtype=dtype)
    assert torch.autograd.gradcheck(lambda D, y: solve(D, 3 * y, num_iters=4), (D.requires_grad_(), y.requires_grad_()))


@lasso_solver
def test_gradients_of_alpha_step_and_start(solve):
    D, y = problem(5, 4, batch=(2,))
    x0 = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    scalars = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.1, 0.3)]

    def run(alpha, s, x0):
        return solve(D, y, alpha, step_size=s, x0=x0, num_iters=4, tol=1e-9)

    assert torch.autograd.gradcheck(run, (*scalars, x0.requires_grad_()))


# --- errors ---------------------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"D": [[1.0]]}, TypeError, "dictionary must be a matrix"),
        ({"D": torch.ones(20, dtype=F64)}, ValueError, r"dictionary must have shape \(m, n\)"),
        ({"D": torch.full((20, 30), torch.nan, dtype=F64)}, ValueError, "dictionary has 600 NaN"),
        ({"D": torch.zeros(20, 30, dtype=F64)}, ValueError, "dictionary is zero"),
        ({"D": problem(30, 20)[0]}, ValueError, r"y must have shape \(\.\.\., 30\)"),
        ({"y": np.zeros((6, 20))}, TypeError, "y must be a torch.Tensor, got ndarray"),
        ({"y": torch.zeros(6, 20)}, TypeError, r"y is torch\.float32 but"),
        ({"y": torch.zeros(0, 20, dtype=F64)}, ValueError, "y is empty"),
        ({"y": torch.full((6, 20), torch.inf, dtype=F64)}, ValueError, "y has 120 NaN or infinite"),
        ({"num_iters": 0}, ValueError, "num_iters must be at least 1"),
        ({"num_iters": 2.5}, TypeError, "num_iters must be an int"),
        ({"step_size": 0.0}, ValueError, "step_size must be greater than 0"),
        ({"step_size": "1/L"}, TypeError, "step_size must be a real number"),
        ({"step_size": torch.tensor(-1.0, dtype=F64)}, ValueError, "step_size must be positive, got -1"),
        ({"step_size": torch.tensor(1.0)}, TypeError, "step_size must be torch.float64 on cpu"),
        ({"step_size": torch.ones(6, 1, dtype=F64)}, ValueError, r"step_size must be a number or .*\(6, 1\)"),
        ({"x0": torch.zeros(6, 20, dtype=F64)}, ValueError, r"x0 must have shape \(\.\.\., 30\)"),
        ({"x0": torch.zeros(1, 30, dtype=F64)}, ValueError, "x0 must be like y"),
        ({"x0": torch.zeros(6, 30)}, TypeError, "x0 is torch.float32"),
        ({"x0": torch.full((6, 30), torch.nan, dtype=F64)}, ValueError, "x0 has 180 NaN"),
        ({"tol": 0.0}, ValueError, "tol must be greater than 0"),
        ({"tol": True}, TypeError, "tol must be a real number"),
    ],
)
def test_errors(solve, change, error, message):
    D, y = problem(20, 30)
    options = {"D": D, "y": y} | change
    with pytest.raises(error, match=message):
        solve(options.pop("D"), options.pop("y"), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda D, y: ista(D, y, -1.0), ValueError, "alpha must be at least 0"),
        (lambda D, y: fista(D, y, "0.1"), TypeError, "alpha must be a real number"),
        (lambda D, y: ista(D, y, torch.full((6,), 0.1, dtype=F64)), ValueError, r"alpha .* broadcasts to \(6, 30\)"),
        (lambda D, y: ista(D, y, -torch.ones(30, dtype=F64)), ValueError, "alpha must be at least 0, got -1"),
        (lambda D, y: iht_penalized(D, y, torch.ones(30)), TypeError, "alpha must be torch.float64"),
        (lambda D, y: fista(D, y, 0.1, restart="gradient"), TypeError, "restart must be True or False"),
        (lambda D, y: iht(D, y, 0), ValueError, "sparsity must be at least 1"),
        (lambda D, y: iht(D, y, 31), ValueError, "sparsity must be at most 30, .* got 31"),
        (lambda D, y: iht(D, y, 0.1), TypeError, "sparsity must be an int"),
        (lambda D, y: lasso_objective(D, y, y, 0.1), ValueError, r"x must have shape \(\.\.\., 30\)"),
        (lambda D, y: lasso_objective(D, y, y.new_zeros(5, 30), 0.1), ValueError, "x must be like y"),
        (lambda D, y: lasso_objective(D, y, y.new_zeros(6, 30), -0.1), ValueError, "alpha must be at least 0"),
        (lambda D, y: lipschitz("D"), TypeError, "dictionary must be a matrix"),
    ],
)
def test_errors_of_single_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(*problem(20, 30))
