"""Deconvolution: networks against solvers and dense algebra, constraints, borders, the recipe, recorded blurs."""

import itertools
import math

import numpy as np
import pytest
import torch
from data import load
from scipy.ndimage import label
from torch.nn.functional import conv2d

from unrolled.functional import generalized_threshold
from unrolled.image.blind import BlindDeconvolution, KernelEstimation
from unrolled.image.deconvolution import NonBlindDeconvolution
from unrolled.metrics import align, psnr
from unrolled.recipes.blind import KernelError, LogErrorRatio, kernel_distance, train_blind
from unrolled.recipes.deconvolution import RestorationError, SyntheticBlurs, motion_kernel, train_deconvolution
from unrolled.shrinkage import GeneralizedShrinkage, PiecewiseLinear, SoftThreshold
from unrolled.solvers.blind_deconvolution import (
    SPECK,
    centred,
    divergence,
    estimate_kernel,
    first_kernel,
    reach,
    scales,
    seen_gradients,
    shrunk_gradients,
    without_specks,
)
from unrolled.solvers.deconvolution import deconvolve, differences, frame, noise_level, transfer


def generator(seed):
    return torch.Generator().manual_seed(seed)


def cartoon(size, seed=0, dtype=torch.float32):
    """Discs of random place, size and brightness: an image made of edges."""
    random = generator(seed)
    place = torch.arange(size, dtype=dtype)
    image = torch.full((size, size), 0.5, dtype=dtype)
    for _ in range(14):
        y, x, r, grey = torch.rand(4, generator=random)
        inside = (place[:, None] - y * size) ** 2 + (place - x * size) ** 2 < (0.05 + 0.2 * r) ** 2 * size**2
        image = torch.where(inside, grey.to(dtype), image)
    return image[None, None]


def blurred(image, kernel, sigma=0.5, seed=1):
    """What a camera sees: no pixel that needs one beyond the border; and the sharp pixels under it."""
    half = kernel.shape[-1] // 2
    y = conv2d(image, kernel.flip(-2, -1))
    noise = torch.randn(y.shape, generator=generator(seed), dtype=y.dtype)
    return y + sigma / 255 * noise, image[..., half:-half, half:-half]


# ---- Pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 10), (13, 7)])
def test_a_transfer_function_is_that_of_a_centred_circular_convolution(size):
    kernel = torch.rand(1, 1, 3, 5, dtype=torch.float64, generator=generator(0))
    image = torch.rand(1, 1, *size, dtype=torch.float64, generator=generator(1))
    found = torch.fft.irfft2(transfer(kernel, size) * torch.fft.rfft2(image), s=size)
    expected = torch.zeros_like(image)
    for i in range(3):
        for j in range(5):
            expected += kernel[0, 0, i, j] * image.roll((i - 1, j - 2), (-2, -1))
    torch.testing.assert_close(found, expected)


def test_differences_are_those_of_neighbours():
    image = torch.rand(8, 9, dtype=torch.float64, generator=generator(0))
    F = transfer(differences(image), (8, 10))
    across = torch.fft.irfft2(F[0] * torch.fft.rfft2(image, s=(8, 10)), s=(8, 10))
    torch.testing.assert_close(across[:, :8], image[:, 1:] - image[:, :-1])


@pytest.mark.parametrize(("height", "width", "margin"), [(9, 10, 6), (5, 40, 10), (255, 255, 54)])
def test_a_frame_mirrors_and_crops(height, width, margin):
    area = frame((height, width), margin)
    image = torch.rand(2, height, width, generator=generator(0))
    assert area.full[0] >= height + margin and area.full[1] >= width + margin
    full = area.reflect(image)
    assert full.shape[-2:] == area.full
    assert torch.equal(area.crop(full), image) and torch.equal(area.crop(area.zeros(image)), image)
    assert torch.equal(full[..., area.top - 1, area.left : area.left + width], image[..., 1, :])
    assert area.zeros(image).sum() == pytest.approx(image.sum().item(), rel=1e-5)


def test_the_noise_level_is_estimated():
    flat = torch.linspace(0, 1, 200).expand(2, 1, 200, 200)
    noisy = flat + torch.tensor([0.01, 0.05])[:, None, None, None] * torch.randn(2, 1, 200, 200, generator=generator(0))
    torch.testing.assert_close(noise_level(noisy).flatten(), torch.tensor([0.01, 0.05]), rtol=0.03, atol=0)


def test_kernels_are_centred_one_by_one():
    kernel = torch.zeros(2, 1, 7, 7)
    kernel[0, 0, 1, 5] = kernel[1, 0, 3, 4] = 1.0
    found = centred(kernel)
    assert (found[:, 0, 3, 3] == 1).all() and found.sum() == 2
    kernel[1, 0, 1, 6] = kernel[1, 0, 5, 6] = 5.0  # columns 4 to 6 are taken, however little there is in 4
    found = centred(kernel)
    assert torch.equal(found[1, 0, :, 2:5], kernel[1, 0, :, 4:] / 11) and found[1].sum() == 1
    kernel[1, 0, 6, 0] = 0.1  # less than 2 %: lost
    assert torch.equal(centred(kernel), found)
    assert torch.equal(torch.vmap(centred)(kernel), centred(kernel))


def _parts(kernel):
    """The kernel without specks, by SciPy."""
    parts, count = label(kernel.numpy(), structure=np.ones((3, 3)))
    masses = [kernel[torch.from_numpy(parts == i)].sum().item() for i in range(count + 1)]
    least = min(SPECK * kernel.sum().item(), max(masses[1:]))
    kept = torch.from_numpy(np.isin(parts, [i for i in range(1, count + 1) if masses[i] >= least]))
    return kernel * kept / (kernel * kept).sum()


@pytest.mark.parametrize("seed", range(5))
def test_parts_of_a_kernel_are_those_that_scipy_labels(seed):
    random = generator(seed)
    shapes = torch.rand(6, 1, 15, 15, dtype=torch.float64, generator=random)
    share = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.3])[:, None, None, None]
    kernel = torch.where(shapes > share, shapes, 0.0)
    kernel = kernel / kernel.sum((-2, -1), keepdim=True)
    found = without_specks(kernel)
    for one, expected in zip(found, kernel, strict=True):
        torch.testing.assert_close(one[0], _parts(expected[0]))
    assert torch.equal(torch.vmap(without_specks)(kernel), found)
    torch.testing.assert_close(without_specks(found), found)


def test_lengths_of_gradients_shrink_and_directions_stay():
    y = torch.rand(2, 3, 9, 11, dtype=torch.float64, generator=generator(0))
    area = frame(y.shape[-2:], 6)
    F, X = transfer(differences(y), area.full), torch.fft.rfft2(area.reflect(y))
    d, w = (shrunk_gradients(X, F, area, threshold, 0.5) for threshold in (0.0, 0.05))
    assert d.shape == (2, 3, 2, *area.full)
    slopes, sloped = seen_gradients(y, area)
    inside = sloped.unflatten(-3, (3, 2)).bool()
    torch.testing.assert_close(slopes.unflatten(-3, (3, 2))[inside], d[inside])
    expected = generalized_threshold(torch.complex(d[..., 0, :, :], d[..., 1, :, :]), 0.05, 0.5)
    torch.testing.assert_close(torch.view_as_complex(w.movedim(-3, -1).contiguous()), expected)
    assert 0.1 < (w == 0).double().mean() < 0.9
    product = (w * d).sum((-3, -2, -1))
    back = torch.fft.irfft2(divergence(w, F), s=area.full)
    torch.testing.assert_close((back * area.reflect(y)).sum((-2, -1)), product)


def test_the_reach_of_gradients():
    d = torch.zeros(2, 2, 11, 12)
    d[0, 1, 5, 6], d[1, 0, 0, 0] = -0.1, 2.0
    expected = torch.zeros(2, 1, 11, 12)
    expected[0, 0, 3:8, 4:9], expected[1, 0, :3, :3] = 1.0, 1.0
    assert torch.equal(reach(d, 5), expected)


def test_how_the_weight_and_the_ridge_depend_on_the_side_of_the_kernel_is_learned():
    y, kernel = torch.rand(1, 1, 20, 20, generator=generator(0)), motion_kernel(5, generator(1))[None]
    net, other = KernelEstimation(2), KernelEstimation(2)
    with torch.no_grad():
        for step in net:
            step.raw_coarse.fill_(2.0)
            step.raw_fine.fill_(-1.0)
        for step in other:
            step.shrinkage.log_weight.add_(math.log(4))
            step.log_ridge.add_(math.log(2))
    assert not torch.allclose(net(y, kernel), KernelEstimation(2)(y, kernel), atol=1e-3)
    torch.testing.assert_close(net(y, kernel), other(y, kernel))
    assert net[0].weight(torch.tensor(0.0), 20).item() == pytest.approx(0.004 / 4)
    assert net[0].ridge(20).item() == pytest.approx(0.01 / 2)


def test_the_scales():
    assert scales(27) == [5, 7, 9, 13, 19, 27] and scales(3) == [3] and scales(5) == [5] and scales(7) == [5, 7]
    for side in range(3, 61, 2):
        found = scales(side)
        assert found[-1] == side and all(a < b and b % 2 for a, b in itertools.pairwise(found))


# ---- Non-blind -------------------------------------------------------------------------------------------------------


def test_one_quadratic_step_is_the_solution_of_the_normal_equations():
    """Where the threshold leaves nothing, w = 0 and x solves (K'K + mu D'D) x = K'y, here with dense matrices."""
    y, kernel = cartoon(9, dtype=torch.float64), motion_kernel(5, generator(3)).double()[None]
    net = NonBlindDeconvolution(1, beta=1e-3, sigma=10.0, weight=500.0, dtype=torch.float64)
    area = frame((9, 9), 10)
    size = area.full
    eye = torch.eye(size[0] * size[1], dtype=torch.float64).reshape(-1, *size)

    def matrix(filter):
        return torch.fft.irfft2(transfer(filter, size) * torch.fft.rfft2(eye), s=size).flatten(1).T

    K, D = matrix(kernel[0]), torch.cat([matrix(filter) for filter in differences(y)])
    seen = area.reflect(y).flatten()
    inside = area.zeros(torch.ones_like(y)).flatten()
    completed = inside * seen + (1 - inside) * (K @ seen)
    mu = 500.0 * (10 / 255) ** 2 * 1e-3
    x = torch.linalg.solve(K.T @ K + mu * D.T @ D, K.T @ completed)
    torch.testing.assert_close(net(y, kernel), area.crop(x.reshape(1, 1, *size)), rtol=0, atol=1e-10)


def test_the_image_becomes_sharp_up_to_the_border():
    image, kernel = cartoon(110, 1), motion_kernel(11, generator(1))[None]
    y, sharp = blurred(image, kernel)
    found = deconvolve(y, kernel)
    assert psnr(found, sharp) > psnr(y, sharp) + 5
    strip = (found - sharp)[..., :4, :].square().mean().sqrt()
    assert strip < (y - sharp)[..., :4, :].square().mean().sqrt(), "the first rows, too"


def test_colour_channels_are_restored_like_grey_images():
    image = torch.cat([cartoon(60, seed) for seed in (0, 1, 2)], 1)
    kernel = motion_kernel(7, generator(0))[None]
    y = torch.cat([blurred(image[:, c : c + 1], kernel, seed=c)[0] for c in range(3)], 1)
    net = NonBlindDeconvolution(4, sigma=1.0)
    each = torch.cat([net(y[:, c : c + 1], kernel) for c in range(3)], 1)
    torch.testing.assert_close(net(y, kernel), each)


def test_what_is_flat_stays_flat_and_the_range_does_not_matter():
    kernel = motion_kernel(7, generator(0))[None]
    flat = torch.full((1, 1, 30, 33), 0.3)
    filters = torch.nn.Parameter(torch.randn(4, 3, 3, generator=generator(1)))
    net = NonBlindDeconvolution(3, filters=filters)
    torch.testing.assert_close(net(flat, kernel), flat)
    y, _ = blurred(cartoon(60), kernel)
    small, large = (NonBlindDeconvolution(3, data_range=r)(y * r, kernel) / r for r in (1.0, 255.0))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "shrinkage",
    [SoftThreshold(0.1), PiecewiseLinear(8, 4, num_channels=3, channel_dim=-3), GeneralizedShrinkage(0.5)],
    ids=lambda shrinkage: type(shrinkage).__name__,
)
def test_any_shrinkage_and_any_filters_learn(shrinkage):
    filters = torch.nn.Parameter(torch.randn(3, 3, 5, generator=generator(1)))
    net = NonBlindDeconvolution(2, filters=filters, shrinkage=shrinkage, beta=8.0, sigma=5.0)
    y, sharp = blurred(cartoon(40), motion_kernel(5, generator(0))[None])
    (net(y, motion_kernel(5, generator(0))[None]) - sharp).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert len({step.filters for step in net.steps}) == 2
    fixed = NonBlindDeconvolution(2, filters=filters.detach(), shrinkage=shrinkage)
    assert "filters" in dict(fixed[0].named_buffers())


# ---- Blind -----------------------------------------------------------------------------------------------------------


def test_the_kernel_is_on_the_simplex_and_centred():
    y = torch.cat([blurred(cartoon(70, seed), motion_kernel(9, generator(seed))[None])[0] for seed in (0, 1)])
    net = KernelEstimation(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator(2)))
    for kernel in (net(y, first_kernel(y, 9)), estimate_kernel(y, 9, num_iters=4)):
        assert (kernel >= 0).all()
        torch.testing.assert_close(kernel.sum((-2, -1)), torch.ones(2, 1))
        torch.testing.assert_close(centred(kernel), kernel)


def test_an_image_without_edges_keeps_its_first_kernel():
    flat = torch.full((1, 1, 30, 30), 0.5)
    start = first_kernel(flat, 5)
    assert torch.equal(KernelEstimation(3)(flat, start), start)


def test_blind_is_the_solver_before_training_and_finds_the_kernel():
    kernel = motion_kernel(9, generator(4))[None]
    y, sharp = blurred(cartoon(100), kernel)
    net = BlindDeconvolution()
    image, found = net(y, kernel_size=9)
    # Rounding may decide on which side of a jump an entry lies: the contract suite holds both together in float64.
    torch.testing.assert_close(found, estimate_kernel(y, 9), rtol=0, atol=1e-2)
    torch.testing.assert_close(image, deconvolve(y, found), rtol=0, atol=1e-2)
    untouched = first_kernel(y, 9)
    assert kernel_distance(found, kernel) < 0.5 * kernel_distance(untouched, kernel)
    before, after = (psnr(*align(x, sharp, border=8, subpixel=1)[:2]) for x in (y, image))
    assert after > before + 3
    bright, _ = BlindDeconvolution(data_range=255.0)(255 * y, kernel_size=9)
    assert psnr(bright / 255, image) > 40


def test_the_schedule_is_learned_iteration_by_iteration():
    net = KernelEstimation(5)
    p, weight = net.learned_schedule()
    assert p == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2], abs=1e-6)
    assert weight == pytest.approx([4e-3 / 2 ** (t / 2) for t in range(5)])
    with torch.no_grad():
        net.steps[2].shrinkage.raw_p += 0.1
    assert net.learned_schedule()[0] == pytest.approx([-0.2, -0.1, 0.1, 0.1, 0.2], abs=1e-6)


def test_the_kernel_size_may_be_an_upper_bound():
    kernel = motion_kernel(9, generator(4))[None]
    y, _ = blurred(cartoon(100), kernel)
    found = estimate_kernel(y, 13)
    inner = found[..., 2:-2, 2:-2]
    assert inner.sum() > 0.95
    assert kernel_distance(inner, kernel) < 0.75


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, y: net(y, 8), ValueError, "kernel_size must be odd, .* got 8. Take 9."),
        (lambda net, y: net(y, 35), ValueError, "kernel_size is 35, larger than y with its 32 x 40 pixels"),
        (lambda net, y: net(y, 1), ValueError, "kernel_size must be at least 3"),
        (lambda net, y: net((255 * y).byte(), 5), TypeError, r"y must be floating point.*y.float\(\) / 255"),
        (lambda net, y: net(y / 0, 5), ValueError, "y has .* NaN or infinite"),
        (lambda net, y: net(y[0, 0], 5), ValueError, r"For one grey image take y\[None, None\]"),
        (lambda net, y: net(y.double(), 5), TypeError, "y is torch.float64 but the network is torch.float32"),
        (lambda net, y: estimate_kernel(y, 4), ValueError, "kernel_size must be odd"),
        (lambda net, y: NonBlindDeconvolution(sigma=0.0), ValueError, "sigma must be greater than 0.*grey levels"),
        (lambda net, y: NonBlindDeconvolution(sigma=-1.0), ValueError, "sigma must be greater than 0"),
        (lambda net, y: NonBlindDeconvolution(weight=0.0), ValueError, "weight must be greater than 0"),
        (lambda net, y: NonBlindDeconvolution(data_range=0.0), ValueError, "data_range must be greater than 0"),
        (lambda net, y: NonBlindDeconvolution(filters=torch.ones(3, 4, 3)), ValueError, "filters must have shape"),
        (lambda net, y: NonBlindDeconvolution(shrinkage=torch.relu), TypeError, "shrinkage must be an unrolled"),
        (
            lambda net, y: NonBlindDeconvolution(shrinkage=SoftThreshold(num_channels=3, channel_dim=-3)),
            ValueError,
            "num_channels=2 and channel_dim=-3",
        ),
        (lambda net, y: BlindDeconvolution(torch.nn.ReLU()), TypeError, "kernel_estimation must be a KernelEstimation"),
        (lambda net, y: BlindDeconvolution(deconvolution=NonBlindDeconvolution(), data_range=255), ValueError, "same"),
        (lambda net, y: deconvolve(y, first_kernel(y, 5), p=-2.0), ValueError, "p must be at least -1"),
        (lambda net, y: deconvolve(y, first_kernel(y, 5), sigma=0), ValueError, "sigma must be greater than 0"),
    ],
)
def test_bad_arguments(call, error, message):
    net = BlindDeconvolution(KernelEstimation(1), NonBlindDeconvolution(1))
    with pytest.raises(error, match=message):
        call(net, torch.rand(1, 1, 32, 40, generator=generator(0)))


def test_trained_weights_come_along():
    from sklearn.datasets import load_sample_image

    names = "china.jpg", "flower.jpg"
    photos = torch.stack([torch.tensor(load_sample_image(name)).float().mean(-1) / 255 for name in names])[:, None]
    photo = photos[:1]
    with torch.no_grad():
        kernel = motion_kernel(9, generator(4))[None]
        y, sharp = blurred(photo[..., 60:180, 300:420], kernel, sigma=1.0)
        trained = psnr(NonBlindDeconvolution.pretrained()(y, kernel), sharp)
        assert trained > psnr(deconvolve(y, kernel), sharp)
        net = BlindDeconvolution.pretrained()
        small = torch.nn.functional.interpolate(photos, scale_factor=0.5, mode="area")
        batches = SyntheticBlurs(small, crop=180, sides=(9, 21)).batches(4, seed=0)
        doublings = LogErrorRatio([next(batches), next(batches)], net.deconvolution)
        assert doublings(net) < doublings(BlindDeconvolution(deconvolution=net.deconvolution)) - 0.4
        found, _ = net(y, kernel_size=9)
        by_hand, _ = BlindDeconvolution()(y, kernel_size=9)
        learned, untrained = (psnr(*align(x, sharp, border=8, subpixel=1)[:2]) for x in (found, by_hand))
        assert learned > untrained + 0.5 and untrained > psnr(y, sharp) + 3
        # A power of two: rounding may move the kernel by a pixel, and the image with it.
        bright, _ = BlindDeconvolution.pretrained(data_range=256.0)(256 * y, kernel_size=9)
    torch.testing.assert_close(bright / 256, found)
    assert not net.training and net.kernel_estimation.learned_schedule() != KernelEstimation().learned_schedule()
    assert BlindDeconvolution.pretrained(dtype=torch.float64)(y.double(), 9).image.dtype == torch.float64


# ---- The recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [5, 11, 27])
def test_random_kernels_are_kernels(side):
    kernels = torch.stack([motion_kernel(side, generator(seed)) for seed in range(5)])
    assert kernels.shape == (5, 1, side, side) and (kernels >= 0).all()
    torch.testing.assert_close(kernels.sum((-2, -1)), torch.ones(5, 1))
    for lines in (*kernels[:, 0].sum(-1), *kernels[:, 0].sum(-2)):
        filled = lines.nonzero().flatten()
        assert abs(filled[0] - (side - 1 - filled[-1])) <= 1, "as many empty lines on either side"
    assert torch.equal(kernels[1], motion_kernel(side, generator(1)))
    assert not torch.equal(kernels[0], kernels[1])


def test_synthetic_blurs_are_what_they_say():
    problem = SyntheticBlurs(torch.cat([cartoon(64, seed) for seed in range(3)]), crop=48, sides=(5, 9), sigmas=(2, 2))
    batch = next(problem.batches(4, seed=3))
    side = batch.kernel.shape[-1]
    assert batch.blurred.shape == batch.sharp.shape == (4, 1, 49 - side, 49 - side)
    # Where the kernel lies inside, the blur of what is sharp is the blurred image but for the noise.
    for y, kernel, x in zip(*batch, strict=True):
        again = conv2d(x[None], kernel[None].flip(-2, -1))[0]
        half = side // 2
        noise = y[..., half:-half, half:-half] - again
        assert noise.std().item() == pytest.approx(2 / 255, rel=0.1) and abs(noise.mean()) < 1e-3
    assert torch.equal(next(problem.batches(4, seed=3)).blurred, batch.blurred)


def test_the_distance_of_kernels_forgives_shifts():
    kernel, other = (torch.nn.functional.pad(motion_kernel(9, generator(seed)), (4,) * 4)[None] for seed in (2, 3))
    assert kernel_distance(kernel, kernel) < 1e-4
    assert kernel_distance(kernel.roll((3, -2), (-2, -1)), kernel) < 1e-3
    assert kernel_distance(other, kernel) > 0.3
    half = (kernel + kernel.roll(1, -1)) / 2
    assert kernel_distance(half, kernel) < 0.7 * (half - kernel).square().sum().sqrt() / kernel.square().sum().sqrt()


def test_training_restores_better_and_leaves_the_rest_alone():
    problem = SyntheticBlurs(torch.cat([cartoon(72, seed) for seed in range(4)]), crop=64, sides=(5, 7))
    net = NonBlindDeconvolution(4)
    batch = next(problem.batches(6, seed=99))
    before = RestorationError()(net, batch).item()
    train_deconvolution(net, problem, num_steps=25, batch_size=2, lr=0.1)
    assert RestorationError()(net, batch).item() < before - 0.5 / 20, "half a dB"
    assert not any(p._backward_hooks for p in net.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_the_schedule_is_found_by_trial(tied):
    problem = SyntheticBlurs(torch.cat([cartoon(48, seed) for seed in range(2)]), crop=48, sides=(5, 5))
    net = BlindDeconvolution(KernelEstimation(3, tied=tied), NonBlindDeconvolution(3))
    tail = {name: value.clone() for name, value in net.deconvolution.state_dict().items()}
    cost = LogErrorRatio([next(problem.batches(2, seed=1))], net.deconvolution)
    before = cost(net)
    options = {"num_images": 2, "batch_size": 2, "seed": 1}
    history = train_blind(net, problem, num_trials=12, **options)
    assert len(history) == 12 and history.loss[0] == pytest.approx(before)
    assert all(b <= a for a, b in itertools.pairwise(history.loss)) and history.loss[-1] < history.loss[0]
    assert cost(net) == pytest.approx(history.loss[-1]), "what did not help was taken back"
    assert all(torch.equal(value, tail[name]) for name, value in net.deconvolution.state_dict().items())

    again = BlindDeconvolution(KernelEstimation(3, tied=tied), NonBlindDeconvolution(3))
    assert train_blind(again, problem, num_trials=12, **options).loss == history.loss
    untouched = KernelEstimation(3, tied=tied)
    train_blind(BlindDeconvolution(untouched, net.deconvolution), problem, num_trials=1, **options)
    for a, b in zip(untouched.parameters(), KernelEstimation(3, tied=tied).parameters(), strict=True):
        assert torch.equal(a, b)
    for bad, error, message in (
        ({"net": net.deconvolution}, TypeError, "net must be a BlindDeconvolution"),
        ({"problem": cartoon(48)}, TypeError, "problem must be SyntheticBlurs"),
        ({"num_trials": 0}, ValueError, "num_trials must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ):
        with pytest.raises(error, match=message):
            train_blind(**{"net": net, "problem": problem, **bad})


def test_a_trial_that_is_clearly_no_better_on_the_first_images_ends_there():
    problem = SyntheticBlurs(cartoon(48), crop=48, sides=(5, 5))
    batches = [batch for batch, _ in zip(problem.batches(2, seed=0), range(8), strict=False)]
    seen = []

    class Told(BlindDeconvolution):
        """Knows the kernels as soon as its ridge is changed, as the first move does; nothing else has an effect."""

        def kernels(self, y, kernel_size):
            seen.append(next(i for i, batch in enumerate(batches) if torch.equal(batch.blurred, y)))
            untouched = self.kernel_estimation[0].log_ridge == KernelEstimation(2)[0].log_ridge
            return [first_kernel(y, kernel_size) if untouched else batches[seen[-1]].kernel]

    net = Told(KernelEstimation(2), NonBlindDeconvolution(2))
    history = train_blind(net, problem, num_trials=4, num_images=16, batch_size=2)
    assert history.loss[0] > 0.5 and history.loss[1:] == [pytest.approx(0.0, abs=1e-5)] * 3
    assert seen == [*range(8), *range(8), 0, 0], "all, all as it wins, an eighth as it is no better, and again"
    for name, value in net.kernel_estimation.named_parameters():
        if not name.endswith("log_ridge"):
            torch.testing.assert_close(value, KernelEstimation(2).get_parameter(name))


def test_the_cost_of_a_kernel_is_counted_in_doublings():
    problem = SyntheticBlurs(cartoon(64), crop=64, sides=(5, 5), sigmas=(1, 1))
    batch = next(problem.batches(2, seed=5))

    class Told(BlindDeconvolution):
        def kernels(self, y, kernel_size):
            return [batch.kernel]

    net = Told()
    assert LogErrorRatio([batch], net.deconvolution)(net) == pytest.approx(0, abs=1e-5)
    wrong = batch._replace(kernel=first_kernel(batch.blurred, 5))
    found, known = (
        [(align(x[None].clamp(0, 1), true[None], border=5)) for x, true in zip(deconvolve(y, k), s, strict=True)]
        for y, k, s in (batch, wrong)
    )
    errors = [torch.stack([(a.found - a.true).square().sum() for a in pairs]) for pairs in (found, known)]
    ratio = (errors[0] / errors[1]).log2().clamp(0, 4).mean().item()
    assert LogErrorRatio([wrong], net.deconvolution)(net) == pytest.approx(ratio, abs=1e-4)
    with pytest.raises(ValueError, match="batches is empty"):
        LogErrorRatio([], net.deconvolution)


def test_learning_lowers_the_kernel_error():
    """Many steps on one batch: the gradient through the iterations and scales points the right way."""
    problem = SyntheticBlurs(cartoon(48), crop=48, sides=(5, 5), sigmas=(1, 1))
    net = BlindDeconvolution(KernelEstimation(4), NonBlindDeconvolution(1))
    (batch,) = [next(problem.batches(2, seed=5))]
    start = KernelError()(net, batch).item()
    optimizer = torch.optim.Adam(net.kernel_estimation.parameters(), lr=0.03)
    best = start
    for _ in range(12):
        optimizer.zero_grad()
        loss = KernelError()(net, batch)
        loss.backward()
        optimizer.step()
        best = min(best, loss.item())
    assert best < 0.95 * start


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: motion_kernel(6, generator(0)), ValueError, "side must be odd"),
        (lambda: SyntheticBlurs(torch.rand(1, 1, 20, 20), crop=30), ValueError, "Choose a smaller crop"),
        (lambda: SyntheticBlurs(torch.rand(1, 1, 64, 64), crop=64, sides=(6, 9)), ValueError, "sides must be odd"),
        (
            lambda: SyntheticBlurs(torch.rand(1, 1, 64, 64), crop=32, sides=(5, 17)),
            ValueError,
            "less than half of crop",
        ),
        (
            lambda: SyntheticBlurs(torch.rand(1, 1, 64, 64), crop=64, sigmas=(0, 1)),
            ValueError,
            "sigmas must be positive",
        ),
        (
            lambda: SyntheticBlurs(torch.rand(1, 1, 64, 64), crop=64, widths=(0.9, 0.5)),
            ValueError,
            "widths must be positive, the lower one first",
        ),
        (lambda: SyntheticBlurs(torch.ones(1, 1, 64, 64).byte(), crop=64), TypeError, "images must be floating point"),
    ],
)
def test_bad_problems(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- Recorded blurs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_levins_images_with_their_kernels():
    """Recorded by a camera. Tuning by hand only; `benchmarks/deconvolution.py` has the trained figures."""
    data = load("levin09.npz")
    figures = []
    for i in range(4):
        for j in range(8):
            kernel = torch.from_numpy(data[f"kernel{j + 1}"][::-1, ::-1].copy()).float()[None, None]
            y, x = (torch.from_numpy(data[name][i, j])[None, None] for name in ("blurred", "sharp"))
            figures.append(psnr(*align(deconvolve(y, kernel).clamp(0, 1), x, subpixel=1)[:2]).item())
    assert sum(figures) / 32 > 31.0
