"""Learned shrinkages: the generalised threshold against brute force, its derivatives and limits, and the protocol."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrolled import LISTA, Step, Unroll
from unrolled.functional import firm_threshold, generalized_threshold, hard_threshold, soft_threshold
from unrolled.shrinkage import GeneralizedShrinkage, PiecewiseLinear, Shrinkage, SoftThreshold

DICTIONARY = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def brute_force(x, t, p, finest=2e-5):
    """argmin over a grid; the penalty is 0 at 0."""
    z = torch.arange(0, 4, finest, dtype=torch.float64)
    penalty = t * torch.where(z > 0, z.clamp(min=1e-300) ** p, 0.0)
    return torch.stack([z[((z - v) ** 2 / 2 + penalty).argmin()] for v in x.abs()]) * x.sign()


def tau(t, p):
    """Where the threshold jumps, from the two equations of the paper."""
    z = (2 * t * (1 - p)) ** (1 / (2 - p))
    return z + t * p * z ** (p - 1)


# ---- The function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [-1.0, -0.5, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("t", [0.02, 0.5])
def test_generalized_threshold_is_the_minimum(p, t):
    x = torch.linspace(-3, 3, 62, dtype=torch.float64)  # no entry is at the jump
    found = generalized_threshold(x, t, p)
    torch.testing.assert_close(found, brute_force(x, t, p), rtol=0, atol=2e-5)
    torch.testing.assert_close(generalized_threshold(x.float(), t, p).double(), found, rtol=0, atol=2e-6)
    jump = tau(t, p)
    near = torch.tensor([jump * (1 - 1e-9), jump * (1 + 1e-9)], dtype=torch.float64)
    assert generalized_threshold(near, t, p)[0] == 0 != generalized_threshold(near, t, p)[1]


@pytest.mark.parametrize("p", [-1.0, -0.3, 0.3, 0.8, 0.95])
def test_the_root_is_exact_right_from_the_jump(p):
    x = tau(0.3, p) * torch.logspace(1e-9, 3, 100, dtype=torch.float64)
    z = generalized_threshold(x, 0.3, p)
    torch.testing.assert_close(z + 0.3 * p * z ** (p - 1), x, rtol=1e-12, atol=0)


def test_the_limits_are_the_soft_and_the_hard_threshold():
    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(generalized_threshold(x, 0.3, 1.0), soft_threshold(x, 0.3), rtol=0, atol=1e-15)
    torch.testing.assert_close(generalized_threshold(x, 0.3, 0.0), hard_threshold(x, 0.6**0.5), rtol=0, atol=1e-15)
    assert torch.equal(generalized_threshold(x, 0.0, -0.5), x)
    complex_x = torch.polar(x.abs(), torch.linspace(0, 6, 100, dtype=torch.float64))
    z = generalized_threshold(complex_x, 0.3, 0.5)
    torch.testing.assert_close(z.abs(), generalized_threshold(x.abs(), 0.3, 0.5))
    torch.testing.assert_close(z[z != 0].angle(), complex_x[z != 0].angle())


number = st.floats(-4, 4, allow_subnormal=False)


@settings(deadline=None, max_examples=40)
@given(number, number, st.floats(0.001, 1), st.floats(-1, 1))
def test_odd_monotone_and_for_positive_p_shrinking(a, b, t, p):
    low, high = sorted((a, b))
    x = torch.tensor([low, high], dtype=torch.float64)
    z = generalized_threshold(x, t, p)
    assert torch.equal(generalized_threshold(-x, t, p), -z)
    assert z[0] <= z[1] + 1e-12
    kept = z != 0
    assert bool((z.abs() <= x.abs() + 1e-12).all() if p >= 0 else (z.abs() >= x.abs() - 1e-12)[kept].all())


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 100), st.floats(-1, 1))
def test_units_do_not_matter(scale, p):
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)
    z = generalized_threshold(scale * x, scale ** (2 - p) * 0.2, p)
    torch.testing.assert_close(z, scale * generalized_threshold(x, 0.2, p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", [-1.0, -0.4, 0.0, 0.5, 1.0])
def test_derivatives(p):
    x = torch.tensor([-2.0, -0.9, 0.1, 0.95, 3.0], dtype=torch.float64, requires_grad=True)
    t = torch.full((5,), 0.2, dtype=torch.float64, requires_grad=True)
    q = torch.tensor(p, dtype=torch.float64, requires_grad=True)  # at the ends the formula goes on
    assert torch.autograd.gradcheck(lambda x, t: generalized_threshold(x, t, p), (x, t))
    if abs(p) < 1:
        assert torch.autograd.gradcheck(generalized_threshold, (x, t, q))
    (slope,) = torch.autograd.grad(generalized_threshold(x, t, q).sum(), q)
    assert slope.isfinite() and slope != 0


@pytest.mark.parametrize("p", [-1.0, -1e-7, 0.0, 1e-7, 0.5, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_safe_at_the_threshold_and_in_the_limits(p, dtype):
    for t in (0.0, 1e-12, 1e-4, 1.0):
        jump = tau(t, p) if t > 0 and p < 1 else t
        x = torch.tensor([0.0, jump, jump * (1 - 1e-6), jump * (1 + 1e-6), 1e-30, 5.0], dtype=dtype)
        x = torch.cat((x, -x)).requires_grad_()
        log_t = torch.tensor(t, dtype=dtype).log().clamp(min=-80).requires_grad_()
        q = torch.tensor(p, dtype=dtype, requires_grad=True)
        z = generalized_threshold(x, log_t.exp(), q)
        slopes = torch.autograd.grad(z.sum(), (x, log_t, q))
        assert z.isfinite().all() and all(slope.isfinite().all() for slope in slopes)
        assert (slopes[0] >= 0).all() and (slopes[0] <= 2 + 1e-3).all()  # 1 / (1 - p / 2) at most


def test_no_second_derivative_is_pretended():
    x = torch.ones(3, requires_grad=True)
    (slope,) = torch.autograd.grad(generalized_threshold(x, 0.1, 0.5).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(slope.sum(), x)


def test_transforms_and_compilation():
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t, p = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.tensor(0.4).double()

    def total(x, t, p):
        return generalized_threshold(x, t, p).square().sum()

    each = torch.vmap(torch.func.grad(total, (0, 1, 2)), (0, None, None))(x, t, p)
    variables = [v.clone().requires_grad_() for v in (x, t, p)]
    whole = torch.autograd.grad(total(*variables), variables)
    torch.testing.assert_close(each[0], whole[0])
    torch.testing.assert_close(each[1].sum(0), whole[1])
    torch.testing.assert_close(each[2].sum(0), whole[2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2), -0.1, 0.5), ValueError, "threshold must be at least 0"),
        ((torch.ones(2), 0.1, 1.5), ValueError, "p must be at most 1, got 1.5"),
        ((torch.ones(2), 0.1, -2.0), ValueError, "p must be at least -1, got -2"),
        ((torch.ones(2, dtype=torch.long), 0.1, 0.5), TypeError, "x must be floating point"),
        ((torch.ones(2), 0.1, torch.tensor(1j)), TypeError, "p must be real"),
    ],
)
def test_bad_arguments_of_the_function(arguments, error, message):
    with pytest.raises(error, match=message):
        generalized_threshold(*arguments)


# ---- The modules -----------------------------------------------------------------------------------------------------

SHRINKAGES = [
    SoftThreshold(),
    SoftThreshold(0.5, num_channels=3, channel_dim=-2),
    GeneralizedShrinkage(0.3),
    GeneralizedShrinkage(-1.0, 0.1, num_channels=3, channel_dim=-2),
    PiecewiseLinear(),
    PiecewiseLinear(4, 2, num_channels=3, channel_dim=-2),
]


@pytest.mark.parametrize("shrink", SHRINKAGES, ids=repr)
def test_every_shrinkage_is_odd_in_units_of_its_threshold_and_learns(shrink):
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    out = shrink(x, 0.4)
    assert out.shape == x.shape and out.dtype == x.dtype
    torch.testing.assert_close(shrink(-x, 0.4), -out)
    torch.testing.assert_close(shrink(x, torch.full((50,), 0.4)), out)
    out.square().sum().backward()
    for parameter in shrink.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any()
    shrink.zero_grad()
    each = torch.stack([shrink(sample, 0.4) for sample in x])
    torch.testing.assert_close(torch.vmap(lambda sample: shrink(sample, 0.4))(x), each)


def test_what_they_start_as():
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    for shrink in (SoftThreshold(), PiecewiseLinear(), GeneralizedShrinkage(1.0)):
        torch.testing.assert_close(shrink.double()(x, 0.7), soft_threshold(x, 0.7), rtol=0, atol=1e-14)
    found = GeneralizedShrinkage(-0.4, 0.5, dtype=torch.float64)(x, 0.7)
    torch.testing.assert_close(found, generalized_threshold(x, 0.35, -0.4), rtol=0, atol=1e-14)
    z = torch.polar(x.abs(), x)
    torch.testing.assert_close(PiecewiseLinear(dtype=torch.float64)(z, 0.7), soft_threshold(z, 0.7))


def test_a_curve_a_channel():
    shrink = PiecewiseLinear(4, 2, num_channels=2, channel_dim=-3, dtype=torch.float64)
    with torch.no_grad():
        shrink.heights[1] = torch.tensor([1.0, 3.0, 0.0, 2.0])
    x = torch.linspace(-3, 3, 25, dtype=torch.float64).reshape(1, 5, 5).expand(2, 5, 5)
    out = shrink(x, 2.0)
    torch.testing.assert_close(out[0], soft_threshold(x[0], 2.0))
    # Knots at 0, 1, 2, 3, 4 (in units of 2: 0 to 2 by halves), heights twice as large.
    places, heights = torch.arange(5.0).double(), torch.tensor([0.0, 2.0, 6.0, 0.0, 4.0]).double()
    k = x[1].abs().floor().long()
    expected = heights[k] + (x[1].abs() - places[k]) * (heights[k + 1] - heights[k])
    torch.testing.assert_close(out[1], expected * x[1].sign())


def test_nan_and_huge_entries_pass_through_the_table():
    out = PiecewiseLinear()(torch.tensor([float("nan"), 1e30, -1e30]))
    assert out[0].isnan() and torch.equal(out[1:], torch.tensor([1e30, -1e30]))


@settings(deadline=None, max_examples=30)
@given(st.floats(-20, 20))
def test_the_exponent_stays_in_bounds_whatever_is_learned(raw):
    shrink = GeneralizedShrinkage(0.5, dtype=torch.float64)
    with torch.no_grad():
        shrink.raw_p.fill_(raw)
    assert -1 <= shrink.p <= 1
    (slope,) = torch.autograd.grad(shrink.p.sum(), shrink.raw_p)
    assert slope.abs() == 1, "also at the ends"


def test_an_exponent_at_its_end_learns():
    shrink = GeneralizedShrinkage(-1.0, 0.1)
    x = torch.linspace(-2, 2, 100)
    target = GeneralizedShrinkage(0.6, 0.1)(x).detach()
    optimizer = torch.optim.Adam(shrink.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (shrink(x) - target).square().sum().backward()
        optimizer.step()
    assert abs(shrink.p.item() - 0.6) < 0.05 and abs(shrink.weight.item() - 0.1) < 0.01


def test_any_module_of_the_protocol_works_in_any_step():
    class Firm(Shrinkage):
        def __init__(self):
            super().__init__()
            self.log_ratio = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x, threshold=1.0):
            return firm_threshold(x, threshold, (1 + self.per_channel(self.log_ratio).exp()) * threshold)

    class Landweber(Step):
        def __init__(self, shrinkage):
            super().__init__()
            self.shrinkage = shrinkage

        def init(self, y):
            return y.new_zeros(len(y), 10)

        def forward(self, x, y):
            return self.shrinkage(x + 0.05 * (y - x @ DICTIONARY.T) @ DICTIONARY, 0.05)

    y = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for shrinkage in (Firm(), *(kind(dtype=torch.float64) for kind in (SoftThreshold, PiecewiseLinear))):
        net = Unroll(Landweber(shrinkage), 3)
        net(y).square().sum().backward()
        assert all(parameter.grad.any() for parameter in net.parameters())
        assert (net(y) == 0).any()
        assert LISTA(DICTIONARY, 2, alpha=0.1, shrinkage=shrinkage)(y).isfinite().all()


def test_lista_without_a_shrinkage_is_as_it_was():
    net = LISTA(DICTIONARY, 3, alpha=0.2)
    assert set(net.state_dict()) == {f"steps.{k}.{n}" for k in range(3) for n in ("weight", "log_theta", "inhibition")}
    other = LISTA(DICTIONARY, 3, alpha=0.2, shrinkage=PiecewiseLinear(dtype=torch.float64))
    y = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(other(y), net(y), rtol=0, atol=1e-14)
    assert len({step.shrinkage for step in other.steps}) == 3, "a shrinkage a layer"
    shared = LISTA(DICTIONARY, 3, alpha=0.2, shrinkage=PiecewiseLinear(), tied=("shrinkage",))
    assert len({step.shrinkage.heights for step in shared.steps}) == 1


def test_meta_device_and_repr():
    for shrink in (SoftThreshold(device="meta"), GeneralizedShrinkage(device="meta"), PiecewiseLinear(device="meta")):
        assert all(parameter.is_meta for parameter in shrink.parameters())
    assert repr(GeneralizedShrinkage(-0.5, 0.1, num_channels=3)) == (
        "GeneralizedShrinkage(p=-0.5, weight=0.1, num_channels=3, channel_dim=-1)"
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SoftThreshold(0.0), ValueError, "weight must be greater than 0"),
        (lambda: GeneralizedShrinkage(1.2), ValueError, "p must be at most 1, got 1.2"),
        (lambda: GeneralizedShrinkage(-1.2), ValueError, "p must be at least -1"),
        (lambda: GeneralizedShrinkage(0.5, -1.0), ValueError, "weight must be greater than 0"),
        (lambda: PiecewiseLinear(10, 6), ValueError, "num_knots must be a multiple of reach=6"),
        (lambda: PiecewiseLinear(2, 1), ValueError, "reach must be at least 2"),
        (lambda: SoftThreshold(num_channels=0), ValueError, "num_channels must be at least 1"),
        (lambda: SoftThreshold(num_channels=3, channel_dim=1), ValueError, "channel_dim must be negative"),
        (lambda: SoftThreshold(num_channels=3)(torch.ones(4)), ValueError, "x must have 3 channels in dimension -1"),
        (lambda: PiecewiseLinear()(torch.ones(4), 0.0), ValueError, "threshold must be greater than 0"),
        (lambda: GeneralizedShrinkage()(torch.ones(4, dtype=torch.int)), TypeError, "x must be floating point"),
        (lambda: LISTA(DICTIONARY, alpha=0.1, shrinkage=torch.relu), TypeError, "shrinkage must be an unrolled"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
