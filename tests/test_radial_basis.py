"""Radial basis functions by table: the sum itself, gradients, both paths, ends, and what is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrolled.functional import soft_threshold
from unrolled.shrinkage.radial_basis import RadialBasis, _interpolated, _solve


def bump(x):
    return x * torch.exp(-((x / 67.5) ** 4) / 2)


def wild(num_channels=3, dtype=torch.float64, **options):
    """Curves with weights of both signs, in grey levels."""
    shrink = RadialBasis(num_channels, -3, radius=310.0, curve=bump, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        shrink.weight += 10 * torch.randn(shrink.weight.shape, generator=generator, dtype=torch.float64)
    return shrink.to(dtype)


def responses(*shape, dtype=torch.float64, scale=150.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def the_sum(shrink, x):
    """Gaussian by Gaussian, from the formula."""
    centres = torch.linspace(-shrink.radius, shrink.radius, shrink.num_knots, dtype=x.dtype)
    out = torch.zeros_like(x)
    for j, centre in enumerate(centres):
        weight = shrink.weight[:, j].reshape(-1, *(1,) * (-1 - shrink.channel_dim))
        out = out + weight * torch.exp(-((x - centre) ** 2) / (2 * shrink.width**2))
    return out


@pytest.mark.parametrize(("samples", "share"), [(50, 2e-4), (20, 1e-3), (10, 4e-3)])
def test_the_table_is_close_to_the_sum(samples, share):
    shrink = wild(samples=samples)
    x = responses(2, 3, 60, 60)
    exact = the_sum(shrink, x).detach()
    # The error of linear interpolation is h^2 max |phi''| / 8 with h = gamma / samples.
    assert (shrink(x) - exact).abs().max() <= share * (exact.max() - exact.min())
    torch.testing.assert_close(shrink.exact(x), exact, rtol=0, atol=1e-10, check_dtype=True)


def test_single_precision_is_as_close():
    shrink = wild(dtype=torch.float32)
    x = responses(2, 3, 60, 60)
    exact = the_sum(wild(), x).detach()
    assert (shrink(x.float()) - exact).abs().max() <= 2e-4 * (exact.max() - exact.min())


def test_gradients():
    shrink = wild(num_channels=2)
    x = responses(2, 2, 4, 5).requires_grad_()

    def call(x, weight):
        return torch.func.functional_call(shrink, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(call, (x, shrink.weight.detach().requires_grad_()))


def test_gradients_of_the_weights_are_close_to_those_of_the_sum():
    shrink = wild()
    x = responses(2, 3, 40, 40)
    upstream = responses(2, 3, 40, 40, scale=1.0).flip(0)
    (ours,) = torch.autograd.grad((shrink(x) * upstream).sum(), shrink.weight)
    (exact,) = torch.autograd.grad((the_sum(shrink, x) * upstream).sum(), shrink.weight)
    torch.testing.assert_close(ours, exact, rtol=0, atol=2e-4 * float(exact.abs().max()))


def test_both_paths_agree():
    shrink = wild()
    x = responses(2, 3, 9, 8).requires_grad_()
    upstream = responses(2, 3, 9, 8, scale=1.0)
    table = shrink.table()
    first = shrink.per_channel(torch.arange(3, dtype=torch.int32) * table.shape[1])
    plain = _interpolated(x, table, shrink._start, shrink.samples / shrink.width, first)
    torch.testing.assert_close(shrink(x), plain, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(plain, (x, shrink.weight), upstream)
    torch.testing.assert_close(torch.autograd.grad(shrink(x), (x, shrink.weight), upstream), wanted, rtol=0, atol=1e-11)
    # Gradients that are not contiguous, and under vmap.
    turned = torch.autograd.grad(shrink(x).mT, (x, shrink.weight), upstream.mT)
    torch.testing.assert_close(turned, wanted, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.vmap(shrink)(x), plain, rtol=0, atol=1e-12)
    by_func = torch.func.grad(lambda x: (shrink(x) * upstream).sum())(x.detach())
    torch.testing.assert_close(by_func, wanted[0], rtol=0, atol=1e-11)


def test_beyond_the_table_all_is_zero():
    shrink = wild(num_channels=2, dtype=torch.float32)
    far = torch.tensor([-1e30, -1e6, -371.0, 371.0, 1e6, 1e30]).reshape(1, 1, 1, -1).repeat(1, 2, 1, 1).requires_grad_()
    out = shrink(far)
    assert torch.equal(out, torch.zeros_like(out))
    for_x, for_weight = torch.autograd.grad(out.sum(), (far, shrink.weight))
    assert not for_x.any() and not for_weight.any()
    # A channel does not read its neighbour's table: the last entries of one lie next to the first of the other.
    with torch.no_grad():
        shrink.weight[1] += 1000
    assert torch.equal(shrink(far)[:, 0], out[:, 0])
    assert torch.isnan(shrink(torch.full((1, 2, 1, 1), torch.nan))).all()


def test_a_second_derivative_is_refused():
    x = responses(1, 3, 2, 2).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(wild()(x).sum(), x, create_graph=True)
    (slope,) = torch.autograd.grad(wild().exact(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(slope.sum(), x)[0].any()


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 100.0), st.integers(0, 1000))
def test_thresholds_are_units(threshold, seed):
    shrink = RadialBasis(dtype=torch.float64)
    x = 3 * torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(shrink(threshold * x, threshold), threshold * shrink(x), rtol=1e-9, atol=1e-12)


def test_it_starts_near_the_soft_threshold():
    x = torch.linspace(-9, 9, 500, dtype=torch.float64)
    # The kink is rounded off over a width, a third of a threshold.
    found = RadialBasis(dtype=torch.float64)(x)
    torch.testing.assert_close(found, soft_threshold(x, 1.0), rtol=0, atol=0.06)


def test_alike_in_every_bit():
    first, second = (RadialBasis(4, -3, radius=310.0, curve=bump) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    twin = copy.deepcopy(wild())
    x = responses(1, 3, 5, 5)
    assert torch.equal(twin(x), wild()(x))
    assert set(twin.state_dict()) == {"weight"}


def test_the_system_is_solved():
    root = torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = root @ root.T + torch.eye(20, dtype=torch.float64)
    values = root[:, 0]
    torch.testing.assert_close(_solve(matrix, values), torch.linalg.solve(matrix, values))


def test_on_the_meta_device():
    shrink = RadialBasis(5, -3, device="meta")
    assert shrink(torch.empty(2, 5, 3, 3, device="meta")).shape == (2, 5, 3, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_knots": 1}, ValueError, "num_knots must be at least 2"),
        ({"radius": 0.0}, ValueError, "radius must be greater than 0"),
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"curve": 3}, TypeError, "curve must be a function"),
        ({"num_channels": 2.0}, TypeError, "num_channels must be an int"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        RadialBasis(**options)


def test_bad_input_is_refused():
    shrink = RadialBasis(3, -3)
    with pytest.raises(ValueError, match="3 channels in dimension -3"):
        shrink(torch.zeros(2, 4, 5, 5))
    with pytest.raises(TypeError, match="x is torch.float64 but the weights are torch.float32"):
        shrink(torch.zeros(3, 5, 5).double())
    with pytest.raises(TypeError, match="x must be floating point, got torch.complex64"):
        shrink(torch.zeros(3, 5, 5, dtype=torch.complex64))
