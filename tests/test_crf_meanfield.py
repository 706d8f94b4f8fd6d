"""CRFasRNN: pydensecrf's answers, masks, layouts, gradients, options; and the contract suite over the lattice."""

import itertools
import warnings

import numpy as np
import pytest
import test_contract
import torch
from systems_crf import LATTICE, SIZE, _inputs, kernel_matrix

from unrolled import Checkpointed, solvers
from unrolled.crf import (
    Bilateral,
    Compatibility,
    ConvWindow,
    CRFasRNN,
    CRFStep,
    Exact,
    Normalization,
    Permutohedral,
    SeparableSpatial,
    Spatial,
    Weights,
)

# ---- The contract ----------------------------------------------------------------------------------------------------

NOT_HELD = {
    "test_gradcheck": "the lattice has no gradient to the image; values and parameters are checked below",
    "test_export_with_a_dynamic_batch": "how many vertices there are depends on the data",
    "test_compile_fullgraph": "the lattice is left out of the graph; that the rest compiles is checked below",
    "test_vmap_and_per_sample_gradients": "how many vertices there are depends on the data",
}
PARAMETERS = {
    "test_every_parameter_learns": [{"tied": tied} for tied in (None, True, False)],
    "test_copies": [{"duplicate": test_contract.copy.deepcopy}, {"duplicate": test_contract.by_pickle}],
    "test_state_dict_round_trip": [{"assign": False}, {"assign": True}],
    "test_exact_gradient_strategies": [{"strategy": Checkpointed(every=2)}],
    "test_parameters_are_contiguous": [],  # asks for a folder, and for parameters that are those of CRF_SYSTEMS
}
LINES = [name for name in vars(test_contract) if name.startswith("test_")]


@pytest.mark.parametrize("line", [name for name in LINES if name not in NOT_HELD])
def test_the_lattice_holds_the_contract(line):
    for options in PARAMETERS.get(line, [{}]):
        getattr(test_contract, line)(LATTICE, **options)


def test_the_exceptions_are_lines_of_the_contract():
    assert set(NOT_HELD) < set(LINES) and set(PARAMETERS) < set(LINES)


# ---- The network -----------------------------------------------------------------------------------------------------


def crf(num_classes=3, kernels=None, **options):
    kernels = (Bilateral(theta_alpha=2.0, theta_beta=15.0), Spatial(theta_gamma=1.5)) if kernels is None else kernels
    return CRFasRNN(num_classes, kernels, **options, dtype=torch.float64)


@pytest.mark.parametrize("weights", Weights)
@pytest.mark.parametrize("compatibility", Compatibility)
def test_gradients_with_the_lattice(weights, compatibility):
    net = test_contract.perturbed(crf(weights=weights, compatibility=compatibility, num_iters=3))
    logits, image = _inputs(2)
    names, values = zip(*((name, p.detach().requires_grad_()) for name, p in net.named_parameters()))

    def call(logits, *values):
        return torch.func.functional_call(net, dict(zip(names, values)), (logits, image))

    assert torch.autograd.gradcheck(call, (logits.requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("how", Normalization)
@pytest.mark.parametrize("weights", Weights)
def test_normalizations_and_weights(how, weights):
    """Any normalisation, any form of the weights, a learned compatibility: the solver with dense matrices."""
    logits, image = _inputs(2)
    mu = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = {Weights.SCALAR: [0.7, 0.4]}.get(weights, [(0.7, 0.2, 0.4), (0.1, 0.5, 0.9)])
    kernels = (
        Bilateral(theta_alpha=2.0, theta_beta=15.0, filter=Exact(), normalization=how, weight=given[0]),
        Spatial(theta_gamma=1.5, filter=SeparableSpatial(), normalization=how, weight=given[1]),
    )
    net = crf(kernels=kernels, weights=weights, compatibility=Compatibility.LEARNED)
    with torch.no_grad():
        net[0].compatibility.copy_(mu)
    matrices = [
        torch.stack([kernel_matrix(one, alpha, beta, how.value) for one in image])
        for alpha, beta in ((2.0, 15.0), (1.5, None))
    ]
    expected = solvers.mean_field(
        logits.flatten(2), matrices, [torch.tensor(w, dtype=torch.float64) for w in given], compatibility=mu
    )
    torch.testing.assert_close(net(logits, image), expected.reshape(logits.shape), rtol=0, atol=1e-10)


def test_bandwidths_learn_and_stay_positive():
    """From far off, the bandwidth that made the target is found again."""
    logits, image = _inputs(4)

    def network(gamma):
        return crf(kernels=(Spatial(theta_gamma=gamma, learn=True),), weights=Weights.SCALAR, num_iters=2)

    target = network(1.2)(logits, image).detach()
    net = network(4.0)
    optimizer = torch.optim.Adam([net[0].bandwidths[0].log_theta_gamma], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (net(logits, image) - target).square().mean().backward()
        optimizer.step()
    theta = net[0].bandwidths[0]()["theta_gamma"]
    torch.testing.assert_close(theta, torch.tensor(1.2).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("filter", [Exact(), Permutohedral(), ConvWindow(5)], ids=repr)
def test_padding_is_as_if_it_were_not_there(filter):
    net = crf(kernels=(Bilateral(theta_alpha=2.0, theta_beta=15.0, filter=filter), Spatial(theta_gamma=1.5)))
    logits, image = _inputs(2)
    mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[0, :3, :4], mask[1] = True, True
    out = net(logits, image, mask)
    torch.testing.assert_close(out[:1, :, :3, :4], net(logits[:1, :, :3, :4], image[:1, :, :3, :4]), rtol=0, atol=1e-10)
    torch.testing.assert_close(out[1:], net(logits[1:], image[1:]), rtol=0, atol=1e-10)
    kept = ~mask[:, None].expand_as(out)
    assert torch.equal(out[kept], logits[kept])


def test_more_iterations_at_call_time():
    logits, image = _inputs(2)
    assert torch.equal(crf(num_iters=5)(logits, image, num_iters=10), crf(num_iters=10)(logits, image))


@pytest.mark.parametrize("filter", [Exact(), Permutohedral()], ids=repr)
def test_constant_and_one_pixel_images(filter):
    """One lattice cell. All pixels alike: each gets the mean of all as its message; one pixel: its own marginals."""
    net = crf(kernels=(Bilateral(theta_alpha=1e9, theta_beta=3.0, weight=2.0, filter=filter),), num_iters=1)
    logits, _ = _inputs(2)
    constant = torch.full((2, 3, *SIZE), 77.0, dtype=torch.float64)
    expected = logits + 2 * logits.softmax(1).mean((2, 3), keepdim=True)
    torch.testing.assert_close(net(logits, constant), expected, rtol=0, atol=1e-7)  # positions differ by 1e-9
    pixel = logits[:, :, :1, :1]
    torch.testing.assert_close(net(pixel, constant[:, :, :1, :1]), pixel + 2 * pixel.softmax(1), rtol=0, atol=1e-12)


def test_layouts_and_images_of_bytes():
    net = crf()
    logits, image = _inputs(2)
    image = (128 + image).round().clamp(0, 255)
    out = net(logits, image)
    for strided in (
        net(logits.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)),
        net(logits.mT.contiguous().mT, image.mT.contiguous().mT),
        net(logits, image.byte()),
        net(logits[None], image[None])[0],  # any batch dimensions
        torch.stack([net(*pair) for pair in zip(logits, image)]),  # or none
    ):
        torch.testing.assert_close(strided, out, rtol=0, atol=1e-12)


def test_single_precision_batch_is_per_image():
    """The gate of the issue, 1e-6 on marginals, with the defaults on images with structure."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.nn.functional.interpolate(3 * torch.randn(3, 5, 4, 6, generator=generator), size=(24, 36))
    image = (64 * logits[:, :3] + 128).clamp(0, 255) + 4 * torch.rand(3, 3, 24, 36, generator=generator)
    net = CRFasRNN(5)
    alone = torch.cat([net(logits[b : b + 1], image[b : b + 1]) for b in range(3)])
    assert (net(logits, image).softmax(1) - alone.softmax(1)).abs().max() <= 1e-6


def test_it_denoises():
    """Shapes of two colours, their labels with a fifth of them wrong: the CRF mends nearly all."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    truth = (((x - 30) ** 2 + (y - 20) ** 2) < 150).long()
    image = torch.stack([60.0 + 120 * truth, 90.0 - 40 * truth, 200.0 - 60 * truth])
    image = (image + 2 * torch.randn(3, 40, 60, generator=generator)).clamp(0, 255)
    wrong = torch.rand(40, 60, generator=generator) < 0.2
    noisy = torch.where(wrong, 1 - truth, truth)
    logits = 2.0 * torch.nn.functional.one_hot(noisy, 2).movedim(-1, 0).float()
    out = CRFasRNN(2)(logits, image).argmax(0)
    assert (noisy != truth).float().mean() > 0.15
    assert (out != truth).float().mean() < 0.01


def test_autocast_takes_half_precision_logits():
    net = crf().float()
    logits, image = (x.float() for x in _inputs(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(logits.bfloat16(), image)
    torch.testing.assert_close(out, net(logits.bfloat16().float(), image), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at one where the graph breaks
def test_compile_of_a_model_that_holds_the_layer():
    torch._dynamo.reset()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.crf = torch.nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64), crf()

        def forward(self, image):
            return self.crf(self.conv(image / 20), image)

    torch.manual_seed(0)
    model = Model()
    image = _inputs(2)[1]
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(image), model(image), rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(f(image).square().sum(), list(model.parameters())) for f in (compiled, model)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


def test_meta_and_reset():
    net = CRFasRNN(4, weights=Weights.PER_CLASS, compatibility=Compatibility.LEARNED, device="meta")
    net = net.to_empty(device="cpu")
    net[0].reset_parameters()
    for mine, theirs in zip(
        itertools.chain(net.parameters(), net.buffers()),
        itertools.chain(
            *(
                f()
                for f in (
                    CRFasRNN(4, weights=Weights.PER_CLASS, compatibility=Compatibility.LEARNED).parameters,
                    CRFasRNN(4).buffers,
                )
            )
        ),
    ):
        assert torch.equal(mine, theirs)


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_an_image_that_requires_a_gradient():
    logits, image = _inputs(1)
    with pytest.raises(RuntimeError, match="or detach the image"):
        crf()(logits, image.requires_grad_())


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), (3.0, 0.0)])
@pytest.mark.parametrize("name", ["theta_alpha", "theta_beta", "theta_gamma"])
def test_bandwidths_must_be_positive(name, theta):
    with pytest.raises(ValueError, match=f"{name} must be (greater than 0|finite)"):
        (Spatial if name == "theta_gamma" else Bilateral)(**{name: theta})


def test_bad_options():
    for call, error, message in (
        (lambda: CRFasRNN(0), ValueError, "num_classes must be at least 1"),
        (lambda: CRFasRNN(3, ()), ValueError, "kernels is empty"),
        (lambda: CRFasRNN(3, Bilateral()), TypeError, "kernels must be a sequence"),
        (lambda: CRFasRNN(3, weights="matrix"), TypeError, "weights must be one of Weights.SCALAR"),
        (lambda: CRFasRNN(3, compatibility="Potts"), TypeError, "compatibility must be one of Compatibility.POTTS"),
        (lambda: CRFasRNN(3, damping=1.0), ValueError, "damping must be less than 1"),
        (lambda: CRFasRNN(3, spatial_dims=0), ValueError, "spatial_dims must be at least 1"),
        (lambda: CRFasRNN(3, (Spatial(weight=(1.0, 2.0)),)), ValueError, "weight has 2 entries for 3 classes"),
        (lambda: CRFasRNN(2, (Spatial(weight=(1.0, 2.0)),), weights=Weights.SCALAR), ValueError, "one weight each"),
        (lambda: Bilateral(learn=True), ValueError, "learn=True needs a filter that is differentiable"),
        (lambda: Bilateral(color_range=0.0), ValueError, "color_range must be greater than 0"),
        (lambda: Bilateral(filter=Permutohedral), TypeError, "filter must be a filter object"),
        (lambda: Spatial(normalization="after"), TypeError, "normalization must be a Normalization"),
        (
            lambda: crf(kernels=(Bilateral(theta_beta=(1.0, 2.0, 3.0)),))(*_inputs(1)),
            ValueError,
            "the image 2 channels",
        ),
        (lambda: crf(kernels=(Spatial(theta_gamma=(1.0, 2.0, 3.0)),))(*_inputs(1)), ValueError, "2 spatial axes"),
        (lambda: crf()(_inputs(1)[0], 1e12 * _inputs(1)[1]), ValueError, "the limit is|more than 2"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_an_image_in_the_wrong_range_is_told():
    net, (logits, image) = CRFasRNN(3), (x.float() for x in _inputs(1))
    with pytest.warns(UserWarning, match="color_range is 255"):
        net(logits, image.sigmoid())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CRFasRNN(3, (Bilateral(color_range=1.0),))(logits, image.sigmoid())
        net(logits, torch.zeros_like(image))


def test_the_range_is_a_scale():
    logits, image = _inputs(2)
    levels = (128 + image).clamp(0, 255)
    small = crf(kernels=(Bilateral(color_range=1.0),))(logits, levels / 255)
    torch.testing.assert_close(small, crf(kernels=(Bilateral(),))(logits, levels), rtol=0, atol=1e-9)


def test_step_is_public():
    assert isinstance(crf()[0], CRFStep)


# ---- pydensecrf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("normalization", [Normalization.AFTER, Normalization.SYMMETRIC])
def test_agrees_with_pydensecrf(photo, normalization):
    """The same lattice, the same updates: differences are of single precision (pip install pydensecrf2)."""
    dcrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
    images = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    size, classes = (320, 480), 21
    image = torch.tensor(images.load_sample_image(photo)).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(image, size=size, mode="bilinear", antialias=True).round().byte()
    coarse = 3 * torch.randn(1, classes, 16, 24, generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")

    theirs = dcrf.DenseCRF2D(size[1], size[0], classes)
    theirs.setUnaryEnergy(-logits[0].flatten(1).numpy().copy())
    how = getattr(dcrf, f"NORMALIZE_{normalization.name}")
    theirs.addPairwiseGaussian(sxy=3, compat=3, normalization=how)
    pixels = image[0].permute(1, 2, 0).contiguous().numpy()
    theirs.addPairwiseBilateral(sxy=160, srgb=3, rgbim=pixels, compat=5, normalization=how)
    expected = torch.from_numpy(np.array(theirs.inference(10))).reshape(classes, *size)

    kernels = (Bilateral(normalization=normalization), Spatial(normalization=normalization))
    with torch.no_grad():
        found = CRFasRNN(classes, kernels)(logits, image, num_iters=10)[0].softmax(0)
    assert (found.argmax(0) == expected.argmax(0)).float().mean() >= 0.9999
    assert (found - expected).abs().mean() <= 1e-6
