"""k-means as a layer and as a loop: exactness, gradients, invariances, and centres that never die."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as ScikitKMeans
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from systems_cluster import _loops
from torch import nn

from unrolled import Checkpointed, Tolerance, fit
from unrolled.cluster import (
    AnnealTemperature,
    DataPoints,
    KMeans,
    KMeansHead,
    KMeansPlusPlus,
    KMeansStep,
    fit_centres,
)
from unrolled.gradient import Implicit
from unrolled.solvers.kmeans import draw, kmeans_objective, kmeans_plus_plus, lloyd, soft_kmeans, unit

EXACT = {"rtol": 0.0, "atol": 1e-10}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def clouds(n=60, k=4, d=3, seed=0, spread=0.3):
    """k clouds around points of norm 3 or so."""
    which = torch.arange(n) % k
    return 3 * randn(k, d, seed=seed)[which] + spread * randn(n, d, seed=seed + 1), which


def head_on(x, k, seed=0, **options):
    head = KMeansHead(x.shape[1], k, dtype=x.dtype, **options)
    head.reset_centres(x, generator=seeded(seed))
    return head


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().data)


# ---- The layer is k-means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [False, True])
def test_logits_are_minus_the_squared_distances(spherical):
    x = randn(4, 7, 5, seed=1)
    head = KMeansHead(5, 3, spherical=spherical, dtype=torch.float64)
    nn.init.normal_(head.centres, generator=seeded(2))
    points, centres = (unit(x), unit(head.centres)) if spherical else (x, head.centres)
    expected = torch.cdist(points, centres[None]).square()
    linear = x if not spherical else unit(x)
    as_layer = linear @ head.weight.T + head.bias - linear.square().sum(-1, keepdim=True)
    torch.testing.assert_close(-head.logits(x), expected, **EXACT)
    torch.testing.assert_close(-as_layer, expected, **EXACT)
    torch.testing.assert_close(head.weight, 2 * centres)
    assert torch.equal(head.predict(x), expected.argmin(-1))
    torch.testing.assert_close(head(x).distances, expected, **EXACT)
    if spherical:
        torch.testing.assert_close(head.weight.norm(dim=1), torch.full((3,), 2.0).double())
        torch.testing.assert_close(head(7 * x).distances, expected, **EXACT)


def test_one_gradient_step_is_one_lloyd_iteration():
    """On the summed hard loss, with the step 1 / (2 n_j) for each centre: k-means is gradient descent."""
    x, _ = clouds(spread=2.0)
    head = head_on(x, 4, spherical=False)
    expected = lloyd(x, head.centres.detach(), num_iters=1)
    (gradient,) = torch.autograd.grad(len(x) * head.loss(x), head.centres)
    sizes = head.predict(x).bincount(minlength=4)
    by_gradient = head.centres - gradient / (2 * sizes[:, None])
    torch.testing.assert_close(by_gradient, expected, **EXACT)
    head.euclidean_step(x)
    torch.testing.assert_close(head.centres, expected, **EXACT)
    assert not torch.allclose(lloyd(x, expected, num_iters=1), expected), "more than one iteration was needed"


def test_an_endless_spherical_step_is_one_iteration_of_spherical_k_means():
    x, _ = clouds(spread=2.0)
    head = head_on(x, 4)
    expected = lloyd(x, head.centres.detach(), spherical=True, num_iters=1)
    head.spherical_step(x, 1e13)
    torch.testing.assert_close(head.centres, expected, **EXACT)


def test_a_spherical_step_has_its_length_and_stays_on_the_sphere():
    x, _ = clouds(spread=2.0)
    head = head_on(x, 4)
    before = head.centres.detach().clone()
    sums = torch.stack([unit(x)[head.predict(x) == j].sum(0) for j in range(4)])
    head.spherical_step(x, 0.1)
    torch.testing.assert_close(head.centres, unit(before + 0.1 * unit(sums)), **EXACT)
    for _ in range(30):
        head.spherical_step(x[:7], 0.3)  # some centres without samples among them
        torch.testing.assert_close(head.centres.norm(dim=1), torch.ones(4).double())


def test_sizes_of_samples_do_not_matter_to_the_spherical_head():
    x, _ = clouds(spread=2.0)
    scaled = x * (1 + torch.arange(len(x))[:, None])
    one, other = head_on(x, 4), head_on(scaled, 4)
    for _ in range(5):
        one.spherical_step(x)
        other.spherical_step(scaled)
    torch.testing.assert_close(one.centres, other.centres)
    torch.testing.assert_close(one.loss(x), other.loss(scaled))


def test_losses():
    x, _ = clouds(spread=2.0)
    head = head_on(x, 4, temperature=0.7, spherical=False)
    squares = torch.cdist(x, head.centres).square()
    P = torch.softmax(-squares / 0.7, 1)
    torch.testing.assert_close(head.loss(x), (P * squares).sum(1).mean(), **EXACT)
    torch.testing.assert_close(head(x).assignments, P, **EXACT)
    weights = torch.arange(60).double()
    expected = (weights[:, None] * P * squares).sum() / weights.sum()
    torch.testing.assert_close(head.loss(x, sample_weight=weights), expected, **EXACT)
    # Detached: the same value, the gradient of soft k-means.
    (gradient,) = torch.autograd.grad(head.loss(x), head.centres)
    torch.testing.assert_close(gradient, 2 * (P.sum(0)[:, None] * head.centres - P.T @ x) / 60, **EXACT)
    (through,) = torch.autograd.grad(head.loss(x, detach=False), head.centres)
    assert not torch.allclose(gradient, through, rtol=0.1)
    head.temperature = 0
    torch.testing.assert_close(head.loss(x), squares.amin(1).mean(), **EXACT)
    torch.testing.assert_close(head.loss(x) * 60, kmeans_objective(x, head.centres), **EXACT)


def test_the_published_loss_on_the_sphere():
    x, _ = clouds(spread=2.0)
    head = head_on(x, 4)
    nearest = head.weight[head.predict(x)]
    torch.testing.assert_close(head.loss(x), (2 - (nearest * unit(x)).sum(1)).mean(), **EXACT)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_gradcheck_of_the_loss(spherical, temperature):
    head = KMeansHead(3, 4, spherical=spherical, temperature=temperature, dtype=torch.float64)
    x = randn(6, 3, seed=3).requires_grad_()
    centres = randn(4, 3, seed=4).requires_grad_()

    def loss(x, centres):
        call = lambda module, x: module.loss(x, detach=False)
        return torch.func.functional_call(_Call(head, call), {"head.centres": centres}, x)

    assert torch.autograd.gradcheck(loss, (x, centres))


class _Call(nn.Module):
    """So that `functional_call` reaches a method."""

    def __init__(self, head, method):
        super().__init__()
        self.head, self.method = head, method

    def forward(self, x):
        return self.method(self.head, x)


def test_temperature_zero_is_the_limit():
    x, _ = clouds(spread=2.0)
    head = head_on(x, 4, spherical=False)
    hard = head(x).assignments
    assert torch.equal(hard.sum(1), torch.ones(60).double()) and torch.equal(hard.argmax(1), head.predict(x))
    head.temperature = 1e-4
    torch.testing.assert_close(head(x).assignments, hard, rtol=0, atol=1e-6)


def test_an_encoder_learns_through_the_head():
    torch.manual_seed(0)
    x, _ = clouds(n=200, k=3, d=8, spread=1.0)
    encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    head = KMeansHead(4, 3, temperature=0.1, dtype=torch.float64)
    head.reset_centres(encoder(x), generator=seeded(1))
    net = nn.Sequential(encoder, head)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    before = head.loss(encoder(x)).item()
    for _ in range(40):
        optimizer.zero_grad()
        head.loss(encoder(x)).backward()
        optimizer.step()
    assert head.loss(encoder(x)).item() < 0.2 * before
    assert all(parameter.grad.any() for parameter in net.parameters())


def test_annealing_in_fit():
    x, _ = clouds()
    head = head_on(x, 4)
    batches = ([x] for _ in iter(int, 1))
    anneal = AnnealTemperature(8, start=0.2, end=0.002)
    seen = []

    def loss(net, batch):
        seen.append(net.temperature)
        return net.loss(batch[0])

    head.temperature = anneal.temperature(0)
    fit(head, batches, loss, num_steps=12, callbacks=[anneal], optimizer=torch.optim.SGD(head.parameters(), lr=0.1))
    assert seen[0] == 0.2 and seen[4] == pytest.approx(0.02) and seen[8:] == pytest.approx([0.002] * 4)
    with pytest.raises(ValueError, match="Linear without a KMeansHead"):
        anneal(1, 0.0, nn.Linear(2, 2))


def test_the_head_is_a_module_like_any():
    x, _ = clouds()
    head = head_on(x, 4, temperature=0.3)
    twin = copy.deepcopy(head)
    other = KMeansHead(3, 4, temperature=0.3, dtype=torch.float64)
    other.load_state_dict(head.state_dict())
    for same in (twin, other):
        assert torch.equal(same(x).assignments, head(x).assignments)
    assert "num_clusters=4" in repr(head) and "temperature=0.3" in repr(head)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).assignments, head(x).assignments, **EXACT)
    mapped = torch.vmap(head)(x)
    torch.testing.assert_close(mapped.distances, head(x).distances, **EXACT)
    assert KMeansHead(3, 4, device="meta").centres.is_meta
    single = head_on(x.float(), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = single(x.bfloat16())
    assert out.distances.dtype == torch.float32
    torch.testing.assert_close(out.distances, single(x.bfloat16().float()).distances, rtol=0, atol=1e-6)


# ---- The solvers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_iters", [1, 3, 50])
def test_lloyd_is_scikit_learns(digits, num_iters):
    points = digits[:300]
    start = points[:8]
    weights = torch.linspace(0.5, 2, 300).double()
    peer = ScikitKMeans(8, init=start.numpy(), n_init=1, max_iter=num_iters, tol=0, algorithm="lloyd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopped on purpose
        peer.fit(points.numpy(), sample_weight=weights.numpy())
    found = lloyd(points, start, weights=weights, num_iters=num_iters)
    torch.testing.assert_close(found, torch.from_numpy(peer.cluster_centers_), **EXACT)
    inertia = kmeans_objective(points, found, weights=weights)
    assert inertia.item() == pytest.approx(peer.inertia_, rel=1e-9)
    torch.testing.assert_close(KMeans(num_iters, dtype=torch.float64)(points, start, weights), found, **EXACT)


def test_soft_k_means_becomes_lloyd():
    x, _ = clouds(spread=1.0)
    start = x[:4]
    cold = soft_kmeans(x, start, 1e-4, num_iters=5)
    torch.testing.assert_close(cold, lloyd(x, start, num_iters=5), rtol=0, atol=1e-6)
    hot = soft_kmeans(x, start, 1e6, num_iters=5)
    torch.testing.assert_close(hot, x.mean(0).expand(4, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("spherical", [False, True])
def test_whole_steps_against_loops(spherical):
    points = randn(2, 15, 3, seed=5)
    centres = points[:, :3]  # points of their own, so that none is empty
    for temperature in (0.0, 0.4):
        net = KMeans(6, temperature=temperature, spherical=spherical, dtype=torch.float64)
        expected = _loops(temperature, 1.0, spherical)(6, points, centres)
        torch.testing.assert_close(net(points, centres), expected, **EXACT)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 0.5]), scale=st.floats(0.1, 10))
def test_equivariance(seed, temperature, scale):
    """Moved, turned, scaled and shuffled points have moved, turned and scaled centres."""
    points, centres = randn(30, 3, seed=seed), randn(4, 3, seed=seed + 1)
    turn, shift = torch.linalg.qr(randn(3, 3, seed=seed + 2)).Q, randn(3, seed=seed + 3)
    order = torch.randperm(30, generator=seeded(seed))

    def run(x, c, tau):
        return soft_kmeans(x, c, tau, num_iters=4) if tau else lloyd(x, c, num_iters=4)

    def change(x):
        return scale * x @ turn + shift

    expected = change(run(points, centres, temperature))
    changed = run(change(points)[order], change(centres), temperature * scale**2)
    torch.testing.assert_close(changed, expected, rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), spherical=st.booleans(), temperature=st.sampled_from([0.0, 0.3]))
def test_a_weight_is_a_number_of_copies(seed, spherical, temperature):
    points, centres = randn(12, 3, seed=seed), randn(3, 3, seed=seed + 1)
    weights = torch.randint(0, 4, (12,), generator=seeded(seed))
    weights[0] = 1
    copies = points.repeat_interleave(weights, 0)
    net = KMeans(4, temperature=temperature, spherical=spherical, dtype=torch.float64)
    torch.testing.assert_close(net(points, centres, weights.double()), net(copies, centres), rtol=1e-8, atol=1e-8)
    for value in (kmeans_objective(points, centres, weights=weights.double(), spherical=spherical),):
        torch.testing.assert_close(value, kmeans_objective(copies, centres, spherical=spherical))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), step_size=st.floats(0.1, 1.9))
def test_the_objective_never_increases(seed, step_size):
    points = randn(40, 2, seed=seed)
    centres = points[:5]
    net = KMeans(6, step_size=step_size, dtype=torch.float64)
    values = [kmeans_objective(points, c).item() for c in (centres, *net.iterates(points, centres))]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))


# ---- The network -----------------------------------------------------------------------------------------------------


def test_gradients_through_the_fixed_point():
    """Implicit differentiation finds what backpropagation through all iterations does, with one iteration's memory."""
    points, _ = clouds(n=20, k=3, d=2, spread=0.8)
    start = kmeans_plus_plus(points, 3, generator=seeded(1))
    weights = randn(3, 2, seed=8)
    found = {}
    for name, gradient in (("all", Checkpointed(every=20)), ("implicit", Implicit(tol=1e-12))):
        net = KMeans(200, temperature=0.5, gradient=gradient, dtype=torch.float64)
        x = points.clone().requires_grad_()
        # Implicit takes its start for a constant: only points and temperature have a gradient here.
        (net(x, start) * weights).sum().backward()
        found[name] = (x.grad, net[0].log_temperature.grad)
        assert net[0].log_temperature.grad.abs() > 1e-4
    torch.testing.assert_close(found["implicit"], found["all"], rtol=1e-6, atol=1e-8)


def test_it_learns_its_temperature():
    """Centres of small sets, from noisy points: training lowers the error on other sets."""
    truth = randn(200, 3, 2, seed=1) * 2
    points = truth.repeat_interleave(6, 1) + 0.7 * randn(200, 18, 2, seed=2)
    start = points[:, ::6]
    net = KMeans(4, temperature=3.0, tied=False, dtype=torch.float64)

    def error(part):
        return (net(points[part], start[part]) - truth[part]).square().sum(-1).mean()

    before = error(slice(100, None)).item()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        error(slice(100)).backward()
        optimizer.step()
    assert error(slice(100, None)).item() < 0.9 * before
    assert len({step.temperature.item() for step in net}) == 4


def test_stopping_set_by_set():
    points, _ = clouds(n=30, k=3, d=2, spread=0.8)
    net = KMeans(50, stop=Tolerance(rtol=1e-9), dtype=torch.float64)
    start = points[:3]
    torch.testing.assert_close(net(points, start), lloyd(points, start, num_iters=50), **EXACT)


def test_no_division_by_zero():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).double()
    far = torch.tensor([[0.5, 0.0], [1e3, 1e3]]).double()  # nothing for the second centre, not even in softmax
    for temperature in (0.0, 0.01):
        out = KMeans(3, temperature=temperature, dtype=torch.float64)(points.requires_grad_(), far)
        torch.testing.assert_close(out[1], far[1])
        out.sum().backward()
        assert points.grad.isfinite().all()
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    out = KMeans(3, spherical=True, dtype=torch.float64)(opposite, torch.tensor([[0.0, 1.0]]).double())
    torch.testing.assert_close(out, torch.tensor([[0.0, 1.0]]).double())  # a sum of 0 has no direction


# ---- Starts ----------------------------------------------------------------------------------------------------------


def test_k_means_plus_plus_draws_by_squared_distance():
    points = torch.tensor([[0.0], [1.0], [3.0]]).double()
    sets = points.expand(20_000, -1, -1)
    first, second = kmeans_plus_plus(sets, 2, num_candidates=1, generator=seeded())[..., 0].T
    for value in (0.0, 1.0, 3.0):
        assert (first == value).double().mean().item() == pytest.approx(1 / 3, abs=0.02)
    from_zero = second[first == 0]
    assert (from_zero == 3).double().mean().item() == pytest.approx(9 / 10, abs=0.02)  # 9 against 1
    assert not (second == first).any()


def test_k_means_plus_plus_weights_and_candidates():
    points, _ = clouds(n=200, k=8, d=2, spread=0.1, seed=3)
    weights = torch.ones(200).double()
    weights[::2] = 0.0
    start = kmeans_plus_plus(points, 20, weights=weights, generator=seeded())
    assert not (start[:, None] == points[None, ::2]).all(-1).any()
    sets = points.expand(50, -1, -1)
    greedy, plain = (
        kmeans_objective(sets, kmeans_plus_plus(sets, 8, num_candidates=m, generator=seeded(1))).mean() for m in (5, 1)
    )
    assert greedy < 0.9 * plain
    assert torch.equal(*(kmeans_plus_plus(points, 8, generator=seeded(4)) for _ in range(2)))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_k_means_plus_plus_finds_every_distinct_point(data):
    """As many clusters as distinct points, or more: each of them is a centre, the rest are copies."""
    values = data.draw(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
    points = torch.tensor(values).double()[:, None] * 1e3 + 1e5
    k = data.draw(st.integers(1, len(values)))
    start = kmeans_plus_plus(points, k, generator=seeded(data.draw(st.integers(0, 99))))
    assert len(start.unique()) == min(k, len(set(values)))


def test_draw_never_takes_what_has_no_weight():
    weights = torch.tensor([0.0, 1e-300, 0.0, 3.0, 0.0])
    assert set(draw(weights.expand(500, -1), 3, seeded()).unique().tolist()) <= {1, 3}
    assert set(draw(torch.zeros(4), 200, seeded()).tolist()) == {0, 1, 2, 3}


def test_data_points():
    x = torch.arange(10.0)[:, None]
    assert len(DataPoints()(x, 10, generator=seeded()).unique()) == 10
    weights = torch.zeros(10)
    weights[3:5] = 1
    chosen = DataPoints()(x, 3, weights=weights, generator=seeded())
    assert {3.0, 4.0} < set(chosen.flatten().tolist())


# ---- Never a dead centre ---------------------------------------------------------------------------------------------


def test_revive():
    x, _ = clouds(n=400, k=6, d=3, spread=0.1)
    head = KMeansHead(3, 6, spherical=False, dtype=torch.float64)
    with torch.no_grad():
        head.centres.copy_(x[0] + 1e-3 * randn(6, 3, seed=1))
        head.centres[2:] += 100
    assert len(head.predict(x).unique()) <= 2
    moved = head.revive(x, generator=seeded(5))
    assert moved[2:].all()
    assert len(head.predict(x).unique()) == 6
    assert not head.revive(x, min_share=0.0).any()
    before = head.centres.detach().clone()
    head.revive(x[:3].expand(3, -1), min_share=0.0, generator=seeded(5))  # three samples cannot feed six
    assert head.centres.isfinite().all() and not torch.equal(before, head.centres)


def test_revive_stops_where_nothing_is_left():
    x = torch.ones(5, 2).double()
    head = KMeansHead(2, 3, spherical=False, dtype=torch.float64)
    with torch.no_grad():
        head.centres.copy_(torch.tensor([[1.0, 1.0], [5.0, 5.0], [9.0, 9.0]]))
    assert not head.revive(x).any()
    assert not head.predict(x).any()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_fit_centres_has_no_empty_cluster_and_no_nan(data):
    """Any number of clusters, any copies, either geometry: as many clusters live as there are distinct samples."""
    n, d = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 4))
    x = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=n * d, max_size=n * d))).double().view(n, d)
    spherical = data.draw(st.booleans())
    if spherical:
        x = torch.cat([x, torch.ones(n, 1)], 1)
    k = data.draw(st.integers(1, n))
    init = data.draw(st.sampled_from([KMeansPlusPlus(), DataPoints()]))
    found = fit_centres(x, k, spherical=spherical, num_restarts=2, num_steps=12, init=init, generator=seeded(n))
    distinct = len((unit(x) if spherical else x).mul(1e6).round().unique(dim=0))
    head = KMeansHead(x.shape[1], k, spherical=spherical, dtype=torch.float64)
    with torch.no_grad():
        head.centres.copy_(found.centres)
    assert found.centres.isfinite().all() and found.loss.isfinite()
    assert len(head.predict(x).unique()) == min(k, distinct)
    if k >= distinct:
        assert found.loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("k", [1, 100])
@pytest.mark.parametrize("spherical", [False, True])
def test_many_clusters_and_one(digits, k, spherical):
    found = fit_centres(digits, k, spherical=spherical, num_restarts=2, num_steps=60, generator=seeded())
    points = unit(digits) if spherical else digits
    labels = torch.cdist(points, found.centres).argmin(1)
    assert found.centres.isfinite().all() and len(labels.unique()) == k
    if k == 1:
        mean = unit(points.mean(0)) if spherical else points.mean(0)
        torch.testing.assert_close(found.centres[0], mean, rtol=0, atol=1e-9)
    else:
        peer = ScikitKMeans(k, n_init=1, random_state=0).fit(points.numpy())
        assert (
            kmeans_objective(digits, found.centres, spherical=spherical) < (1.12 if spherical else 1.05) * peer.inertia_
        )


def test_the_random_start_of_the_publication_dies_and_is_revived(digits):
    """Hard assignments from random directions leave centres without samples for ever, unless they are revived."""
    alive = {}
    for revive in (False, True):
        counts = []
        for seed in range(5):
            torch.manual_seed(seed)
            head = KMeansHead(64, 10, dtype=torch.float64)
            for epoch in range(10):
                for batch in digits[torch.randperm(1797)].split(256):
                    head.spherical_step(batch, 0.1 * (1 - epoch / 10))
                if revive and epoch < 9:
                    head.revive(digits, generator=seeded(seed))
            counts.append(len(head.predict(digits).unique()))
        alive[revive] = counts
    assert max(alive[False]) < 10
    assert alive[True] == [10] * 5


def test_restarts_choose_by_the_loss(digits):
    found = fit_centres(digits, 10, num_restarts=4, num_steps=150, generator=seeded(3))
    assert found.losses.shape == (4,) and found.losses.std() > 0
    assert found.loss < found.losses.min() + 1e-12
    best = kmeans_objective(digits, found.centres, spherical=True) / 1797
    assert best.item() == pytest.approx(found.loss.item(), rel=1e-9)
    one = lloyd(digits, found.centres, spherical=True, num_iters=100)
    assert found.loss <= kmeans_objective(digits, one, spherical=True) / 1797 * 1.001
    state = torch.random.get_rng_state()
    again = fit_centres(digits, 10, num_restarts=4, num_steps=150, generator=seeded(3))
    assert torch.equal(again.centres, found.centres)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: KMeansHead(3, 0), ValueError, "num_clusters must be at least 1"),
        (lambda: KMeansHead(3, 2.0), TypeError, "num_clusters must be an int"),
        (lambda: KMeansHead(3, 2, temperature=-1), ValueError, "temperature must be at least 0"),
        (lambda: KMeansHead(3, 2, init=KMeansPlusPlus), TypeError, "init must be an object"),
        (lambda: KMeansHead(3, 2, init="random"), TypeError, "init must be an object"),
        (lambda: KMeansHead(3, 2)(torch.ones(4, 2)), ValueError, r"x must have shape \(\.\.\., 3\)"),
        (lambda: KMeansHead(3, 2)(torch.ones(4, 3).double()), TypeError, "x is torch.float64"),
        (lambda: KMeansHead(3, 2)(torch.full((4, 3), torch.nan)), ValueError, "x has 12 NaN"),
        (lambda: KMeansHead(3, 2)(torch.ones(0, 3)), ValueError, "x is empty"),
        (lambda: KMeansHead(3, 2)(torch.zeros(4, 3)), ValueError, "x has 4 samples that are zero"),
        (lambda: KMeansHead(3, 5).reset_centres(torch.ones(4, 3)), ValueError, "x has 4 samples for 5 clusters"),
        (lambda: KMeansHead(3, 2).reset_centres(torch.ones(2, 4, 3)), ValueError, r"x must have shape \(n, 3\)"),
        (lambda: KMeansHead(3, 2).spherical_step(torch.ones(4, 3), 0.0), ValueError, "step_size must be greater"),
        (lambda: KMeansHead(3, 2).euclidean_step(torch.ones(4, 3)), ValueError, "spherical_step"),
        (lambda: KMeansHead(3, 2, spherical=False).spherical_step(torch.ones(4, 3)), ValueError, "euclidean_step"),
        (lambda: KMeansHead(3, 2).revive(torch.ones(4, 3), min_share=1.5), ValueError, "min_share must be at most 1"),
        (
            lambda: KMeansHead(3, 2).loss(torch.ones(4, 3), sample_weight=torch.ones(3)),
            ValueError,
            "sample_weight must have shape",
        ),
        (
            lambda: KMeansHead(3, 2).loss(torch.ones(4, 3), sample_weight=-torch.ones(4)),
            ValueError,
            "sample_weight must be at least 0",
        ),
        (
            lambda: KMeansHead(3, 2).loss(torch.ones(4, 3), sample_weight=torch.zeros(4)),
            ValueError,
            "sample_weight is zero everywhere",
        ),
        (lambda: KMeansPlusPlus(0), ValueError, "num_candidates must be at least 1"),
        (lambda: AnnealTemperature(5, end=0.0), ValueError, "end must be greater than 0"),
        (lambda: KMeansStep(step_size=0.0), ValueError, "step_size must be greater than 0"),
        (lambda: KMeans(temperature=-0.1), ValueError, "temperature must be at least 0"),
        (
            lambda: KMeans(spherical=True)(torch.zeros(3, 2), torch.ones(2, 2)),
            ValueError,
            "points has rows that are zero",
        ),
        (lambda: lloyd(torch.ones(3), torch.ones(2, 1)), ValueError, r"points must have shape \(\.\.\., n, d\)"),
        (lambda: lloyd(torch.ones(3, 1), torch.ones(1, 2, 1)), ValueError, "centres must have shape"),
        (lambda: lloyd(torch.ones(3, 1), torch.ones(2, 2)), ValueError, r"centres must have shape \(\.\.\., 1\)"),
        (lambda: lloyd(torch.zeros(3, 1), torch.ones(2, 1), spherical=True), ValueError, "rows that are zero"),
        (lambda: soft_kmeans(torch.ones(3, 1), torch.ones(2, 1), 0.0), ValueError, "For the limit 0 use lloyd"),
        (lambda: kmeans_plus_plus(torch.ones(3, 1), 4), ValueError, "num_clusters must be at most 3"),
        (
            lambda: kmeans_objective(torch.ones(3, 1), torch.ones(2, 1), weights=-torch.ones(3)),
            ValueError,
            "weights must be at least 0",
        ),
        (lambda: fit_centres(torch.ones(3, 1), 4, spherical=False), ValueError, "x has 3 samples for 4 clusters"),
        (lambda: fit_centres(torch.ones(3, 1), 2, num_restarts=0), ValueError, "num_restarts must be at least 1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_zero_code_is_harmless_where_looking_is_not_free():
    """As on an accelerator: the direction of 0 is 0, with a finite gradient."""
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    out = unit(x)
    out.sum().backward()
    assert not out.any() and x.grad.isfinite().all() and math.isfinite(out.sum().item())
