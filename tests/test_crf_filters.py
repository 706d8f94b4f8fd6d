"""Gaussian filters: against brute force, linear, adjoint, normalised, differentiable where they say so."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrolled.crf import ConvWindow, Exact, GaussianFilter, Normalization, Permutohedral, SeparableSpatial
from unrolled.crf.filters import grid

FILTERS = [Exact(), Exact(chunk=7), ConvWindow(5), ConvWindow(3, dilation=2), SeparableSpatial(), Permutohedral()]
every_filter = pytest.mark.parametrize("filter", FILTERS, ids=repr)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features_for(filter, shape, batch=2, seed=0):
    """Positions for the separable filter, positions and two more for the others."""
    position = grid(shape, torch.zeros((), dtype=torch.float64)) / 2.5
    if isinstance(filter, SeparableSpatial):
        return position
    return torch.cat([position.expand(batch, *shape, -1), 0.7 * randn(batch, *shape, 2, seed=seed)], dim=-1)


def brute_force(features, values, reach=None, dilation=1):
    """Pixel by pixel, in Python; `reach` limits how far a pixel sees, in steps of `dilation`."""
    out = torch.zeros_like(values)
    places = list(itertools.product(*map(range, values.shape[1:-1])))
    for b in range(len(values)):
        f, v = features[b if len(features) > 1 else 0], values[b]
        for p, q in itertools.product(places, places):
            gaps = [abs(i - j) for i, j in zip(p, q)]
            if reach is None or all(gap <= reach and gap % dilation == 0 for gap in gaps):
                out[(b, *p)] += math.exp(-0.5 * float(((f[p] - f[q]) ** 2).sum())) * v[q]
    return out


@every_filter
@pytest.mark.parametrize("shape", [(9,), (4, 5), (3, 2, 3)])
def test_against_brute_force(filter, shape):
    features, values = features_for(filter, shape), randn(2, *shape, 3, seed=5)
    out = filter.prepare(features)(values)
    if isinstance(filter, Permutohedral):
        ones = torch.ones(2, *shape, 1, dtype=torch.float64)
        out = Normalization.AFTER.apply(filter.prepare(features), ones)(values)
        expected = brute_force(features, values) / brute_force(features, ones)
        assert (out - expected).norm() < 0.3 * expected.norm()  # a random cloud of few points is hard; see below
        return
    window = (filter.size // 2 * filter.dilation, filter.dilation) if isinstance(filter, ConvWindow) else (None, 1)
    torch.testing.assert_close(out, brute_force(features, values, *window), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("bandwidth", "color", "signal", "limit"),
    [
        (20.0, 20.0, "noise", 0.12),
        (20.0, 20.0, "blocks", 0.12),
        (40.0, 10.0, "noise", 0.12),
        (40.0, 10.0, "blocks", 0.12),
        (3.0, None, "noise", 0.01),
        (3.0, None, "blocks", 0.03),  # edges show the lattice's kernel, which is no Gaussian; noise averages it out
        (8.0, None, "noise", 0.01),
        (8.0, None, "blocks", 0.03),
    ],
)
def test_the_lattice_is_near_the_gaussian(bandwidth, color, signal, limit):
    """The accuracy that the documentation names, on an image with texture and edges."""
    H, W = 40, 60
    position = grid((H, W), torch.zeros((), dtype=torch.float64))
    x, y = position[0].unbind(-1)
    image = torch.stack([128 + 60 * (x / 9).sin(), 128 + 60 * (y / 7).cos(), 255.0 * (x + y > 50)], dim=-1)
    image = (image + 8 * randn(H, W, 3)).clamp(0, 255)
    features = position / bandwidth
    if color is not None:
        features = torch.cat([features, image[None] / color], dim=-1)
    if signal == "noise":
        values = torch.rand(1, H, W, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    else:
        values = torch.nn.functional.one_hot((x // 20 + y // 20).long() % 3, 3)[None].double()
    ones = torch.ones(1, H, W, 1, dtype=torch.float64)
    lattice, exact = (Normalization.AFTER.apply(f.prepare(features), ones)(values) for f in (Permutohedral(), Exact()))
    assert (lattice - exact).norm() <= limit * exact.norm()


@every_filter
@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    channels=st.integers(1, 4),
    seed=st.integers(0, 99),
    how=st.sampled_from(Normalization),
)
def test_linear_and_adjoint(filter, shape, channels, seed, how):
    features = features_for(filter, shape, seed=seed)
    ones = torch.ones(len(features), *shape, 1, dtype=torch.float64)
    plan = how.apply(filter.prepare(features), ones)
    u, v, w = (randn(2, *shape, channels, seed=seed + k) for k in (1, 2, 3))
    torch.testing.assert_close(plan(2 * u - 3 * v), 2 * plan(u) - 3 * plan(v), rtol=0, atol=1e-10)
    torch.testing.assert_close((plan(u) * w).sum(), (u * plan.adjoint(w)).sum(), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(plan(u.requires_grad_()), u, w)
    torch.testing.assert_close(gradient, plan.adjoint(w), rtol=0, atol=1e-10)
    if how is Normalization.AFTER:
        constant = torch.full((2, *shape, channels), 1.5, dtype=torch.float64)
        torch.testing.assert_close(plan(constant), constant, rtol=0, atol=1e-12)


@every_filter
@pytest.mark.parametrize("how", Normalization)
def test_gradients(filter, how):
    features, values = features_for(filter, (3, 4)), randn(2, 3, 4, 2, seed=5).requires_grad_()
    ones = torch.ones(len(features), 3, 4, 1, dtype=torch.float64)

    def call(values, scale):
        return how.apply(filter.prepare(features * scale), ones)(values)

    scale = torch.ones(features.shape[-1], dtype=torch.float64, requires_grad=filter.differentiable)
    assert torch.autograd.gradcheck(call, (values, scale), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda values: call(values, scale.detach()), (values,), fast_mode=True)
    if filter.differentiable and not isinstance(filter, SeparableSpatial):
        bump = torch.zeros_like(features, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda bump: filter.prepare(features + bump)(values.detach()), (bump,), fast_mode=True
        )


@every_filter
def test_images_of_a_batch_are_apart(filter):
    shape = (5, 6)
    features, values = features_for(filter, shape, batch=3), randn(3, *shape, 2, seed=1)
    out = filter.prepare(features)(values)
    for b in range(3):
        alone = filter.prepare(features[b : b + 1] if len(features) > 1 else features)(values[b : b + 1])
        torch.testing.assert_close(out[b : b + 1], alone, rtol=0, atol=1e-12)
    shared = filter.prepare(features[:1])(values)  # one image's features for three sets of values
    torch.testing.assert_close(shared[1:2], filter.prepare(features[:1])(values[1:2]), rtol=0, atol=1e-12)


@every_filter
def test_memory_layout_does_not_matter(filter):
    features, values = features_for(filter, (4, 5)), randn(2, 3, 4, 5).movedim(1, -1)
    assert not values.is_contiguous()
    strided = features.expand(2, *features.shape[1:]).movedim(-1, 1).contiguous().movedim(1, -1)
    strided = strided[: len(features)]
    out = filter.prepare(strided)(values)
    torch.testing.assert_close(out, filter.prepare(features)(values.contiguous()), rtol=0, atol=1e-14)


@every_filter
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 5)])
def test_tiny_and_constant_images(filter, shape):
    features = features_for(filter, shape)
    features = features if isinstance(filter, SeparableSpatial) else features[..., :2] * 0 + 7.0
    ones = torch.ones(len(features), *shape, 1, dtype=torch.float64)
    values = randn(2, *shape, 3)
    out = Normalization.AFTER.apply(filter.prepare(features), ones)(values)
    assert out.isfinite().all()
    if math.prod(shape) == 1:
        torch.testing.assert_close(out, values, rtol=0, atol=1e-12)
    elif not isinstance(filter, (SeparableSpatial, ConvWindow)):  # equal features: everybody gets the mean
        torch.testing.assert_close(out, values.mean(-2, keepdim=True).expand_as(values), rtol=0, atol=1e-12)


@every_filter
def test_padding_changes_nothing(filter):
    """A masked image gives what the cropped one does, in the part that is kept, and zero elsewhere."""
    features, values = features_for(filter, (6, 7)), randn(2, 6, 7, 2)
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[:, :4, :5] = True
    for how in Normalization:
        out = how.apply(filter.prepare(features, mask), torch.ones(2, 6, 7, 1, dtype=torch.float64), mask)(values)
        cropped = features[:, :4, :5]
        ones = torch.ones(len(features), 4, 5, 1, dtype=torch.float64)
        expected = how.apply(filter.prepare(cropped), ones)(values[:, :4, :5])
        torch.testing.assert_close(out[:, :4, :5], expected, rtol=0, atol=1e-12)
        assert not out[~mask].any()


def test_exact_is_bounded_in_memory_and_the_same():
    """Blocks of rows, checkpointed, against the kernel at once; gradients too."""
    features, values = randn(1, 30, 3).requires_grad_(), randn(1, 30, 2, seed=1).requires_grad_()
    whole, blocks = (
        torch.autograd.grad(Exact(chunk).prepare(features)(values).square().sum(), (features, values))
        for chunk in (30, 8)
    )
    torch.testing.assert_close(whole, blocks, rtol=0, atol=1e-12)


def test_the_lattice_keeps_single_precision():
    """Half precision values are filtered in float32 and come back as they were."""
    features, values = features_for(Permutohedral(), (5, 6)).float(), randn(2, 5, 6, 3).float()
    plan = Permutohedral().prepare(features)
    half = plan(values.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, plan(values.bfloat16().float()).bfloat16(), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(Permutohedral().prepare(features)(values), plan(values), rtol=0, atol=0)


def test_the_lattice_refuses_what_it_cannot_do():
    features = torch.zeros(1, 4, 4, 5)
    with pytest.raises(RuntimeError, match=r"Take filter=Exact\(\)"):
        Permutohedral().prepare(features.clone().requires_grad_())
    with torch.no_grad():
        Permutohedral().prepare(features.clone().requires_grad_())
    wide = features.clone()
    wide[0, 0, 0, 0] = 1e9
    with pytest.raises(ValueError, match="too large for a lattice in torch.float32: they reach"):
        Permutohedral().prepare(wide)
    many = 1e4 * randn(1, 4, 4, 5).float()
    with pytest.raises(ValueError, match=r"more than 2\^62"):
        Permutohedral().prepare(many)


def test_64_bit_keys_give_the_same():
    """A range that needs them: two clouds far apart, which do not know of each other."""
    features, values = randn(1, 8, 6, 5), randn(1, 8, 6, 2, seed=1)
    far = features.clone()
    far[:, 4:] += 180.0
    assert math.prod((far.amax((0, 1, 2)) - far.amin((0, 1, 2))).tolist()) > 2**31
    out = Permutohedral().prepare(far)(values)
    torch.testing.assert_close(out[:, :4], Permutohedral().prepare(features[:, :4])(values[:, :4]), rtol=0, atol=1e-12)
    torch.testing.assert_close(out[:, 4:], Permutohedral().prepare(far[:, 4:])(values[:, 4:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("filter", [Exact(), ConvWindow(), SeparableSpatial(), Permutohedral()], ids=repr)
def test_bad_features(filter):
    assert isinstance(filter, GaussianFilter)
    with pytest.raises(TypeError, match="features must be floating point"):
        filter.prepare(torch.ones(1, 4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="features must have shape"):
        filter.prepare(torch.ones(4, 1))
    with pytest.raises(ValueError, match="features has 4 NaN"):
        filter.prepare(torch.full((1, 4, 1), torch.nan))
    with pytest.raises(ValueError, match="features is empty"):
        filter.prepare(torch.ones(1, 0, 1))


def test_bad_options():
    with pytest.raises(ValueError, match="size must be odd"):
        ConvWindow(4)
    with pytest.raises(ValueError, match="dilation must be at least 1"):
        ConvWindow(3, dilation=0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        Exact(0)
    with pytest.raises(ValueError, match="features must be the positions of a grid"):
        SeparableSpatial().prepare(torch.zeros(1, 4, 4, 5))
    with pytest.raises(ValueError, match="these change along other axes too"):
        SeparableSpatial().prepare(randn(1, 4, 4, 2))
