"""Learned partial differential equations: the invariants, the symmetry, the bounds, and that they learn to denoise."""

from __future__ import annotations

import data
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unrolled.image.diffusion import LearnedPDE, LearnedPDEStep
from unrolled.image.invariants import (
    NAMES,
    OWN_LAPLACIAN,
    SWAPPED,
    derivatives,
    differential_invariants,
)
from unrolled.metrics.image import psnr
from unrolled.recipes.diffusion import train_pde
from unrolled.solvers.diffusion import heat, perona_malik

few = settings(deadline=None, max_examples=25)


def smooth(size: int, seed: int) -> Tensor:
    """A random image without noise, (1, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return heat(torch.rand(1, size, size, generator=generator, dtype=torch.float64), num_iters=10, diffusivity=0.2)


def perturbed(net: LearnedPDE, scale: float, seed: int = 0) -> LearnedPDE:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return net


def symmetries() -> list:
    turns = [lambda x, k=k: torch.rot90(x, k, (-2, -1)) for k in range(4)]
    return [*turns, *(lambda x, turn=turn: turn(x).flip(-1) for turn in turns)]


# ---- Invariants ------------------------------------------------------------------------------------------------------


def test_derivatives_of_polynomials_are_exact():
    y, x = torch.meshgrid(torch.arange(7.0).double(), torch.arange(9.0).double(), indexing="ij")
    image = 0.3 + 2 * x - 3 * y + 0.5 * x**2 - 1.5 * x * y + 0.25 * y**2
    d = derivatives(image)
    inside = (slice(1, -1), slice(1, -1))
    expected = {
        "x": 2 + x - 1.5 * y,
        "y": -3 - 1.5 * x + 0.5 * y,
        "xx": 1 + 0 * x,
        "xy": -1.5 + 0 * x,
        "yy": 0.5 + 0 * x,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(d, name)[inside], value[inside], rtol=0, atol=1e-12)


def test_invariants_are_what_their_names_say():
    """Against matrix products at each pixel."""
    u, v = smooth(8, 0), smooth(8, 1)

    def parts(image: Tensor) -> tuple[Tensor, Tensor]:
        d = derivatives(image)
        return torch.stack([d.x, d.y], -1), torch.stack([d.xx, d.xy, d.xy, d.yy], -1).unflatten(-1, (2, 2))

    (gu, Hu), (gv, Hv) = parts(u), parts(v)

    def form(a: Tensor, H: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("...i,...ij,...j->...", a, H, b)

    def trace(H: Tensor) -> Tensor:
        return torch.einsum("...ii->...", H)

    expected = {
        "1": torch.ones_like(u),
        "v": v,
        "u": u,
        "|grad v|^2": (gv * gv).sum(-1),
        "|grad u|^2": (gu * gu).sum(-1),
        "grad v . grad u": (gv * gu).sum(-1),
        "tr Hv": trace(Hv),
        "tr Hu": trace(Hu),
        "grad v' Hv grad v": form(gv, Hv, gv),
        "grad v' Hu grad v": form(gv, Hu, gv),
        "grad v' Hv grad u": form(gv, Hv, gu),
        "grad v' Hu grad u": form(gv, Hu, gu),
        "grad u' Hv grad u": form(gu, Hv, gu),
        "grad u' Hu grad u": form(gu, Hu, gu),
        "tr Hv Hv": trace(Hv @ Hv),
        "tr Hv Hu": trace(Hv @ Hu),
        "tr Hu Hu": trace(Hu @ Hu),
    }
    assert tuple(expected) == NAMES
    torch.testing.assert_close(differential_invariants(u, v), torch.stack([*expected.values()]), rtol=0, atol=1e-14)


def test_swapped_is_the_other_order_of_the_images():
    u, v = smooth(8, 0), smooth(8, 1)
    torch.testing.assert_close(differential_invariants(v, u), differential_invariants(u, v)[list(SWAPPED)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", range(8))
def test_invariants_do_not_change_on_a_turned_image(k, dtype):
    """To the last bit: no order of summation may prefer a direction."""
    move, u, v = symmetries()[k], smooth(9, 0).to(dtype), smooth(9, 1).to(dtype)
    assert torch.equal(differential_invariants(move(u), move(v)), move(differential_invariants(u, v)))


def test_the_error_has_no_direction():
    """Waves of one length but many directions: the squared gradient's and the Laplacian's errors must hardly differ."""
    y, x = torch.meshgrid(*(torch.arange(65.0).double() for _ in range(2)), indexing="ij")
    found = []
    for angle in torch.linspace(0, torch.pi / 4, 4).double():
        phase = 0.5 * (x * angle.cos() + y * angle.sin())
        inv = differential_invariants(phase.sin(), phase.cos())[:, 2:-2, 2:-2]
        # |grad sin|^2 + |grad cos|^2 and the ratio of the Laplacian to the wave are the same everywhere.
        found.append(torch.stack([(inv[3] + inv[4]).mean(), (inv[7] * inv[2]).mean() / inv[2].square().mean()]))
    found = torch.stack(found)
    errors = (found - torch.tensor([0.25, -0.25]).double()).abs()
    # The errors are 2 to 8 % at eleven pixels a wave; over the directions they differ by a fraction of that.
    assert ((found.max(0).values - found.min(0).values) < 0.05 * errors.max(0).values).all()


# ---- The network -----------------------------------------------------------------------------------------------------


def test_untrained_is_the_heat_equation_at_any_range():
    image = 255 * torch.rand(3, 20, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = LearnedPDE(8, diffusivity=0.2, data_range=255.0, dtype=torch.float64)
    torch.testing.assert_close(net(image), heat(image, num_iters=8, diffusivity=0.2), rtol=0, atol=1e-10)


def test_heat_blurs_like_a_gaussian_and_keeps_the_mean():
    spot = torch.zeros(41, 41, dtype=torch.float64)
    spot[20, 20] = 1.0
    u = heat(spot, num_iters=20, diffusivity=0.1)
    place = torch.arange(41.0).double() - 20
    torch.testing.assert_close((u.sum(0) * place**2).sum(), torch.tensor(2 * 20 * 0.1).double())
    image = torch.rand(2, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(heat(image, num_iters=30).mean((1, 2)), image.mean((1, 2)))
    assert heat(image, num_iters=1, diffusivity=0.299).amax() <= image.amax()


def test_perona_malik_is_diffusion_where_contrast_is_low_and_keeps_the_mean():
    image = torch.rand(2, 9, 7, dtype=torch.float64)
    u = perona_malik(image, contrast=1e9, num_iters=1, step_size=0.1)
    p = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="replicate")
    around = p[:, 2:, 1:-1] + p[:, :-2, 1:-1] + p[:, 1:-1, 2:] + p[:, 1:-1, :-2]
    torch.testing.assert_close(u, image + 0.1 * (around - 4 * image), rtol=0, atol=1e-12)
    torch.testing.assert_close(perona_malik(image, contrast=20.0, num_iters=9).mean((1, 2)), image.mean((1, 2)))
    step = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert (perona_malik(step, contrast=5.0, num_iters=20) - step).abs().max() < 0.01


@pytest.mark.parametrize(("dtype", "grey_levels"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_turned_images_get_turned_answers(dtype, grey_levels):
    net = perturbed(LearnedPDE(10, dtype=dtype), 0.08)
    image = (smooth(24, 0)[None] + 0.1 * torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))).to(
        dtype
    )
    out = net(image)
    assert (out - heat(image, num_iters=10)).abs().max() > 0.05, "the coefficients must matter"
    for move in symmetries():
        assert 255 * (net(move(image)) - move(out)).abs().max() < grey_levels


def test_shifted_images_get_shifted_answers():
    net = perturbed(LearnedPDE(4, dtype=torch.float64), 0.15)
    image = smooth(30, 0)[None]
    out, moved = net(image), net(image.roll((3, 2), (-2, -1)))
    far = (..., slice(9, -6), slice(9, -6))  # each layer sees one pixel more of the border
    torch.testing.assert_close(moved[far], out.roll((3, 2), (-2, -1))[far], rtol=0, atol=1e-12)


def test_channels_evolve_side_by_side():
    net = perturbed(LearnedPDE(4, dtype=torch.float64), 0.15)
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    apart = torch.cat([net(image[:, i : i + 1]) for i in range(3)], 1)
    torch.testing.assert_close(net(image), apart, rtol=0, atol=1e-12)


@few
@given(st.integers(0, 10**6), st.sampled_from([0.3, 3.0, 1e3, 1e30]), st.sampled_from([1.0, 255.0]))
def test_it_cannot_blow_up(seed, scale, data_range):
    """Whatever the parameters: each layer adds at most `growth`, and coefficients keep their bounds."""
    net = perturbed(LearnedPDE(12, data_range=data_range, bound=0.7), scale, seed)
    generator = torch.Generator().manual_seed(seed)
    image = data_range * 2 * torch.randn(1, 2, 9, 11, generator=generator)
    coefficients = torch.stack([step.coefficients for step in net])
    own = coefficients[..., OWN_LAPLACIAN]
    assert (coefficients.abs() <= 0.7).all() and (own >= 0).all() and (own <= 0.3).all()
    before = image.abs().max()
    for step, u in zip(net, net.iterates(image), strict=True):
        assert u.isfinite().all()
        assert u.abs().max() <= (before + step.growth) * (1 + 1e-5)
        before = u.abs().max()
    loss = net(image).square().mean()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(net.parameters())))


def test_the_indicator_matters():
    """The same u without its indicator's help is another u."""
    net = perturbed(LearnedPDE(3, dtype=torch.float64), 0.2)
    image = smooth(8, 0)[None]
    other = net.run(image)
    still = net(image, state=type(other)(image, torch.zeros_like(image)))
    assert (still - other.u).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"diffusivity": 0.3}, ValueError, "diffusivity must be less than 0.3"),
        ({"indicator_diffusivity": 0.0}, ValueError, "indicator_diffusivity must be greater than 0"),
        ({"contrast": -1.0}, ValueError, "contrast must be greater than 0.*grey levels"),
        ({"bound": 0.0}, ValueError, "bound must be greater"),
        ({"saturation": "8"}, TypeError, "saturation must be a real number"),
        ({"data_range": 0.0}, ValueError, "data_range must be greater"),
        ({"num_iters": 0}, ValueError, "num_iters must be at least 1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        LearnedPDE(**options)


def test_bad_arguments_of_the_functions():
    image = torch.rand(4, 4)
    with pytest.raises(ValueError, match="image must have shape"):
        heat(image[0], num_iters=1)
    with pytest.raises(ValueError, match="diffusivity must be less than 0.3"):
        heat(image, num_iters=1, diffusivity=0.5)
    with pytest.raises(ValueError, match="step_size must be at most 0.25"):
        perona_malik(image, contrast=10.0, num_iters=1, step_size=0.3)
    with pytest.raises(ValueError, match="contrast must be greater"):
        perona_malik(image, contrast=0.0, num_iters=1)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., H, W\)"):
        derivatives(image[0])
    with pytest.raises(ValueError, match="the same shape"):
        differential_invariants(image, image[:2])
    with pytest.raises(TypeError, match="net must be a LearnedPDE"):
        train_pde(torch.nn.Linear(2, 2), image, sigma=25)


def test_made_on_the_meta_device():
    step = LearnedPDEStep(device="meta")
    assert step.raw_a.is_meta and "contrast=12.5" in repr(step)


# ---- Learning --------------------------------------------------------------------------------------------------------


def test_it_learns_to_denoise_and_keeps_edges():
    """Squares and ramps: after 40 steps better than the heat equation that it began as."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 1, 5, 5, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    train, test = images[:20], images[20:]
    noisy = test + 25 / 255 * torch.randn(test.shape, generator=generator)
    net = LearnedPDE(6)
    before = psnr(net(noisy), test).mean()
    history = train_pde(net, train, sigma=25, num_steps=40, lr=2e-2, crop=32, batch_size=4)
    assert len(history) == 40
    assert psnr(net(noisy), test).mean() > before + 1.0


@pytest.mark.slow
def test_the_claim_on_a_third_of_the_training():
    """Set12 at sigma 25: the benchmark reaches more in 700 steps; 27.2 dB is asked for."""
    images = torch.tensor(data.load("train400.npz")["x"][:360])[:, None].float() / 255
    test = [torch.tensor(image)[None].float() / 255 for image in data.load("set12.npz").values()]
    net = LearnedPDE()
    train_pde(net, images, sigma=25, num_steps=230)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = [
            psnr(net(x + 25 / 255 * torch.randn(x.shape, generator=generator)).clamp(0, 1), x).item() for x in test
        ]
    assert sum(found) / len(found) >= 27.2
