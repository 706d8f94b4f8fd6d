"""PSNR, SSIM and the error ratio: against formulas written out, scikit-image where it is installed, known shifts."""

import math

import numpy as np
import pytest
import torch

from unrolled.metrics import align, error_ratio, psnr, ssim


def images(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smooth(*shape, seed=0):
    """White noise through a box of 5 x 5, so that fractions of a pixel mean something."""
    noise = images(*shape[:-2], shape[-2] + 4, shape[-1] + 4, seed=seed)
    return noise.unfold(-2, 5, 1).unfold(-2, 5, 1).mean((-2, -1))


def test_psnr_by_hand():
    true = images(3, 2, 4, 5)
    found = true + torch.tensor([0.1, 0.01, 0.0])[:, None, None, None]
    assert psnr(found, true)[:2].tolist() == pytest.approx([20.0, 40.0])
    assert psnr(found, true)[2] == math.inf
    assert psnr(255 * found, 255 * true, data_range=255)[0].item() == pytest.approx(20.0)
    one = torch.tensor([[[0.0, 3.0], [0.0, 4.0]]])  # errors 3 and 4 in four pixels: 25 / 4
    assert psnr(one, torch.zeros(1, 2, 2)).item() == pytest.approx(10 * math.log10(4 / 25))


def test_ssim_by_hand():
    """Entry by entry, for one image of the least size, where the window fits once."""
    a, b = images(1, 11, 11, seed=1), images(1, 11, 11, seed=2)
    weight = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weight /= weight.sum()
    x, y = a[0].numpy(), b[0].numpy()
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy, cov = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum(), (weight * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-12)
    assert ssim(255 * a, 255 * b, data_range=255).item() == pytest.approx(expected, abs=1e-12)


def test_ssim_is_one_of_itself_symmetric_and_one_figure_an_image():
    a, b = images(2, 3, 20, 24, seed=1), images(2, 3, 20, 24, seed=2)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(ssim(a, b), ssim(b, a))
    torch.testing.assert_close(ssim(a, b)[1:], ssim(a[1:], b[1:]))


def test_against_scikit_image():
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = smooth(1, 40, 37, seed=1), smooth(1, 40, 37, seed=2)
    x, y = a[0].numpy(), b[0].numpy()
    expected = skimage.structural_similarity(
        x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-7)
    assert psnr(a, b).item() == pytest.approx(skimage.peak_signal_noise_ratio(y, x, data_range=1.0))


@pytest.mark.parametrize("shift", [(0, 0), (2, -3), (-5, 5), (5, 0)])
def test_whole_shifts_are_found(shift):
    true = smooth(2, 1, 50, 44)
    moved = true.roll(shift, (-2, -1))
    found = align(moved, true)
    assert found.shift.tolist() == [list(shift)] * 2
    assert torch.equal(found.found, found.true)
    assert torch.equal(found.true, true[..., 15:-15, 15:-15])


def test_fractions_are_found_and_can_be_left_out():
    image = smooth(1, 60, 60)
    true = 0.25 * image + 0.75 * image.roll(-1, -1)  # what bilinear interpolation makes of the image at 0.75 pixels
    found = align(image.roll(2, -2), true)
    assert found.shift.tolist() == [2.0, 0.75]
    torch.testing.assert_close(found.found, found.true)
    whole = align(image.roll(2, -2), true, subpixel=1)
    assert whole.shift.tolist() == [2.0, 1.0]
    assert (whole.found - whole.true).abs().max() > 0.01


def test_no_shift_beyond_the_largest():
    true = smooth(1, 50, 50)
    found = align(true.roll(4, -1), true, max_shift=2, subpixel=4)
    assert found.shift.abs().max() <= 2
    assert align(true.roll(1, -1), true, max_shift=0).shift.tolist() == [0.0, 0.0]


def test_error_ratio_is_of_squares_and_forgives_shifts():
    true = smooth(2, 1, 50, 50)
    noise = 0.01 * images(2, 1, 50, 50, seed=3)
    reference, found = true + noise, true + 2 * noise
    torch.testing.assert_close(error_ratio(found, reference, true, subpixel=1), torch.full((2,), 4.0).double())
    shifted = found.roll((3, -2), (-2, -1))
    torch.testing.assert_close(error_ratio(shifted, reference, true, subpixel=1), torch.full((2,), 4.0).double())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: psnr(torch.ones(1, 4, 4, dtype=torch.uint8), torch.ones(1, 4, 4)),
            TypeError,
            "found must be floating",
        ),
        (lambda: psnr(torch.ones(1, 4, 4), torch.ones(1, 4, 5)), ValueError, "found and true must have one shape"),
        (lambda: psnr(torch.ones(4, 4), torch.ones(4, 4)), ValueError, "found must have shape"),
        (lambda: psnr(torch.ones(1, 4, 4) / 0, torch.ones(1, 4, 4)), ValueError, "found has 16 NaN or infinite"),
        (lambda: psnr(images(1, 4, 4), images(1, 4, 4), data_range=0), ValueError, "data_range must be greater than 0"),
        (lambda: ssim(images(1, 10, 20), images(1, 10, 20)), ValueError, "at least 11 x 11"),
        (lambda: align(images(1, 40, 40), images(1, 40, 40), border=3), ValueError, "border must be at least 5"),
        (lambda: align(images(1, 30, 40), images(1, 30, 40)), ValueError, "border=15 leaves nothing"),
        (lambda: align(images(1, 40, 40), images(1, 40, 40), subpixel=0), ValueError, "subpixel must be at least 1"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
