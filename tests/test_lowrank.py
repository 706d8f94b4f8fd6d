"""The low-rank encoders and their losses beyond the contract."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems_lowrank import LOWRANK_SYSTEMS

from unrolled import Checkpointed, Tolerance, fit, solvers
from unrolled.losses import Lasso, Separation, SeparationObjective
from unrolled.lowrank import NMFEncoder, RobustNMFEncoder, RPCAEncoder, RPCAStep, fit_basis
from unrolled.solvers import Decomposition

F64 = torch.float64
WEIGHTS = {"ridge": 0.05, "alpha": 0.2}
quick = settings(max_examples=15, deadline=None)
separating = pytest.mark.parametrize("encoder", [RPCAEncoder, RobustNMFEncoder])


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(num=64, m=20, rank=2, seed=0, dtype=F64):
    """Nonnegative signals of a low-rank part and a few large entries, and both parts."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.nn.functional.normalize(randn(m, rank, seed=99, dtype=dtype).abs(), dim=0)
    low_rank = (1 + torch.rand(num, rank, generator=generator, dtype=dtype)) @ columns.T
    sparse = 2.0 * (torch.rand(num, m, generator=generator, dtype=dtype) < 0.1)
    return low_rank + sparse, low_rank, sparse


# ---- Untrained they are the solvers ----------------------------------------------------------------------------------


@quick
@given(
    m=st.integers(1, 8),
    q=st.integers(1, 5),
    power=st.floats(-2, 2),
    ridge=st.floats(1e-3, 10.0),
    alpha=st.floats(1e-2, 2.0),
    nonnegative=st.booleans(),
    seed=st.integers(0, 99),
)
def test_they_are_the_solver_for_a_dictionary_of_any_norm(m, q, power, ridge, alpha, nonnegative, seed):
    dictionary, x = 10**power * randn(m, q, seed=seed), 3 * randn(4, m, seed=seed + 1)
    dictionary = dictionary.abs() if nonnegative else dictionary
    encoder = RobustNMFEncoder if nonnegative else RPCAEncoder
    found = encoder(dictionary, 12, ridge=ridge, alpha=alpha)(x)
    expected = solvers.separate(dictionary, x, ridge=ridge, alpha=alpha, nonnegative=nonnegative, num_iters=12)
    for part, other in zip(found, expected):
        torch.testing.assert_close(part, other, rtol=1e-10, atol=1e-10)


@separating
def test_leaving_out_the_sums_with_the_first_zeros_changes_nothing(encoder):
    x, *_ = mixture(5)
    net = encoder(randn(20, 2).abs(), 4, **WEIGHTS)
    with torch.no_grad():
        short = net(x)
        zeros = Decomposition(torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(5, 2))
        given_zeros = net(x, state=zeros)
    for one, other, graph in zip(short, given_zeros, net(x)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one, graph.detach(), rtol=1e-12, atol=1e-12)
    assert not any(bool(zero.any()) for zero in zeros)  # nothing was written into what came in


@separating
def test_a_state_goes_on_from_where_it_is(encoder):
    x, *_ = mixture(5)
    dictionary = randn(20, 2).abs()
    net = encoder(dictionary, 6, **WEIGHTS)
    for part, whole in zip(net(x, state=net(x)), encoder(dictionary, 12, **WEIGHTS)(x)):
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
    # A neighbouring frame is a better start than nothing.
    weights = {"dictionary": dictionary, "x": 1.01 * x, **WEIGHTS}

    def objective(parts):
        return solvers.separation_objective(code=parts.code, sparse=parts.sparse, **weights).mean()

    assert objective(net(1.01 * x, state=net(x))) < objective(net(1.01 * x))


def test_nonnegative_parts_stay_so_whatever_the_parameters():
    x = randn(5, 20)
    for net in (RobustNMFEncoder(randn(20, 3).abs(), 4, **WEIGHTS), NMFEncoder(randn(20, 3).abs(), 4, alpha=0.1)):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(randn(*parameter.shape, seed=parameter.numel()))
        out = net(x)
        for part in out if isinstance(out, tuple) else (out,):
            assert bool((part >= 0).all())
        assert all(bool((step.matrix >= 0).all()) for step in net)


def test_entries_of_the_dictionary_that_are_zero_can_grow():
    dictionary = torch.eye(4, 2, dtype=F64)
    net = RobustNMFEncoder(dictionary, 2, **WEIGHTS)
    net(torch.ones(1, 4, dtype=F64)).low_rank.sum().backward()
    assert bool(net[-1].raw_dictionary.grad[dictionary == 0].any())


def test_positive_quantities_and_what_they_start_from():
    dictionary = 2 * randn(6, 3)
    step = RPCAStep(dictionary, ridge=0.3, alpha=0.7)
    L = torch.linalg.svdvals(dictionary)[0] ** 2 + 1
    for name, value, size in (("step_size", 1.0, 6), ("theta", 0.7, 6), ("damping", 0.3, 3)):
        torch.testing.assert_close(getattr(step, name), (value / L).expand(size))
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.fill_(-5.0)
    assert all(bool((getattr(step, name) > 0).all()) for name in ("step_size", "theta", "damping"))
    step.reset_parameters(dictionary)
    torch.testing.assert_close(step.weight, dictionary.T / L)
    assert torch.equal(step.dictionary, dictionary)
    with pytest.raises(ValueError, match=r"dictionary must have shape \(6, 3\) as before"):
        step.reset_parameters(dictionary.T)


# ---- The answer is three tensors: what the suite sees as one ---------------------------------------------------------


@separating
def test_three_parts_through_export_compile_and_vmap(encoder):
    x, *_ = mixture(3)
    net = encoder(randn(20, 2).abs(), 3, **WEIGHTS).eval()
    expected = net(x)
    assert isinstance(expected, Decomposition)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for found in (program.module()(x), compiled(x), torch.vmap(net)(x)):
        for part, other in zip(found, expected):
            torch.testing.assert_close(part, other, rtol=0, atol=1e-12)
    assert len(program.module()(torch.cat([x, x])).code) == 6


@separating
def test_any_number_of_batch_dimensions(encoder):
    x, *_ = mixture(6)
    net = encoder(randn(20, 2).abs(), 3, **WEIGHTS)
    whole = net(x)
    for shape in ((2, 3), (6, 1)):
        for part, other in zip(net(x.reshape(*shape, 20)), whole):
            torch.testing.assert_close(part.reshape(other.shape), other)
    for part, other in zip(net(x[0]), whole):
        torch.testing.assert_close(part, other[0])


def test_stopping_watches_all_parts():
    x, *_ = mixture(6)
    dictionary = torch.linalg.qr(randn(20, 2)).Q
    net = RPCAEncoder(dictionary, 1000, tied=True, stop=Tolerance(rtol=1e-7), **WEIGHTS)
    exact = solvers.separate(dictionary, x, num_iters=2000, **WEIGHTS)
    for part, other in zip(net(x), exact):
        torch.testing.assert_close(part, other, rtol=0, atol=1e-4)


def test_the_rows_of_the_suite_are_the_encoders():
    for system in LOWRANK_SYSTEMS:
        assert isinstance(system.make(), (RPCAEncoder, RobustNMFEncoder, NMFEncoder))


# ---- Learning --------------------------------------------------------------------------------------------------------


def unending(x):
    return iter(lambda: x, None)


@separating
@pytest.mark.parametrize("tied", [False, True])
def test_it_learns_the_objective(encoder, tied):
    x, *_ = mixture()
    nonnegative = encoder is RobustNMFEncoder
    dictionary = fit_basis(x, 2, alpha=0.2, nonnegative=nonnegative)
    net = encoder(dictionary, 3, tied=tied, **WEIGHTS)

    def objective(parts):
        return solvers.separation_objective(dictionary, x, parts.code, parts.sparse, **WEIGHTS).mean().item()

    before = objective(net(x))
    best = objective(solvers.separate(dictionary, x, nonnegative=nonnegative, num_iters=5000, **WEIGHTS))
    fit(net, unending(x), SeparationObjective(dictionary, **WEIGHTS), num_steps=150)
    parts = net(x)
    assert best <= objective(parts) < best + 0.3 * (before - best)
    apart = (parts.low_rank - parts.code @ dictionary.T).norm() / parts.low_rank.norm()
    assert apart < 0.2  # the low-rank part still means D s


@separating
def test_it_learns_known_parts(encoder):
    x, low_rank, sparse = mixture()
    new, new_low_rank, new_sparse = mixture(seed=1)
    dictionary = fit_basis(x, 2, alpha=0.2, nonnegative=encoder is RobustNMFEncoder)
    net = encoder(dictionary, 4, **WEIGHTS)
    loss = Separation()
    before = loss(net, (new, (new_low_rank, new_sparse))).item()
    fit(net, unending((x, (low_rank, sparse))), loss, num_steps=150)
    assert loss(net, (new, (new_low_rank, new_sparse))).item() < 0.3 * before


def test_nmf_learns_the_objective_of_lasso():
    x, *_ = mixture()
    dictionary = randn(20, 6).abs()
    net = NMFEncoder(dictionary, 4, alpha=0.1)
    loss = Lasso(dictionary, 0.1)
    before = loss(net, x).item()
    fit(net, unending(x), loss, num_steps=100)
    exact = solvers.nonnegative_ista(dictionary, x, 0.1, num_iters=5000)
    best = solvers.lasso_objective(dictionary, x, exact, 0.1).mean().item()
    assert best <= loss(net, x).item() < best + 0.5 * (before - best)


def test_gradients_with_less_memory_are_the_same():
    x, *_ = mixture(4)
    loss = SeparationObjective(randn(20, 2), **WEIGHTS)
    found = []
    for options in ({}, {"gradient": Checkpointed(every=2)}):
        net = RPCAEncoder(randn(20, 2), 5, **WEIGHTS, **options)
        found.append(torch.autograd.grad(loss(net, x), list(net.parameters())))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# ---- The losses ------------------------------------------------------------------------------------------------------


def test_the_losses_are_their_formulas():
    x, low_rank, sparse = mixture(5)
    D = randn(20, 2)
    parts = RPCAEncoder(D, 3, **WEIGHTS)(x)
    value = solvers.separation_objective(D, x, parts.code, parts.sparse, **WEIGHTS).mean()
    torch.testing.assert_close(SeparationObjective(D, **WEIGHTS)(lambda x: parts, x), value)
    shifted = parts._replace(low_rank=parts.low_rank + 1)
    torch.testing.assert_close(SeparationObjective(D, **WEIGHTS)(lambda x: shifted, x), value + 20 / 2)
    errors = [(part - true).square().sum(1).mean() for part, true in zip(parts, (low_rank, sparse))]
    found = Separation(low_rank=2.0, sparse=0.5)(lambda x: parts, [x, [low_rank, sparse]])
    torch.testing.assert_close(found, 2 * errors[0] + 0.5 * errors[1])


def test_the_objective_keeps_the_dictionary_it_was_given():
    x, *_ = mixture(5)
    D = randn(20, 2)
    loss, net = SeparationObjective(D, **WEIGHTS), RPCAEncoder(D, 3, **WEIGHTS)
    value = loss(net, x)
    D.mul_(2.0)
    torch.testing.assert_close(loss(net, x), value)
    assert list(loss.state_dict()) == ["dictionary"] and not list(loss.parameters())


def test_repr():
    assert repr(Separation(low_rank=2.0)) == "Separation(low_rank=2, sparse=1)"
    assert repr(SeparationObjective(randn(20, 2), ridge=0.1, alpha=0.2)) == "SeparationObjective(ridge=0.1, alpha=0.2)"
    assert "signal=20, rank=2, ridge=0.05, alpha=0.2" in repr(RPCAEncoder(randn(20, 2), **WEIGHTS))
    assert "signal=20, atoms=2, alpha=0.2" in repr(NMFEncoder(randn(20, 2).abs(), alpha=0.2))


# ---- The basis -------------------------------------------------------------------------------------------------------


def angle(basis, x):
    """How much of x lies outside the span."""
    Q = torch.linalg.qr(basis).Q
    return ((x - x @ Q @ Q.T).norm() / x.norm()).item()


@pytest.mark.parametrize("nonnegative", [False, True])
def test_fit_basis_keeps_to_the_low_rank_part(nonnegative):
    generator = torch.Generator().manual_seed(0)
    columns = randn(60, 1).abs()
    low_rank = (3 + torch.rand(100, 1, generator=generator, dtype=F64)) @ columns.T
    car = torch.zeros(100, 60, dtype=F64)
    for i in range(100):
        car[i, i // 2 : i // 2 + 5] = 20.0
    basis = fit_basis(low_rank + car, 1, alpha=0.05, nonnegative=nonnegative, num_iters=200)
    principal = torch.linalg.svd(low_rank + car, full_matrices=False).Vh[:1].T
    assert angle(basis, low_rank) < 0.02 < 0.2 < angle(principal, low_rank)


@quick
@given(rank=st.integers(1, 4), ridge=st.floats(0.0, 1.0), nonnegative=st.booleans(), seed=st.integers(0, 99))
def test_the_basis_gets_better_from_turn_to_turn(rank, ridge, nonnegative, seed):
    x, *_ = mixture(30, m=12, rank=3, seed=seed)
    weights = {"ridge": ridge, "alpha": 0.3}

    def objective(num_iters):
        basis = fit_basis(x, rank, nonnegative=nonnegative, num_iters=num_iters, **weights)
        assert basis.shape == (12, rank) and basis.is_contiguous()
        norms = torch.linalg.vector_norm(basis, dim=0)
        torch.testing.assert_close(norms, torch.ones_like(norms))
        if nonnegative:
            assert bool((basis >= 0).all())
        else:
            torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=F64))
        parts = solvers.separate(basis, x, nonnegative=nonnegative, num_iters=400, **weights)
        return solvers.separation_objective(basis, x, parts.code, parts.sparse, **weights).sum().item()

    start, few, many = (objective(k) for k in (1, 10, 100))
    assert many <= few * 1.01 and few <= start * 1.01  # codes for one basis are better than those met on the way


def test_fit_basis_without_outliers_spans_the_principal_components():
    low_rank = randn(40, 3) @ randn(3, 12, seed=1)
    assert angle(fit_basis(low_rank, 3, alpha=100.0), low_rank) < 1e-6


# ---- What they refuse ------------------------------------------------------------------------------------------------

D, X = randn(6, 3), randn(4, 6, seed=1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RPCAEncoder(D, ridge=0.0, alpha=0.1), ValueError, "ridge must be greater than 0"),
        (lambda: RPCAEncoder(D, ridge=0.1, alpha=-1), ValueError, "alpha must be greater than 0"),
        (lambda: RPCAEncoder(D[0], ridge=0.1, alpha=1), ValueError, "dictionary must be a matrix"),
        (lambda: RPCAEncoder(D.to(torch.complex128), ridge=0.1, alpha=1), TypeError, "dictionary must be floating"),
        (lambda: RobustNMFEncoder(D, ridge=0.1, alpha=1), ValueError, "dictionary must be at least 0 everywhere"),
        (lambda: NMFEncoder(D, alpha=1), ValueError, "dictionary must be at least 0 everywhere"),
        (lambda: NMFEncoder(D.abs(), alpha=0), ValueError, "alpha must be greater than 0"),
        (lambda: fit_basis(X, 5, alpha=0.1), ValueError, "rank must be at most 4"),
        (lambda: fit_basis(X, 0, alpha=0.1), ValueError, "rank must be at least 1"),
        (lambda: fit_basis(X[0], 1, alpha=0.1), ValueError, r"x must have shape \(N, m\)"),
        (lambda: fit_basis(0 * X, 1, alpha=0.1), ValueError, "x is zero everywhere"),
        (lambda: fit_basis(X, 1, alpha=0.0), ValueError, "alpha must be greater than 0"),
        (lambda: Separation(low_rank=0.0, sparse=0.0), ValueError, "low_rank and sparse are both 0"),
        (lambda: Separation(low_rank=-1.0), ValueError, "low_rank must be at least 0"),
        (lambda: SeparationObjective(D, ridge=-1.0, alpha=0.1), ValueError, "ridge must be at least 0"),
        (lambda: Separation()(lambda x: x, (X, (X, X))), TypeError, "net must return a Decomposition"),
        (lambda: Separation()(RPCAEncoder(D, **WEIGHTS), (X, X)), TypeError, r"batch must be \(x, \(low_rank, sparse"),
        (lambda: Separation()(RPCAEncoder(D, **WEIGHTS), X), TypeError, r"batch must be \(x, \(low_rank, sparse"),
        (
            lambda: Separation()(RPCAEncoder(D, **WEIGHTS), (X, (X[0], X))),
            ValueError,
            r"low-rank parts have shape \(6,\), the network's \(4, 6\)",
        ),
    ],
)
def test_what_they_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_meta_devices():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = RPCAEncoder(torch.empty(6, 3, device="meta"), 2, **WEIGHTS)
    assert all(part.device.type == "meta" for part in net(torch.empty(4, 6, device="meta")))
