"""Thresholds, projections and the operator norm against their definitions, NumPy and numeric derivatives."""

import doctest
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.autograd import gradcheck

from unrolled import functional as F

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
TO_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}

properties = settings(max_examples=30, deadline=None, derandomize=True)
numbers = st.floats(-10, 10)
thresholds = st.floats(0, 5)
vectors = arrays(np.float64, 7, elements=numbers).map(torch.from_numpy)
complex_vectors = st.tuples(vectors, vectors).map(lambda parts: torch.complex(*parts))

# Each with its thresholds fixed: a map of x alone.
THRESHOLDS = {
    "soft": lambda x: F.soft_threshold(x, 0.4),
    "positive": lambda x: F.positive_soft_threshold(x, 0.4),
    "hard": lambda x: F.hard_threshold(x, 0.4),
    "helu": lambda x: F.helu(x, 1.1, 7 / 11),  # from 0.4 to 1.1
    "firm": lambda x: F.firm_threshold(x, 0.4, 1.1),
    "top_k": lambda x: F.top_k_threshold(x, 2),
}
PROJECTIONS = {
    "simplex": F.project_simplex,
    "l2_ball": lambda x: F.project_l2_ball(x, 0.7),
}
MAPS = THRESHOLDS | PROJECTIONS
REAL_ONLY = ("positive", "simplex")


def pairs(*dtypes: torch.dtype) -> list[tuple[str, torch.dtype]]:
    return [(name, dtype) for name in MAPS for dtype in dtypes if not (dtype.is_complex and name in REAL_ONLY)]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    # No half precision generator is needed: it is the same numbers, rounded.
    double = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(*shape, dtype=double, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_examples():
    failed, tried = doctest.testmod(F)
    assert tried >= 10
    assert failed == 0


# --- proximal operators against brute force: z is nowhere cheaper than at the threshold's answer


def real_grid() -> torch.Tensor:
    return torch.linspace(-12, 12, 4801, dtype=torch.float64)  # holds 0


@properties
@given(numbers, thresholds)
def test_soft_is_the_prox_of_the_absolute_value(x, t):
    def cost(z):
        return 0.5 * (z - x).square() + t * z.abs()

    answer = F.soft_threshold(torch.tensor(x, dtype=torch.float64), t)
    grid = real_grid()
    assert cost(answer) <= cost(grid).min() + 1e-12
    assert (answer - grid[cost(grid).argmin()]).abs() <= 0.005  # the cost is strongly convex: one grid step


@properties
@given(numbers, thresholds)
def test_positive_soft_is_the_prox_of_the_sum_and_nonnegativity(x, t):
    def cost(z):
        return 0.5 * (z - x).square() + t * z

    answer = F.positive_soft_threshold(torch.tensor(x, dtype=torch.float64), t)
    grid = real_grid().clamp(min=0)
    assert answer >= 0
    assert cost(answer) <= cost(grid).min() + 1e-12
    assert (answer - grid[cost(grid).argmin()]).abs() <= 0.005


@properties
@given(numbers, thresholds)
def test_hard_is_the_prox_of_the_count(x, penalty):
    def cost(z):
        return 0.5 * (z - x).square() + penalty * (z != 0)

    answer = F.hard_threshold(torch.tensor(x, dtype=torch.float64), math.sqrt(2 * penalty))
    assert cost(answer) <= cost(torch.cat([real_grid(), torch.tensor([x], dtype=torch.float64)])).min() + 1e-12


@properties
@given(numbers, numbers, thresholds)
def test_complex_soft_is_the_prox_of_the_modulus(a, b, t):
    x = torch.complex(*torch.tensor([a, b], dtype=torch.float64))

    def cost(z):
        return 0.5 * (z - x).abs().square() + t * z.abs()

    modulus, phase = torch.linspace(0, 15, 76).double(), torch.linspace(-math.pi, math.pi, 91).double()
    answer = F.soft_threshold(x, t)
    assert cost(answer) <= cost(torch.polar(modulus[:, None].expand(-1, 91), phase.expand(76, -1))).min() + 1e-12
    around = answer + 1e-3 * torch.exp(1j * torch.arange(16, dtype=torch.float64))  # a ring: 0 and the kink included
    assert cost(answer) <= cost(around).min() + 1e-12


# --- invariants


@properties
@given(vectors, vectors, thresholds)
def test_soft_and_positive_are_firmly_nonexpansive(x, y, t):
    for threshold in (F.soft_threshold, F.positive_soft_threshold):
        change = threshold(x, t) - threshold(y, t)
        assert change.square().sum() <= (change * (x - y)).sum() + 1e-12


@properties
@given(complex_vectors, complex_vectors, thresholds)
def test_complex_soft_is_firmly_nonexpansive(x, y, t):
    change = F.soft_threshold(x, t) - F.soft_threshold(y, t)
    assert change.abs().square().sum() <= torch.vdot(change, x - y).real + 1e-11


@properties
@given(vectors, thresholds)
def test_soft_equals_its_other_forms(x, t):
    soft = F.soft_threshold(x, t)
    assert torch.equal(soft, torch.sign(x) * torch.relu(x.abs() - t))
    # Moreau: prox + projection on the dual ball = identity.
    torch.testing.assert_close(soft + x.clamp(-t, t), x, rtol=0, atol=1e-14)
    assert torch.equal(soft, x - x.clamp(-t, t))
    assert not torch.signbit(soft[soft == 0]).any()  # no -0


@properties
@given(vectors)
def test_thresholds_are_odd_and_shrink(x):
    for name in ("soft", "hard", "firm"):
        threshold = THRESHOLDS[name]
        assert torch.equal(threshold(-x), -threshold(x)), name
        # Firm rounds u (|x| - l) / (u - l); the others round |x| - t at most.
        assert (threshold(x).abs() <= x.abs()).all(), name
        assert (threshold(x) * x >= 0).all(), name


@properties
@given(vectors)
def test_thresholds_are_monotone(x):
    x = x.sort().values
    for name in ("soft", "positive", "hard", "firm"):
        assert (THRESHOLDS[name](x).diff() >= -1e-14).all(), name


@properties
@given(complex_vectors, st.floats(-3, 3))
def test_complex_thresholds_commute_with_the_phase(x, angle):
    turn = torch.polar(torch.tensor(1.0).double(), torch.tensor(angle).double())
    for name in ("soft", "firm"):
        torch.testing.assert_close(THRESHOLDS[name](turn * x), turn * THRESHOLDS[name](x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["soft", "hard", "firm", "top_k", "l2_ball"])
def test_complex_without_imaginary_part_is_real(name):
    x = randn(5, 7)
    torch.testing.assert_close(MAPS[name](x + 0j), MAPS[name](x) + 0j, rtol=0, atol=1e-14)


def test_hard_keeps_or_drops():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 0.75, 3.0])
    assert F.hard_threshold(x, 0.5).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.75, 3.0]  # at the threshold: dropped
    z = randn(20, dtype=torch.complex128)
    kept = F.hard_threshold(z, 0.8)
    assert torch.equal(kept != 0, z.abs() > 0.8)
    assert torch.equal(kept[kept != 0], z[z.abs() > 0.8])


@properties
@given(vectors, st.floats(0.01, 3), st.floats(0.01, 3))
def test_firm_by_its_definition_and_limits(x, lower, gap):
    upper = lower + gap
    modulus = x.abs()
    line = x.sign() * upper * (modulus - lower) / (upper - lower)
    expected = torch.where(modulus <= lower, 0.0, torch.where(modulus <= upper, line, x))
    torch.testing.assert_close(F.firm_threshold(x, lower, upper), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(F.firm_threshold(x, lower, 1e12), F.soft_threshold(x, lower), rtol=0, atol=1e-9)
    away = torch.where((modulus - lower).abs() > 1e-6, x, 0.0)
    hard = F.hard_threshold(away, lower)
    torch.testing.assert_close(F.firm_threshold(away, lower, lower + 1e-9), hard, rtol=0, atol=1e-9)
    torch.testing.assert_close(F.firm_threshold(x, 0.0, upper), x, rtol=0, atol=1e-14)


@properties
@given(vectors, st.floats(0.01, 3), st.floats(0.01, 1))
def test_helu_by_its_published_pieces(x, t, s):
    u = x / t
    ramps = torch.where(u > 0, (u - 1 + s) / s, (u + 1 - s) / s)
    expected = t * torch.where(u.abs() <= 1 - s, 0.0, torch.where(u.abs() < 1, ramps, u))
    # The ramp is 1 / s as steep as the rounding of x / t, which may be 10 / 0.01, lets it know.
    torch.testing.assert_close(F.helu(x, t, s), expected, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(F.helu(x, t, s), F.firm_threshold(x, (1 - s) * t, t), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(F.helu(x, t, 1.0), x, rtol=1e-12, atol=1e-12)


@properties
@given(vectors | complex_vectors, thresholds)
def test_helu_without_slope_is_the_hard_threshold(x, t):
    hard = F.hard_threshold(x, t)
    assert torch.equal(F.helu(x, t, 0.0), hard)
    assert torch.equal(F.helu(x, t, torch.tensor(0.0, dtype=torch.float64)), hard)
    beside = torch.where((x.abs() - t).abs() <= 1e-6 * t, 0.0, x)  # where a ramp of that width is
    assert torch.equal(F.helu(beside, t, 1e-6), F.hard_threshold(beside, t))


@properties
@given(vectors, vectors, st.floats(0.01, 3), st.floats(0.01, 1))
def test_helu_is_continuous_and_monotone_for_any_slope(x, y, t, s):
    a, b = F.helu(x, t, s), F.helu(y, t, s)
    # Steepest on the ramp.
    assert bool(((a - b).abs() <= (x - y).abs() / s * (1 + 1e-9) + 1e-12).all())
    assert bool(((a - b) * (x - y) >= -1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_top_k_is_the_best_sparse_approximation(dtype, dim):
    x = randn(6, 9, dtype=dtype)
    for k in range(1, x.shape[dim] + 1):
        best = x.numpy().copy()
        smallest_first = np.argsort(np.abs(best), axis=dim)
        smallest = np.split(smallest_first, [x.shape[dim] - k], axis=dim)[0]
        np.put_along_axis(best, smallest, 0, axis=dim)
        answer = F.top_k_threshold(x, k, dim)
        assert torch.equal(answer, torch.from_numpy(best))
        assert ((answer != 0).sum(dim) == k).all()


def test_top_k_keeps_exactly_k_of_equals():
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [2.0, 2.0, 2.0, 3.0]])
    assert ((F.top_k_threshold(x, 3) != 0).sum(-1) == 3).all()
    assert F.top_k_threshold(x, 1)[1].tolist() == [0.0, 0.0, 0.0, 3.0]


# --- projections


def simplex_by_bisection(x: np.ndarray) -> np.ndarray:
    low, high = x.min() - 1, x.max()
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if np.maximum(x - tau, 0).sum() > 1 else (low, tau)
    return np.maximum(x - (low + high) / 2, 0)


@properties
@given(vectors)
def test_simplex_against_bisection(x):
    np.testing.assert_allclose(F.project_simplex(x).numpy(), simplex_by_bisection(x.numpy()), rtol=0, atol=1e-13)


def test_simplex_far_from_the_origin_in_float32():
    # Multiples of 1/1024 near 4096 are exact in float32, so the offset alone must cost nothing. The entries are close,
    # so that many of them are in the support and their sum is large.
    x = (randn(500) * 2).round() / 1024
    far = F.project_simplex((x + 4096).float())
    torch.testing.assert_close(far.double(), F.project_simplex(x), rtol=0, atol=1e-6)


def test_simplex_along_a_dimension():
    x = randn(4, 5, 3)
    torch.testing.assert_close(F.project_simplex(x, 1), F.project_simplex(x.movedim(1, -1)).movedim(-1, 1))
    torch.testing.assert_close(F.project_simplex(x, 0).sum(0), torch.ones(5, 3, dtype=torch.float64))


@properties
@given(vectors, vectors)
def test_projections_are_idempotent_and_firmly_nonexpansive(x, y):
    for name, project in PROJECTIONS.items():
        once = project(x)
        torch.testing.assert_close(project(once), once, rtol=0, atol=1e-14, msg=name)
        change = once - project(y)
        assert change.square().sum() <= (change * (x - y)).sum() + 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_l2_ball(dtype):
    x = randn(8, 3, 4, dtype=dtype)
    inside = F.project_l2_ball(x * 1e-3, 1.0)
    assert torch.equal(inside, x * 1e-3)
    radius = torch.linspace(0.1, 1.0, 8).double().reshape(8, 1, 1)
    on_the_sphere = F.project_l2_ball(x * 100, radius, dim=(-2, -1))
    torch.testing.assert_close(torch.linalg.vector_norm(on_the_sphere, dim=(1, 2)), radius.flatten())
    scale = (x / on_the_sphere).abs()
    torch.testing.assert_close(scale, scale[:, :1, :1].expand_as(scale))  # the direction stays
    zero = torch.zeros(3, dtype=dtype, requires_grad=True)
    F.project_l2_ball(zero, 1.0).sum().abs().backward()
    assert torch.isfinite(torch.view_as_real(zero.grad) if dtype.is_complex else zero.grad).all()


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_normalize_columns(dtype):
    D = randn(6, 10, dtype=dtype)
    unit = F.normalize_columns(D)
    assert unit.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    norms = torch.linalg.vector_norm(unit.to(torch.complex128), dim=0)
    torch.testing.assert_close(norms, torch.ones(10).double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(F.normalize_columns(unit), unit, rtol=0, atol=tolerance)


def test_normalize_columns_gradient():
    assert gradcheck(F.normalize_columns, randn(3, 4).requires_grad_())


# --- dtypes, broadcasting, gradients


@pytest.mark.parametrize(("name", "dtype"), pairs(*REAL, *COMPLEX))
def test_dtype_is_kept_and_values_are_right(name, dtype):
    x = randn(4, 6, dtype=dtype)
    answer = MAPS[name](x)
    assert answer.dtype == dtype
    double = torch.complex128 if dtype.is_complex else torch.float64
    torch.testing.assert_close(answer.to(double), MAPS[name](x.to(double)), rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("x_dtype", REAL + COMPLEX)
@pytest.mark.parametrize("threshold_dtype", REAL)
@pytest.mark.parametrize("shape", [(), (6,), (4, 1), (4, 6)])
def test_a_threshold_tensor_never_changes_the_dtype(x_dtype, threshold_dtype, shape):
    x = randn(4, 6, dtype=x_dtype)
    t = torch.full(shape, 0.5, dtype=threshold_dtype)  # 0.5 is exact in all of them
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(x_dtype).eps}
    torch.testing.assert_close(F.soft_threshold(x, t), F.soft_threshold(x, 0.5), **tolerance)
    torch.testing.assert_close(F.hard_threshold(x, t), F.hard_threshold(x, 0.5), **tolerance)
    torch.testing.assert_close(F.firm_threshold(x, t, 2 * t), F.firm_threshold(x, 0.5, 1.0), **tolerance)
    torch.testing.assert_close(F.firm_threshold(x, t, 1.0), F.firm_threshold(x, 0.5, 1.0), **tolerance)
    if not x_dtype.is_complex:
        positive = F.positive_soft_threshold(x, 0.5)
        torch.testing.assert_close(F.positive_soft_threshold(x, t), positive, **tolerance)


def test_thresholds_broadcast():
    x = randn(4, 6)
    per_column = torch.linspace(0, 1, 6).double()
    rows = torch.stack([F.soft_threshold(x[:, j], per_column[j].item()) for j in range(6)], dim=1)
    assert torch.equal(F.soft_threshold(x, per_column), rows)
    several = torch.tensor([0.1, 0.9], dtype=torch.float64).reshape(2, 1, 1)
    assert torch.equal(F.soft_threshold(x, several)[1], F.soft_threshold(x, 0.9))
    assert torch.equal(F.hard_threshold(x, several)[1], F.hard_threshold(x, 0.9))
    # A 0-d float32 x with a float64 threshold would be promoted without the conversion.
    assert F.soft_threshold(torch.tensor(1.0), torch.tensor(0.5).double()).dtype == torch.float32


@pytest.mark.parametrize(("name", "dtype"), pairs(torch.float64, torch.complex128))
def test_gradient_in_x(name, dtype):
    x = randn(3, 5, dtype=dtype, seed=1)
    kinks = torch.tensor([0.4, 1.1]).double()
    assert ((x.abs()[..., None] - kinks).abs() > 1e-4).all()  # the numeric derivative needs room
    assert gradcheck(MAPS[name], x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_in_thresholds(dtype):
    x = randn(3, 5, dtype=dtype, seed=1).requires_grad_()
    t = torch.linspace(0.1, 0.6, 5).double().requires_grad_()
    u = torch.tensor(1.1).double().requires_grad_()
    assert gradcheck(F.soft_threshold, (x, t))
    assert gradcheck(F.firm_threshold, (x, t, u))
    slope = torch.linspace(0.7, 0.9, 5).double().requires_grad_()
    ramp = (x.abs() > (1 - slope) * 2 * t) & (x.abs() < 2 * t)
    assert int(ramp.any(0).sum()) >= 3  # columns where there is a gradient
    assert gradcheck(lambda x, t, slope: F.helu(x, 2 * t, slope), (x, t, slope))
    radius = torch.tensor([[0.3], [0.5], [100.0]]).double().requires_grad_()
    assert gradcheck(F.project_l2_ball, (x, radius))
    if not dtype.is_complex:
        assert gradcheck(F.positive_soft_threshold, (x, t))


def test_second_derivative_of_complex_soft():
    x = randn(4, dtype=torch.complex128, seed=2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: F.soft_threshold(x, 0.2), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_at_the_kinks_are_zero(dtype):
    for t in (0.0, 0.5):
        x = torch.tensor([0.0, t, -t], dtype=dtype, requires_grad=True)
        threshold = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        F.soft_threshold(x, threshold).abs().sum().backward()
        assert x.grad.tolist() == [0, 0, 0]
        assert threshold.grad == 0
        x = torch.tensor([0.0, t, -t], dtype=dtype, requires_grad=True)
        F.firm_threshold(x, t, 2.0).abs().sum().backward()
        assert x.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_helu_has_finite_gradients_at_slope_0_and_a_threshold_of_any_size(dtype):
    """Its unused ramp has the slope 1 / s."""
    for t in (0.0, 1e-300, 0.5, 1e300):
        x = torch.tensor([0.0, t, -t, 2 * t, -3.0, 1e300], dtype=dtype, requires_grad=True)
        threshold, slope = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (t, 0.0))
        answer = F.helu(x, threshold, slope)
        answer.real.sum().backward()
        assert torch.equal(x.grad, (x.abs() > t).to(dtype))
        assert threshold.grad == 0 and bool(slope.grad.isfinite())


@pytest.mark.parametrize("dtype", COMPLEX)
def test_complex_subnormals_do_not_become_nan(dtype):
    tiny = torch.finfo(dtype).tiny
    x = torch.full((20,), tiny / 64 * 1j, dtype=dtype)
    x[0] = 1.0
    for name in ("soft", "firm", "hard", "helu", "l2_ball"):
        leaf = x.clone().requires_grad_()
        answer = MAPS[name](leaf)
        torch.view_as_real(answer).square().sum().backward()  # abs would have the NaN in its own gradient
        assert torch.isfinite(torch.view_as_real(answer)).all(), name
        assert torch.isfinite(torch.view_as_real(leaf.grad)).all(), name
    smallest_normal = x[0] * tiny * 2  # still exact
    torch.testing.assert_close(F.soft_threshold(smallest_normal, 0.0), smallest_normal, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["hard", "top_k"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_passes_where_kept(name, dtype):
    x = randn(3, 5, dtype=dtype).requires_grad_()
    answer = MAPS[name](x)
    upstream = randn(3, 5, dtype=dtype, seed=1)
    (gradient,) = torch.autograd.grad(answer, x, upstream)
    assert torch.equal(gradient, torch.where(answer != 0, upstream, 0.0))


@pytest.mark.parametrize("name", ["soft", "positive", "hard", "helu", "top_k", "firm"])
def test_nan_is_not_swallowed(name):
    x = torch.tensor([math.nan, 0.1, 2.0])
    assert torch.isnan(THRESHOLDS[name](x)).tolist() == [True, False, False]
    assert THRESHOLDS[name](torch.tensor([math.inf, 0.1]))[0] == math.inf


# --- transforms


@pytest.mark.parametrize("name", MAPS)
def test_vmap_and_func_grad(name):
    x = randn(4, 5)
    torch.testing.assert_close(torch.vmap(MAPS[name])(x), MAPS[name](x))

    def loss(x):
        return MAPS[name](x).square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), leaf.grad)


def test_vmap_over_thresholds():
    x, t = randn(4, 5), torch.linspace(0.1, 1, 4).double()
    torch.testing.assert_close(torch.vmap(F.soft_threshold)(x, t), F.soft_threshold(x, t[:, None]))
    torch.testing.assert_close(torch.vmap(F.hard_threshold)(x, t), F.hard_threshold(x, t[:, None]))


@pytest.mark.parametrize("name", MAPS)
def test_compile(name):
    x = randn(4, 5).requires_grad_()
    compiled = torch.compile(MAPS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), MAPS[name](x))
    (expected,) = torch.autograd.grad(MAPS[name](x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)


def test_compile_with_learned_threshold():
    x, t = randn(4, 5), torch.rand(5).double().requires_grad_()
    compiled = torch.compile(F.soft_threshold, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(F.soft_threshold(x, t).square().sum(), t)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, t).square().sum(), t)[0], expected)


@pytest.mark.parametrize("name", MAPS)
def test_export(name):
    class Net(torch.nn.Module):
        def forward(self, x):
            return MAPS[name](x)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Net(), (randn(4, 5),), dynamic_shapes={"x": {0: batch}})
    x = randn(7, 5)
    torch.testing.assert_close(program.module()(x), MAPS[name](x))


@pytest.mark.parametrize("name", MAPS)
def test_autocast_stays_finite(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = randn(4, 5, dtype=torch.float32) @ randn(5, 5, dtype=torch.float32)
        answer = MAPS[name](x)
    assert x.dtype == torch.bfloat16
    assert torch.isfinite(answer).all()
    if name in THRESHOLDS:
        assert answer.dtype == torch.bfloat16


# --- operator norm


def dense(A: torch.Tensor, **options) -> torch.Tensor:
    like = torch.empty(A.shape[-1], dtype=A.dtype)
    return F.operator_norm(lambda x: A @ x, lambda y: A.mH @ y, like, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(30, 60), (60, 30), (40, 40), (1, 7), (7, 1)])
def test_operator_norm_of_matrices(dtype, shape):
    A = randn(*shape, dtype=dtype)
    norm = dense(A)
    expected = torch.linalg.matrix_norm(A, ord=2)
    assert norm.dtype == TO_REAL.get(dtype, dtype)
    assert norm.shape == ()
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    assert norm <= expected * (1 + 4 * torch.finfo(dtype).eps)
    assert torch.equal(norm, dense(A))  # the start is fixed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operator_norm_in_half_precision(dtype):
    A = randn(10, 20, dtype=dtype)
    norm = dense(A, num_iters=50)
    assert norm.dtype == dtype
    torch.testing.assert_close(norm.double(), torch.linalg.matrix_norm(A.double(), ord=2), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_operator_norm_approaches_from_below(dtype):
    A = randn(20, 30, dtype=dtype)
    norms = torch.stack([dense(A, num_iters=n, tol=0.0) for n in (1, 2, 4, 8, 16, 32, 1000)])
    assert (norms.diff() >= -1e-12).all()
    assert (norms <= torch.linalg.matrix_norm(A, ord=2) * (1 + 1e-14)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(5, 4), (4, 5)])
def test_operator_norm_gradient(dtype, shape):
    A = randn(*shape, dtype=dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(dense(A, tol=1e-11), A)
    (expected,) = torch.autograd.grad(torch.linalg.matrix_norm(A, ord=2), A)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)
    assert gradcheck(lambda A: dense(A, tol=1e-11), A, atol=1e-5)


def test_operator_norm_of_a_convolution():
    # Periodic, so that the singular values are the moduli of the transfer function, of images without a batch.
    kernel = torch.zeros(8, 8, dtype=torch.float64)
    kernel[:3, :3] = randn(3, 3)
    transfer = torch.fft.fft2(kernel)
    norm = F.operator_norm(
        lambda x: torch.fft.ifft2(torch.fft.fft2(x) * transfer).real,
        lambda y: torch.fft.ifft2(torch.fft.fft2(y) * transfer.conj()).real,
        torch.empty(8, 8, dtype=torch.float64),
    )
    torch.testing.assert_close(norm, transfer.abs().max(), rtol=1e-6, atol=0)


def test_operator_norm_stops_by_tolerance():
    A = torch.diag(torch.tensor([3.0, 1.0, 0.5]).double())
    calls, graphs = [], []

    def forward(x):
        calls.append(x)
        graphs.append(torch.is_grad_enabled())
        return A @ x

    def iterations(tol: float) -> int:
        calls.clear()
        graphs.clear()
        F.operator_norm(forward, lambda y: A.T @ y, torch.empty(3).double(), tol=tol, num_iters=40)
        return len(calls) - 1  # the last call is for the gradient

    assert iterations(1e-3) < iterations(1e-9) < iterations(0.0) <= 40
    assert torch.linalg.vector_norm(calls[-1]) == pytest.approx(1)
    assert graphs.index(True) == len(graphs) - 1  # only the last one has a graph


def test_operator_norm_of_zero_is_zero_with_finite_gradient():
    A = torch.zeros(3, 4, requires_grad=True)
    norm = dense(A)
    norm.backward()
    assert norm == 0
    assert torch.isfinite(A.grad).all()


def test_operator_norm_under_transforms():
    A = randn(3, 6, 4)
    expected = torch.linalg.matrix_norm(A, ord=2)
    fixed = functools.partial(dense, num_iters=200)
    torch.testing.assert_close(torch.vmap(fixed)(A), expected, rtol=1e-9, atol=0)
    leaf = A.clone().requires_grad_()
    torch.linalg.matrix_norm(leaf, ord=2).sum().backward()
    torch.testing.assert_close(torch.vmap(torch.func.grad(fixed))(A), leaf.grad, rtol=0, atol=1e-6)
    compiled = torch.compile(functools.partial(dense, num_iters=20), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A[0]), dense(A[0], num_iters=20, tol=0.0))


# --- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: F.soft_threshold(x, -0.1), ValueError, "threshold must be at least 0"),
        (lambda x: F.soft_threshold(x, math.nan), ValueError, "threshold must be finite"),
        (lambda x: F.soft_threshold(x, "0.1"), TypeError, "threshold must be a real number"),
        (lambda x: F.soft_threshold(x, torch.tensor(1j)), TypeError, "threshold must be real"),
        (lambda x: F.soft_threshold([1.0], 0.1), TypeError, "x must be a torch.Tensor"),
        (lambda x: F.soft_threshold(x.int(), 0.1), TypeError, "x must be floating point or complex"),
        (lambda x: F.positive_soft_threshold(x, -1), ValueError, "threshold must be at least 0"),
        (lambda x: F.positive_soft_threshold(x + 0j, 1), TypeError, "x must be floating point"),
        (lambda x: F.hard_threshold(x, -1), ValueError, "threshold must be at least 0"),
        (lambda x: F.hard_threshold(x.bool(), 1), TypeError, "x must be floating point"),
        (lambda x: F.helu(x, -1, 0.2), ValueError, "threshold must be at least 0"),
        (lambda x: F.helu(x, 1, -0.1), ValueError, "slope must be at least 0"),
        (lambda x: F.helu(x, 1, 1.5), ValueError, "slope must be at most 1, got 1.5"),
        (lambda x: F.helu(x.int(), 1, 0.5), TypeError, "x must be floating point"),
        (lambda x: F.firm_threshold(x, -1, 1), ValueError, "lower must be at least 0"),
        (lambda x: F.firm_threshold(x, 1, 1), ValueError, "upper must be greater than 1.*hard_threshold"),
        (lambda x: F.firm_threshold(x, 1, math.inf), ValueError, "upper must be finite"),
        (lambda x: F.top_k_threshold(x, 0), ValueError, "k must be at least 1"),
        (lambda x: F.top_k_threshold(x, 4), ValueError, "k must be at most 3, the size of dimension -1"),
        (lambda x: F.top_k_threshold(x, 1.0), TypeError, "k must be an int"),
        (lambda x: F.top_k_threshold(x, 1, dim=2), ValueError, "dim must be from -2 to 1"),
        (lambda x: F.project_simplex(x, dim=-3), ValueError, "dim must be from -2 to 1"),
        (lambda x: F.project_simplex(x + 0j), TypeError, "x must be floating point"),
        (lambda x: F.project_l2_ball(x, 0.0), ValueError, "radius must be greater than 0"),
        (lambda x: F.project_l2_ball(x, 1.0, dim=(0, 5)), ValueError, "dim must be from -2 to 1"),
        (lambda x: F.normalize_columns(x[0]), ValueError, "dictionary must be a matrix"),
        (lambda x: F.normalize_columns(x * torch.tensor([1.0, 0.0, 1.0])), ValueError, "dictionary has 1 zero atoms"),
        (lambda x: dense(x, num_iters=0), ValueError, "num_iters must be at least 1"),
        (lambda x: dense(x, tol=-1.0), ValueError, "tol must be at least 0"),
        (
            lambda x: F.operator_norm(lambda v: x @ v, lambda y: y, torch.empty(3)),
            ValueError,
            r"adjoint\(forward\(x\)\) must be like x, .*\(3,\), got .*\(2,\)",
        ),
        (lambda x: F.operator_norm(torch.fft.fft, torch.fft.ifft, x[0]), ValueError, "real part for real x"),
        (lambda x: F.operator_norm(torch.neg, torch.neg, x.int()), TypeError, "like must be floating point"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("learned", [False, True])
def test_soft_in_place_gives_the_same(dtype, learned):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, dtype=dtype, generator=generator)
    t = torch.rand(7, generator=generator).to(x.real.dtype).requires_grad_(learned)
    expected = F.soft_threshold(x, t)
    kept = x.clone()
    found = F.soft_threshold(x, t, inplace=True)
    assert torch.equal(found, expected)
    if learned or dtype.is_complex:
        assert torch.equal(x, kept), "with a gradient nothing is overwritten"
    else:
        assert found is x
