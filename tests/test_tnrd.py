"""TNRD: the classical start, the filters, data terms, tiles, weights that come along, and training."""

import math

import pytest
import scipy.fft
import test_contract
import torch
from data import load
from systems_image import NAMED, Halving, influence, pictures
from torch.nn.functional import conv2d, conv_transpose2d

from unrolled.image import TNRD, Downsampling, JPEGBox, _weights, quantisation_table, tiled
from unrolled.image._filters import adjoint, filtered
from unrolled.metrics.image import psnr
from unrolled.recipes.denoising import NegativePSNR, SquaredError, noisy_crops, refine_denoiser, train_denoiser
from unrolled.solvers.denoising import dct_atoms, dct_shrinkage, noise_part, symmetric_pad

# ---- The contract ----------------------------------------------------------------------------------------------------

NOT_HELD = {
    "test_tied_and_untied_start_the_same": "untied, later stages change nothing; tied, all stages shrink",
    "test_stopping_does_not_depend_on_batch_mates": "it asks that stopping changes the untrained answer; here later "
    "stages change nothing. IMAGE_SYSTEMS holds this line",
}
PARAMETERS = {
    "test_every_parameter_learns": [{"tied": tied} for tied in (None, True, False)],
    "test_copies": [{"duplicate": test_contract.by_pickle}],
    "test_state_dict_round_trip": [{"assign": False}, {"assign": True}],
    "test_compile_fullgraph": [{"stop": None}],
    "test_exact_gradient_strategies": [{"strategy": test_contract.Checkpointed(every=2)}],
}
LINES = [name for name in vars(test_contract) if name.startswith("test_")]


@pytest.mark.parametrize("line", [name for name in LINES if name not in NOT_HELD])
def test_the_network_holds_the_contract(line, tmp_path):
    paths = {"tmp_path": tmp_path} if line == "test_parameters_are_contiguous" else {}
    for options in PARAMETERS.get(line, [{}]):
        getattr(test_contract, line)(NAMED, **options, **paths)


def test_the_exceptions_are_lines_of_the_contract():
    assert set(NOT_HELD) < set(LINES) and set(PARAMETERS) < set(LINES)


# ---- The classical method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(3, 1), (5, 1), (4, 3), (1, 3)])
def test_atoms_are_the_cosines(size, channels):
    impulses = torch.eye(channels * size**2, dtype=torch.float64).reshape(-1, channels, size, size)
    wanted = scipy.fft.idctn(impulses.numpy(), axes=(1, 2, 3), norm="ortho")[1:]
    torch.testing.assert_close(dct_atoms(size, channels), torch.from_numpy(wanted), rtol=0, atol=1e-14)


def test_atoms_with_the_constant_are_a_tight_frame():
    atoms = torch.cat([torch.full((1, 1, 5, 5), 0.2, dtype=torch.float64), dct_atoms(5)])
    image = pictures(1)(1)[0]
    round_trip = conv_transpose2d(conv2d(image, atoms, padding=4), atoms, padding=4)
    torch.testing.assert_close(round_trip, 25 * image, rtol=0, atol=1e-12)


def test_shrinkage_patch_by_patch():
    """One patch's transform at a time, by SciPy."""
    m, sigma = 3, 20.0
    image = pictures(1)(1)[0]
    padded = symmetric_pad(255 * image[0, 0], 2 + 1)  # the filters see zeros beyond the margin of 2
    padded[[0, -1]] = 0
    padded[:, [0, -1]] = 0
    taken = torch.zeros_like(padded)
    for i in range(padded.shape[0] - 2):
        for j in range(padded.shape[1] - 2):
            x = torch.from_numpy(scipy.fft.dctn(padded[i : i + m, j : j + m].numpy(), norm="ortho"))
            noise = noise_part(x, sigma) / m**2
            noise[0, 0] = 0
            taken[i : i + m, j : j + m] += torch.from_numpy(scipy.fft.idctn(noise.numpy(), norm="ortho"))
    wanted = (padded - taken)[3:-3, 3:-3] / 255
    torch.testing.assert_close(dct_shrinkage(image, sigma, filter_size=m)[0, 0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("filter_size", [3, 5, 7])
@pytest.mark.parametrize("num_iters", [1, 3])
def test_untrained_is_the_shrinkage_itself(filter_size, num_iters):
    image = pictures(1)(2)[0]
    net = TNRD(num_iters, sigma=25, filter_size=filter_size, dtype=torch.float64)
    # By the table to rounding; by the formula as well as 63 Gaussians and a table give it.
    by_table = dct_shrinkage(image, 25, filter_size=filter_size, influence=influence(filter_size, 25))
    torch.testing.assert_close(net(image), by_table, rtol=0, atol=1e-10)
    torch.testing.assert_close(net(image), dct_shrinkage(image, 25, filter_size=filter_size), rtol=0, atol=2e-5)


def test_it_denoises_before_training():
    arrays = load("set12.npz")
    gains = []
    for seed, name in enumerate(arrays.files[:3]):
        clean = torch.from_numpy(arrays[name]).float()[None, None] / 255
        noisy = clean + 25 / 255 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        out = dct_shrinkage(noisy, 25.0)
        gains.append(10 * math.log10((noisy - clean).square().mean() / (out - clean).square().mean()))
    assert min(gains) > 7  # all twelve, clipped: 28.6 dB on average, from 20.3


def test_a_constant_image_stays():
    net = test_contract.perturbed(TNRD(3, filter_size=3, dtype=torch.float64, padding=14))
    with torch.no_grad():
        for step in net.steps:  # influence functions with phi(0) = 0
            step.influence.weight -= step.influence.weight.flip(1)
    image = torch.full((1, 1, 8, 9), 0.3, dtype=torch.float64)
    # Filters have mean 0, and a table of odd curves is odd: what reaches inwards from the zero border is cropped.
    torch.testing.assert_close(net(image), image, rtol=0, atol=1e-12)


# ---- Filters ---------------------------------------------------------------------------------------------------------


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1, 9, 8), (2, 3, 6, 7)])
@pytest.mark.parametrize("m", [3, 5])
def test_the_adjoint_is_the_adjoint(shape, m):
    u, kernels = draw(*shape), draw(4, shape[1], m, m, seed=1)
    v = draw(shape[0], 4, *shape[2:], seed=2)
    torch.testing.assert_close((filtered(u, kernels) * v).sum(), (u * adjoint(v, kernels)).sum())
    plain = conv_transpose2d(v, kernels, padding=m // 2)
    torch.testing.assert_close(adjoint(v, kernels), plain, rtol=0, atol=1e-12)


def test_gradients_of_the_filters():
    u, v, kernels = draw(2, 2, 6, 5), draw(2, 3, 6, 5), draw(3, 2, 3, 3)
    for function, x in ((filtered, u), (adjoint, v)):
        inputs = (x.requires_grad_(), kernels.requires_grad_())
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_filters_keep_norm_and_mean():
    step = test_contract.perturbed(TNRD(2, filter_size=5, channels=3, dtype=torch.float64))[1]
    kernels = step.kernels
    assert kernels.shape == (74, 3, 5, 5)
    torch.testing.assert_close(kernels.flatten(1).norm(dim=1), torch.ones(74, dtype=torch.float64))
    torch.testing.assert_close(kernels.flatten(1).sum(1), torch.zeros(74, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("filter_size", "num_iters", "count"), [(5, 5, 10_445), (7, 5, 26_645), (5, 3, 6_267)])
def test_number_of_parameters(filter_size, num_iters, count):
    """T (n (m^2 - 1) + 63 n + 1) with n = m^2 - 1 filters."""
    net = TNRD(num_iters, filter_size=filter_size)
    assert sum(p.numel() for p in net.parameters()) == count


def test_the_reaction_is_never_negative_and_learns_from_zero():
    net = TNRD(2, filter_size=3, dtype=torch.float64)
    step = net[1]
    assert step.reaction == 0
    (slope,) = torch.autograd.grad(step.reaction, step.raw_reaction)
    assert slope == 1
    step.raw_reaction.data.fill_(-0.3)
    assert step.reaction == 0.3


# ---- Images of all kinds ---------------------------------------------------------------------------------------------


def trained_like():
    """Away from the start, but tame: influence functions of a few grey levels."""
    net = TNRD(3, filter_size=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for step in net.steps:
            step.influence.weight += torch.randn(step.influence.weight.shape, generator=generator).double()
            step.coefficients += 0.1 * torch.randn(step.coefficients.shape, generator=generator).double()
            step.raw_reaction += 0.1
    return net


def test_channels_are_images_of_their_own():
    net = trained_like()
    image = pictures(3)(2)[0]
    whole = net(image)
    for c in range(3):
        torch.testing.assert_close(whole[:, c : c + 1], net(image[:, c : c + 1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_the_range_is_a_unit(data_range):
    image = pictures(1)(1)[0]
    one = TNRD(2, filter_size=3, dtype=torch.float64)
    other = TNRD(2, filter_size=3, dtype=torch.float64, data_range=data_range)
    torch.testing.assert_close(other(data_range * image), data_range * one(image), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (31, 17)])
def test_any_size(size):
    net = TNRD(2, filter_size=7)
    assert net(torch.rand(2, 1, *size)).shape == (2, 1, *size)


@pytest.mark.parametrize("size", [7, 16, 100])
def test_tiles_have_no_seams(size):
    net = trained_like()
    image = draw(1, 2, 37, 41) / 5
    whole = net(image).detach()
    parts = tiled(net, image, size=size, margin=net.reach).detach()
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    if size < 37:  # with a smaller margin there are
        seams = tiled(net, image, size=size, margin=1).detach()
        assert (seams - whole).abs().max() > 1e-4


def test_no_pixel_sees_further_than_the_reach():
    net = trained_like()
    image = draw(1, 1, 41, 41) / 5
    changed = image.clone()
    changed[..., 20, 20] += 0.1
    far = torch.ones(41, 41, dtype=torch.bool)
    r = net.reach
    far[20 - r : 21 + r, 20 - r : 21 + r] = False
    difference = (net(changed) - net(image)).abs()[0, 0]
    assert difference[far].max() < 1e-13 and difference.max() > 1e-2


# ---- Data terms ------------------------------------------------------------------------------------------------------


def test_a_start_of_ones_own():
    net = trained_like()
    image, start = pictures(1)(2)[0], pictures(1)(2)[0].flip(-1)
    torch.testing.assert_close(net(image, image), net(image), rtol=0, atol=1e-12)
    assert (net(image, start) - net(image)).abs().max() > 0.01


def test_the_data_term_is_a_gradient_step():
    """Without diffusion a stage is u - lambda A^T (A u - f)."""
    A = Halving()
    net = TNRD(1, filter_size=3, operator=A, dtype=torch.float64)
    torch.nn.init.zeros_(net[0].influence.weight)
    net[0].raw_reaction.data.fill_(0.4)
    u, f = pictures(1)(2)[0], A(pictures(1)(2)[0].flip(-1))
    torch.testing.assert_close(net(f, u), u - 0.4 * A.adjoint(A(u) - f), rtol=0, atol=1e-12)


def test_another_operator_shares_the_parameters():
    net = TNRD(2, filter_size=3, operator=Downsampling(2, (1, 8, 8), dtype=torch.float64), dtype=torch.float64)
    large = Downsampling(2, (1, 12, 10), dtype=torch.float64)
    other = net.with_operator(large)
    assert other(draw(1, 1, 6, 5)).shape == (1, 1, 12, 10)
    assert net(draw(1, 1, 4, 4)).shape == (1, 1, 8, 8)
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in net.parameters()]
    with pytest.raises(TypeError, match="operator must be a LinearOperator"):
        TNRD(2, filter_size=3).with_operator(large)


def test_downsampling_is_the_bicubic_one():
    A = Downsampling(2, (1, 16, 20), dtype=torch.float64)
    image = draw(2, 1, 16, 20)
    wanted = torch.nn.functional.interpolate(image, (8, 10), mode="bicubic", antialias=True)
    torch.testing.assert_close(A(image)[..., 2:-2, 2:-2], wanted[..., 2:-2, 2:-2])  # PyTorch's borders differ
    y = draw(2, 1, 8, 10, seed=3)
    torch.testing.assert_close((A(image) * y).sum(), (image * A.adjoint(y)).sum())
    assert A.enlarge(torch.ones(3, 1, 8, 10, dtype=torch.float64)).allclose(torch.ones(3, 1, 16, 20).double())
    with pytest.raises(ValueError, match="divisible by 2"):
        Downsampling(2, (1, 5, 8))


def test_the_box_of_a_compressed_image():
    box = JPEGBox(quantisation_table(10).double())
    image = 128 + 40 * draw(2, 16, 24)
    decoded = box.compress(image)
    coefficients = torch.from_numpy(scipy.fft.dctn((decoded[0, :8, 8:16] - 128).numpy(), norm="ortho"))
    steps = coefficients / box.table
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    # The image itself lies in the box; the nearest point of the box is one that does not move; it is nearer than f.
    torch.testing.assert_close(box(image, decoded), image, rtol=0, atol=1e-10)
    u = decoded + 30 * draw(2, 16, 24, seed=1)
    near = box(u, decoded)
    torch.testing.assert_close(box(near, decoded), near, rtol=0, atol=1e-10)
    torch.testing.assert_close(box.compress(decoded + 0.999 * (near - decoded)), decoded, rtol=0, atol=1e-9)
    assert ((near - u).norm() < (decoded - u).norm()) and ((near - u).norm() < (image - u).norm())


def test_a_network_that_projects():
    box = JPEGBox(quantisation_table(10).double())
    net = TNRD(2, sigma=10, filter_size=3, projection=box, dtype=torch.float64)
    decoded = box.compress(128 + 40 * draw(1, 1, 16, 16)) / 255
    out = net(decoded).detach()
    assert (out - decoded).abs().max() > 1e-3
    inside = decoded + 0.999 * (out - decoded)  # a hair from the faces of the box, where rounding is a tie
    torch.testing.assert_close(box.compress(255 * inside), 255 * decoded, rtol=0, atol=1e-9)
    assert not any("reaction" in name for name, _ in net.named_parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": 0}, ValueError, "sigma must be greater than 0, got 0. It is the noise in grey levels"),
        ({"filter_size": 4}, ValueError, "filter_size must be odd"),
        ({"filter_size": 1}, ValueError, "filter_size must be at least 3"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"data_range": 0.0}, ValueError, "data_range must be greater than 0"),
        ({"operator": torch.eye(3)}, TypeError, "operator must be an unrolled.operators.LinearOperator"),
        ({"projection": 3}, TypeError, "projection must be called as"),
        ({"operator": Halving(), "projection": abs}, ValueError, "two data terms"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TNRD(2, **options)


# ---- Weights and training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [15, 25, 50])
def test_trained_weights_come_along(sigma):
    net = TNRD.pretrained(sigma=sigma)
    (photo,) = photographs()[:1]
    noisy = photo + sigma / 255 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = psnr(net(noisy).clamp(0, 1), photo).item()
    classical = psnr(dct_shrinkage(noisy, sigma).clamp(0, 1), photo).item()
    assert trained > classical + 0.25  # 0.33 dB at 15, more at 25 and 50, on this busy piece
    assert not net.training


def test_weights_are_small_and_load_without_pickle():
    files = list(_weights.FOLDER.glob("*.npz"))
    assert files and sum(path.stat().st_size for path in files) < 1_000_000
    with pytest.raises(ValueError, match=r"no weights tnrd_5x5_sigma33; there are .*tnrd_5x5_sigma15, "):
        TNRD.pretrained(sigma=33)


def test_weights_that_are_written_can_be_read(tmp_path, monkeypatch):
    net = trained_like().float()
    _weights.save(net, tmp_path / "tnrd_3x3_sigma7.npz")
    monkeypatch.setattr(_weights, "FOLDER", tmp_path)
    image = torch.rand(1, 1, 8, 8)
    assert torch.equal(TNRD.pretrained(sigma=7, filter_size=3)(image), net(image))


def photographs(side=128):
    """Scikit-learn's two, grey."""
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(image).float().mean(-1)[None, None] / 255 for image in load_sample_images().images]
    return [image[..., 100 : 100 + side, 200 : 200 + side] for image in images]


def test_the_mean_psnr_can_be_trained_for():
    net = TNRD(num_iters=2, sigma=25, filter_size=3, data_range=2.0)
    clean = 2 * torch.cat(photographs(48))
    noisy = clean + 50 / 255 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    loss = NegativePSNR(data_range=2.0)
    found = psnr(net(noisy), clean, data_range=2.0).mean().item()
    assert -loss(net, (noisy, clean)).item() == pytest.approx(found, rel=1e-5)
    history = train_denoiser(net, clean, sigma=25, num_steps=3, crop=32, batch_size=2, loss=loss)
    assert -40 < history.loss[-1] < -10


@pytest.mark.parametrize("greedy_steps", [0, 8])
def test_training_lowers_the_error(greedy_steps):
    train, held_out = photographs()
    net = TNRD(2, sigma=10, filter_size=3)  # untrained it is for less noise than it gets
    noisy = held_out + 25 / 255 * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    before = psnr(net(noisy), held_out).item()
    history = train_denoiser(net, train, sigma=25, num_steps=100, greedy_steps=greedy_steps, crop=48)
    assert len(history) == 100 + 2 * greedy_steps
    assert [stage.layers for stage in history.stages] == ([1, 2, 2] if greedy_steps else [2])
    assert psnr(net(noisy), held_out).item() > before + 0.5
    assert all(p.requires_grad for p in net.parameters())


def test_refinement_lowers_the_loss():
    train, _ = photographs(48)
    net = TNRD(2, filter_size=3)
    batch = next(noisy_crops(train, 25, crop=40, batch_size=2))
    loss = SquaredError()
    before = loss(net, batch).item()
    history = refine_denoiser(net, batch, num_steps=5)
    assert history.loss[0] == pytest.approx(before)
    assert loss(net, batch).item() < 0.95 * before


def test_crops_are_drawn_from_the_images():
    images = torch.arange(3 * 10 * 12).reshape(3, 1, 10, 12).double() / 360
    noisy, clean = next(noisy_crops(images, 25, crop=4, batch_size=3, seed=1))
    assert noisy.shape == clean.shape == (3, 1, 4, 4) and noisy.dtype == torch.float64
    ends = {round(float(c.min()) * 360) // 120 for c in clean}
    assert ends == {0, 1, 2}  # each of another image
    steps = {
        tuple(
            sorted(
                (
                    round(float((c[0, 0, 1] - c[0, 0, 0]).abs()) * 360),
                    round(float((c[0, 1, 0] - c[0, 0, 0]).abs()) * 360),
                )
            )
        )
        for c in clean
    }
    assert steps == {(1, 12)}  # flipped and transposed, but neighbours stay neighbours
    again = next(noisy_crops(images, 25, crop=4, batch_size=3, seed=1))
    assert torch.equal(noisy, again[0])
    with pytest.raises(ValueError, match="crop must be at most 10"):
        noisy_crops(images, 25, crop=11)
    with pytest.raises(ValueError, match=r"images must have shape \(N, C, height, width\)"):
        noisy_crops(images[0], 25)
