"""AIR: windows against an independent sampler, the bound against a plain loop, counting, bad input, and learning."""

from __future__ import annotations

import copy
import inspect
import itertools
import math

import pytest
import systems_scene
import test_contract
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from unrolled import Checkpointed, Trace, fit
from unrolled.scene import (
    AIR,
    AIRStep,
    Enumerated,
    Found,
    GlimpseDecoder,
    GlimpseEncoder,
    Sampled,
    crop,
    fraction_located,
    paint,
    scenes,
)
from unrolled.stopping import Count, Halting, Reading

F64 = torch.float64
EXACT = {"rtol": 0.0, "atol": 1e-12}
quick = settings(deadline=None, max_examples=15, derandomize=True)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def small(**options) -> AIR:
    """9 x 8 canvases, so that the sides can't be confused; presence probabilities on both sides of a half."""
    torch.manual_seed(0)
    net = AIR((9, 8), **{"num_iters": 3, "glimpse": 4, "what_dim": 3, "hidden": 6, "dtype": F64, **options})
    with torch.no_grad():
        net.steps[0].outer.weight *= 8  # or else all samples decide alike
    return net


SCENES = rand(4, 1, 9, 8, seed=1) * torch.tensor([0.01, 0.3, 0.7, 1.0], dtype=F64)[:, None, None, None]

# ---- Windows ---------------------------------------------------------------------------------------------------------


def places(seed: int, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.2 + torch.rand(count, 1, generator=generator, dtype=F64)
    return torch.cat([scale, 2 * torch.rand(count, 2, generator=generator, dtype=F64) - 1], 1)


@quick
@given(st.integers(0, 1000))
def test_windows_are_those_of_an_affine_grid(seed):
    """torch's own sampler, to which the scale and place are an affine matrix."""
    where, canvas, window = places(seed), rand(5, 2, 9, 7, seed=seed), rand(5, 2, 4, 3, seed=seed)
    scale, x, y = where.unbind(1)
    zero = torch.zeros_like(scale)
    forward = torch.stack([scale, zero, x, zero, scale, y], 1).reshape(5, 2, 3)
    backward = torch.stack([1 / scale, zero, -x / scale, zero, 1 / scale, -y / scale], 1).reshape(5, 2, 3)
    cut = F.grid_sample(canvas, F.affine_grid(forward, [5, 2, 4, 3], align_corners=False), align_corners=False)
    put = F.grid_sample(window, F.affine_grid(backward, [5, 2, 9, 7], align_corners=False), align_corners=False)
    torch.testing.assert_close(crop(canvas, where, (4, 3)), cut, rtol=0, atol=1e-10)
    torch.testing.assert_close(paint(window, where, (9, 7)), put, rtol=0, atol=1e-10)


def test_what_is_painted_can_be_cut_out_again():
    """Windows on whole pixels, of the canvas's own pixel size: not a digit is lost."""
    window = rand(2, 1, 4, 4)
    # On a canvas of 8 x 8, left 2 and top 1, and left 4 and top 4.
    where = torch.tensor([[0.5, 0.0, -0.25], [0.5, 0.5, 0.5]], dtype=F64)
    canvas = paint(window, where, (8, 8))
    torch.testing.assert_close(canvas[0, :, 1:5, 2:6], window[0], **EXACT)
    torch.testing.assert_close(canvas[1, :, 4:, 4:], window[1], **EXACT)
    torch.testing.assert_close(canvas.sum(), window.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(crop(canvas, where, (4, 4)), window, **EXACT)


def test_windows_are_differentiable_in_picture_and_place():
    where = places(3, 2).requires_grad_()
    canvas, window = rand(2, 1, 6, 5).requires_grad_(), rand(2, 1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, w: crop(c, w, (3, 4)), (canvas, where))
    assert torch.autograd.gradcheck(lambda g, w: paint(g, w, (6, 5)), (window, where))


# ---- The model -------------------------------------------------------------------------------------------------------


def test_the_lstm_is_an_lstm():
    step = small()[0]
    cell = nn.LSTMCell(72 + step.noise_dim, 6, dtype=F64)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.cat([step.look.weight, step.recall.weight[:, 6:]], 1))
        cell.weight_hh.copy_(step.recall.weight[:, :6])
        # Ours has its gates in the order in, keep, value, out, which is torch's.
        cell.bias_ih.copy_(step.look.bias)
        cell.bias_hh.zero_()
    context = step.prepare(SCENES)
    state = step.init(context)
    hidden, memory = cell(torch.cat([SCENES.flatten(1), torch.zeros(4, step.noise_dim, dtype=F64)], 1))
    torch.testing.assert_close(state.hidden, hidden, **EXACT)
    for _ in range(2):
        state = step(state, context)
        found = torch.cat([state.where[:, 1:], state.what], 1)
        hidden, memory = cell(torch.cat([SCENES.flatten(1), found], 1), (hidden, memory))
        torch.testing.assert_close(state.hidden, hidden, **EXACT)
        torch.testing.assert_close(state.cell, memory, **EXACT)


def plain_bound(net: AIR, x: Tensor, noise: Tensor) -> Tensor:
    """The bound of one scene, (C, H, W), with torch.distributions: no enumeration in log space, no shared pieces."""
    Normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    step = net[0]
    D = step.place_dim
    context = step.prepare(x)
    state = step.init(context)
    canvas, nats, alive, bound, divergence = torch.zeros_like(x), 0.0, 1.0, 0.0, 0.0
    for t in range(len(net) + 1):
        p = state.logit.sigmoid() if t < len(net) else torch.zeros((), dtype=F64)
        log_likelihood = Normal(canvas, net.noise_sd).log_prob(x).sum()
        bound = bound + alive * (1 - p) * (log_likelihood - nats)
        if t == len(net):
            break
        coins = [torch.distributions.Bernoulli(q) for q in (p, torch.tensor(net.stop.prior, dtype=F64))]
        divergence = divergence + alive * kl(*coins)
        alive = alive * p
        out = step.outer(step.inner(state.hidden).relu())
        q_place = Normal(out[1 : 1 + D], F.softplus(out[1 + D :]) + 1e-4)
        place = q_place.mean + q_place.stddev * noise[t, :D]
        scale = [] if D == 2 else [step.scale_sd]
        prior = torch.tensor([*scale, step.position_sd, step.position_sd], dtype=F64)
        size = torch.full((1,), step.scale, dtype=F64) if D == 2 else step.scale * place[:1].exp()
        where = torch.cat([size, place[-2:]])
        mean, raw = step.encoder(crop(x, where, step.glimpse)[None])[0].chunk(2)
        q_what = Normal(mean, F.softplus(raw) + 1e-4)
        what = q_what.mean + q_what.stddev * noise[t, D:]
        nats = nats + kl(q_place, Normal(torch.zeros(D, dtype=F64), prior)).sum()
        nats = nats + kl(q_what, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum()
        canvas = canvas + paint(step.decoder(what[None])[0], where, x.shape[-2:])
        state = step(state, step.prepare(x, noise))
    return bound - divergence


@pytest.mark.parametrize("scale_sd", [None, 0.2])
def test_the_bound_is_that_of_a_plain_loop(scale_sd):
    net = small(scale_sd=scale_sd, prior=0.1, noise_sd=0.4)
    noise = net.noise(SCENES, torch.Generator().manual_seed(0))
    expected = torch.stack([plain_bound(net, x, e) for x, e in zip(SCENES, noise)])
    torch.testing.assert_close(net.elbo(SCENES, noise), expected, rtol=1e-9, atol=1e-8)


def test_the_bound_is_differentiable():
    """Every parameter gets the numeric gradient: presence, places, looks, encoder and decoder."""
    net = small(num_iters=2, scale_sd=0.2, prior=0.1)
    x = SCENES[1:2].clone().requires_grad_()
    noise = net.noise(x, torch.Generator().manual_seed(0))
    names, values = zip(*net.named_parameters())

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net.elbo(x, noise)

    def call(x, *tensors):
        return torch.func.functional_call(Bound(), {f"net.{n}": t for n, t in zip(names, tensors)}, (x,))

    tensors = tuple(value.detach().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(call, (x, *tensors), fast_mode=True)
    found = torch.autograd.grad(net.elbo(x, noise).sum(), values)
    assert all(gradient.any() for gradient in found)


def test_counting_locating_and_reconstructing_agree():
    net = small()
    number = net.count(SCENES)
    assert len(set(number.tolist())) > 1, "the scenes must differ for the test to say something"
    with Trace(net) as trace:
        out = net(SCENES)
    assert torch.equal(trace.num_iters, number)
    assert torch.equal(out, net.reconstruct(SCENES))
    found = net.locate(SCENES)
    assert torch.equal(found.present.sum(-1), number)
    assert found.boxes.shape == (4, 3, 4) and found.centres.shape == (4, 3, 2)
    # Boxes are squares of half the canvas's sides here: a glimpse of 4 on 9 x 8 covers the larger share, 4 / 8.
    sides = found.boxes[..., 2:] - found.boxes[..., :2]
    torch.testing.assert_close(sides, torch.tensor([4.0, 4.5], dtype=F64).expand(4, 3, 2), rtol=1e-12, atol=0)
    # What is painted lies in the boxes that are present.
    rows, columns = (torch.arange(side, dtype=F64) + 0.5 for side in (9, 8))
    for scene in range(4):
        inside = torch.zeros(9, 8, dtype=torch.bool)
        for box in found.boxes[scene, : number[scene]]:
            left, top, right, bottom = box + torch.tensor([-1, -1, 1, 1])  # interpolation reaches half a pixel further
            inside |= ((rows > top) & (rows < bottom))[:, None] & ((columns > left) & (columns < right))
        assert not out[scene, 0][~inside].any()
        assert bool(out[scene].any()) == bool(number[scene] > 0)


@pytest.mark.parametrize("scale_sd", [None, 0.2])
def test_a_scene_does_not_depend_on_its_batch(scale_sd):
    net = small(scale_sd=scale_sd)
    noise = net.noise(SCENES, torch.Generator().manual_seed(0))
    out, bound, number = net(SCENES), net.elbo(SCENES, noise), net.count(SCENES)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(net(SCENES[order]), out[order], **EXACT)
    for i in range(4):
        torch.testing.assert_close(net(SCENES[i]), out[i], **EXACT)
        torch.testing.assert_close(net.elbo(SCENES[i], noise[i]), bound[i], rtol=1e-12, atol=0)
        assert net.count(SCENES[i]) == number[i]
    torch.testing.assert_close(net(SCENES.reshape(2, 2, 1, 9, 8)), out.reshape(2, 2, 1, 9, 8), **EXACT)


def test_dreams():
    net = small()
    generator = torch.Generator().manual_seed(0)
    dream = net.sample(torch.tensor([0, 1, 3]), generator)
    assert dream.shape == (3, 1, 9, 8) and not dream[0].any() and dream[1].any()
    # Adding objects adds light.
    assert dream[2].sum() > dream[1].sum()
    assert net.sample(2).shape == (1, 1, 9, 8)


def test_colours_and_parts_of_ones_own():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3, dtype=F64)
            self.out = nn.Linear(4, 6, dtype=F64)

        def forward(self, glimpse):
            return self.out(self.convolution(glimpse).mean((2, 3)))

    net = AIR(
        (3, 9, 8), 2, glimpse=(4, 5), what_dim=3, encoder=Encoder(), decoder=GlimpseDecoder(3, (3, 4, 5)).double(),
        dtype=F64,
    )  # fmt: skip
    x = rand(2, 3, 9, 8)
    assert net(x).shape == x.shape and net.elbo(x).shape == (2,)
    assert net(x[0]).shape == x[0].shape
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x)) and repr(twin) == repr(net)


def test_it_begins_with_nearly_empty_glimpses():
    torch.manual_seed(0)
    drawn = GlimpseDecoder(10, (1, 10, 10))(torch.randn(50, 10))
    assert drawn.mean() < 0.2 and drawn.shape == (50, 1, 10, 10)
    assert GlimpseEncoder((1, 10, 10), 10)(drawn).shape == (50, 20)


# ---- Estimators ------------------------------------------------------------------------------------------------------


def test_sampling_has_the_gradient_of_enumeration_on_average():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -0.3], requires_grad=True)
    losses = torch.tensor([5.0, 1.0, 3.0], requires_grad=True)
    N = 100_000
    baseline = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    scene = torch.ones(N, 1, 2, 2)

    def gradients(estimator):
        count = Count(logits.expand(N, 2))
        return torch.autograd.grad(estimator(losses.expand(N, 3), count, 0.5, scene).mean(), (logits, losses))

    sampled = Sampled(baseline)
    sampled.eval()  # a fixed baseline
    for one, other in zip(gradients(sampled), gradients(Enumerated())):
        # Single draws of at most (5 + spread) on the logits: four standard errors are below 0.03.
        torch.testing.assert_close(one, other, rtol=0, atol=0.03)


def test_the_baseline_learns_and_touches_nothing_else():
    torch.manual_seed(0)
    baseline = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    sampled = Sampled(baseline)
    logits = torch.zeros(64, 2, requires_grad=True)
    scene = torch.rand(64, 1, 2, 2)
    losses = (100 + 10 * scene.sum((1, 2, 3)))[:, None].expand(64, 3)
    optimizer = torch.optim.Adam(sampled.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        sampled(losses, Count(logits), 0.5, scene).mean().backward()
        optimizer.step()
    guess = baseline(scene).detach().squeeze(1) * sampled.spread + sampled.mean
    assert (guess - losses[:, 0]).abs().max() < 1.0
    # A loss that is the same for every number leaves no gradient but that of the divergence.
    logits.grad = None
    count = Count(logits)
    (sampled(losses, count, 0.5, scene) - count.kl(0.5)).mean().backward()
    assert logits.grad.abs().max() < 0.02


@pytest.mark.parametrize("make", [Enumerated, lambda warmup: Sampled(nn.Flatten(), warmup=warmup)])
def test_a_warmup_counts_every_number_the_same(make):
    torch.manual_seed(0)
    logits = torch.full((2, 3), -9.0, requires_grad=True)
    losses = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(20_000, 1).requires_grad_()
    scene = torch.zeros(20_000, 1, 1, 1)
    estimator = make(warmup=2)
    for call in range(3):
        logits = torch.full((20_000, 3), -9.0, requires_grad=True)
        found = torch.autograd.grad(estimator(losses, Count(logits), 0.5, scene).mean(), (losses, logits))
        shares = found[0].sum(0)
        if call < 2:
            torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.02)
            assert not found[1].any()
        else:
            assert shares[0] > 0.99 and found[1].any()
    assert estimator.calls == 3
    fresh = make(warmup=2).eval()
    fresh(losses, Count(logits), 0.5, scene)
    assert fresh.calls == 0


# ---- Scenes ----------------------------------------------------------------------------------------------------------


def test_scenes_are_what_they_say():
    images = 0.5 + rand(6, 1, 4, 3) / 2
    x, number, centres = scenes(images, 300, 12, most=3, generator=torch.Generator().manual_seed(0))
    assert x.shape == (300, 1, 12, 12) and set(number.tolist()) == {0, 1, 2, 3}
    assert torch.equal((~centres.isnan().any(-1)).sum(1), number)
    for scene in range(300):
        # Every pixel of every image is above 0, so disjoint ones cover 12 pixels each.
        assert int((x[scene] > 0).sum()) == 12 * number[scene]
        for column, row in centres[scene, : number[scene]].tolist():
            top, left = round(row - 2), round(column - 1.5)
            patch = x[scene, :, top : top + 4, left : left + 3]
            assert (patch == images).flatten(1).all(1).any()


def test_overlapping_scenes_stay_in_range():
    images = torch.ones(2, 1, 6, 6)
    x, number, _ = scenes(images, 50, 8, most=2, overlap=True, generator=torch.Generator().manual_seed(0))
    assert x.max() == 1 and bool((x[number == 2].sum((1, 2, 3)) < 72).any())


def test_the_share_that_is_located():
    boxes = torch.tensor([[[0.0, 0, 4, 4], [4, 4, 8, 8]], [[0, 0, 4, 4], [0, 0, 0, 0]]])
    found = Found(boxes, torch.tensor([[True, True], [True, False]]))
    nan = float("nan")
    truth = torch.tensor([[[2.0, 2.0], [6.0, 7.9]], [[nan, nan], [nan, nan]]])
    assert fraction_located(found, truth) == 1.0
    assert fraction_located(found, truth, within=1.0) == 0.5
    # A window that is not present finds nothing, however near.
    truth = torch.tensor([[[2.0, 2.0], [nan, nan]], [[0.0, 0.0], [nan, nan]]])
    assert fraction_located(found, truth) == 0.5


# ---- Learning --------------------------------------------------------------------------------------------------------


def test_a_few_updates_go_through_fit():
    net = AIR(12, 2, glimpse=6, what_dim=3, hidden=8, estimator=Enumerated(warmup=2))
    batches = [torch.rand(5, 1, 12, 12)]
    history = fit(net, batches, AIR.loss, num_steps=4, seed=0)
    assert len(history) == 4 and net.estimator.calls == 4
    baseline = nn.Sequential(nn.Flatten(), nn.Linear(144, 1))
    fit(AIR(12, 2, glimpse=6, estimator=Sampled(baseline)), batches, AIR.loss, num_steps=2, seed=0)
    fit(AIR(12, 2, glimpse=6, tied=False, gradient=Checkpointed(1)), batches, AIR.loss, num_steps=2, seed=0)


@pytest.mark.slow
def test_it_learns_to_count_and_to_locate():
    """The example's recipe on one seed; the benchmark holds the claim on five."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parent.parent / "examples" / "attend_infer_repeat.py"
    spec = importlib.util.spec_from_file_location("attend_infer_repeat", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train, test = example.digit_scenes(seed=0)
        torch.manual_seed(0)
        net = example.build()
        example.train(net, train.x, num_steps=1500, seed=0)
    finally:
        torch.set_num_threads(threads)
    assert (net.count(test.x) == test.number).double().mean() >= 0.98
    assert fraction_located(net.locate(test.x), test.centres) >= 0.85


# ---- At the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AIR(8, glimpse=10), ValueError, r"glimpse \(10, 10\) is larger than the canvas \(8, 8\)"),
        (lambda: AIR((24, 9), glimpse=10), ValueError, "is larger than the canvas"),
        (lambda: AIR(24, 0, glimpse=10), ValueError, "num_iters must be at least 1"),
        (lambda: AIR(24, 2.0, glimpse=10), TypeError, "num_iters must be an int"),
        (lambda: AIR(0, glimpse=10), ValueError, "canvas must be at least 1"),
        (lambda: AIR("24", glimpse=10), ValueError, "canvas must be one number of pixels"),
        (lambda: AIR((1, 1, 24, 24), glimpse=10), ValueError, "canvas must be one number of pixels"),
        (lambda: AIR(24, glimpse=0), ValueError, "glimpse must be at least 1"),
        (lambda: AIR(24, glimpse=(4, 4, 4)), ValueError, "glimpse must be one number of pixels"),
        (lambda: AIR(24, glimpse=10, scale=0.0), ValueError, "scale must be greater than 0"),
        (lambda: AIR(24, glimpse=10, scale_sd=0.0), ValueError, "scale_sd must be greater than 0"),
        (lambda: AIR(24, glimpse=10, position_sd=-1.0), ValueError, "position_sd must be greater than 0"),
        (lambda: AIR(24, glimpse=10, noise_sd=0.0), ValueError, "noise_sd must be greater than 0"),
        (lambda: AIR(24, glimpse=10, prior=1.0), ValueError, "prior must be less than 1"),
        (lambda: AIR(24, glimpse=10, what_dim=0), ValueError, "what_dim must be at least 1"),
        (lambda: AIR(24, glimpse=10, estimator="nvil"), TypeError, "estimator must be an object such as Enumerated"),
        (lambda: AIR(24, glimpse=10, encoder=len), TypeError, "encoder must be a torch.nn.Module"),
        (lambda: Sampled(len), TypeError, "baseline must be a torch.nn.Module"),
        (lambda: Sampled(nn.Flatten(), momentum=1.0), ValueError, "momentum must be less than 1"),
        (lambda: Enumerated(warmup=-1), ValueError, "warmup must be at least 0"),
        (lambda: scenes(torch.rand(3, 8, 8), 4, 24), ValueError, r"images must have shape \(n, C, height, width\)"),
        (lambda: scenes(16 * torch.rand(3, 1, 8, 8), 4, 24), ValueError, r"images must lie in \[0, 1\]"),
        (lambda: scenes(torch.rand(3, 1, 8, 8), 4, 7), ValueError, "size must be at least 8"),
        (lambda: scenes(torch.rand(3, 1, 8, 8), 4, 9, most=2), ValueError, "found no place apart"),
        (lambda: crop(SCENES, torch.zeros(3, 3), (2, 2)), ValueError, "canvas must have shape"),
        (lambda: paint(SCENES, torch.zeros(4, 2), (2, 2)), ValueError, "window must have shape"),
        (lambda: crop(SCENES, torch.ones(4, 3), (2, 0)), ValueError, "size must be at least 1"),
        (lambda: small().sample(-1), ValueError, "number must be integers of at least 0"),
        (lambda: small().sample(torch.tensor([0.5])), ValueError, "number must be integers"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (rand(2, 3, 9, 8), ValueError, r"x must have shape \(\.\.\., 1, 9, 8\), got \(2, 3, 9, 8\)"),
        (rand(2, 1, 8, 9), ValueError, r"x must have shape"),
        (rand(9, 8), ValueError, r"x must have shape"),
        (torch.full((2, 1, 9, 8), math.nan, dtype=F64), ValueError, "x has 144 NaN or infinite"),
        (3 * rand(2, 1, 9, 8), ValueError, r"x must lie in \[0, 1\], got values from .* to 2.9"),
        (rand(2, 1, 9, 8) - 1, ValueError, r"x must lie in \[0, 1\]"),
        (255 * rand(2, 1, 9, 8), ValueError, r"far outside \[0, 1\]"),
        ((255 * rand(2, 1, 9, 8)).byte(), TypeError, "x must be floating point"),
        (rand(2, 1, 9, 8).float(), TypeError, "x is torch.float32"),
        (torch.empty(0, 1, 9, 8, dtype=F64), ValueError, "x is empty"),
        ("scene", TypeError, "x must be a torch.Tensor"),
    ],
)
def test_what_scenes_are_refused(x, error, message):
    net = small()
    for call in (net, net.count, net.locate):
        with pytest.raises(error, match=message):
            call(x)


def test_noise_and_parts_that_do_not_fit():
    net = small()
    with pytest.raises(ValueError, match=r"noise must have 5 entries an object, got 4"):
        net(SCENES, torch.zeros(4, 3, 4, dtype=F64))
    with pytest.raises(ValueError, match=r"noise must have shape \(\.\.\., T, 5\)"):
        net(SCENES, torch.zeros(3, 3, 5, dtype=F64))
    with pytest.raises(ValueError, match="encoder must return 6 numbers a glimpse"):
        AIR((9, 8), glimpse=4, what_dim=3, encoder=nn.Flatten(), dtype=F64)(SCENES)
    with pytest.raises(ValueError, match="decoder must return glimpses"):
        AIR((9, 8), glimpse=4, what_dim=3, decoder=nn.Linear(3, 4, dtype=F64), dtype=F64).elbo(SCENES)
    with pytest.raises(ValueError, match="baseline must return one number a scene"):
        AIR((9, 8), glimpse=4, estimator=Sampled(nn.Flatten()), dtype=F64).loss(SCENES)
    with pytest.raises(ValueError, match="centres hold no object"):
        fraction_located(net.locate(SCENES), torch.full((4, 2, 2), math.nan))


def test_another_head_may_decide():
    class Brightness(nn.Module):
        def forward(self, canvas):
            return 0.5 - canvas.sum((-3, -2, -1))

    net = small(stop=Halting(Reading(Brightness()), at_start=True))
    assert (net.count(SCENES) > 0).all() and net.elbo(SCENES).isfinite().all()


def test_it_lives_on_the_meta_device():
    net = AIR(24, glimpse=10, device="meta")
    assert isinstance(net[0], AIRStep) and all(p.is_meta for p in net.parameters())
    assert net(torch.empty(2, 1, 24, 24, device="meta")).shape == (2, 1, 24, 24)


# ---- The contract suite ----------------------------------------------------------------------------------------------


def contract():
    """(system, line, arguments of the line) for all that the rows promise."""
    for system in systems_scene.SCENE_SYSTEMS:
        for name, line in inspect.getmembers(test_contract, inspect.isfunction):
            if not name.startswith("test_") or name in systems_scene.UNFIT[system.name]:
                continue
            axes = [mark.args for mark in line.pytestmark if mark.name == "parametrize" and mark.args[0] != "system"]
            for index, values in enumerate(itertools.product(*(axis[1] for axis in axes))):
                arguments = dict(zip((axis[0] for axis in axes), values))
                yield pytest.param(system, line, arguments, id=f"{system.name}-{name[5:]}-{index}")


@pytest.mark.parametrize(("system", "line", "arguments"), list(contract()))
def test_the_lines_of_the_contract(system, line, arguments, tmp_path):
    if "tmp_path" in inspect.signature(line).parameters:
        arguments = {**arguments, "tmp_path": tmp_path}
    line(system=system, **arguments)


def test_what_is_left_out_exists():
    for name, lines in systems_scene.UNFIT.items():
        assert name in {system.name for system in systems_scene.SCENE_SYSTEMS}
        assert all(hasattr(test_contract, line) for line in lines)
