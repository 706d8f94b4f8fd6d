"""Diffusion from seeds: the system, its gradients, the maximum principle, and the greedy choice of seeds."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unrolled.image.elliptic import grid_edges, solve_elliptic
from unrolled.image.seeded import SeededDiffusion
from unrolled.image.seeds import greedy_seeds
from unrolled.solvers.diffusion import seeded_diffusion

few = settings(deadline=None, max_examples=25)
H, W = 4, 5
EDGES = grid_edges(H, W)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def graph(seed: int, n: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A chain with some edges more: edges, weights (E,), absorption, guidance and value (N,)."""
    generator = torch.Generator().manual_seed(seed)
    chain = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
    first = torch.randint(0, n - 2, (n,), generator=generator)
    more = torch.stack([first, first + 2])
    edges = torch.cat([chain, more], 1)
    weights = torch.rand(edges.shape[1], dtype=torch.float64, generator=generator) ** 3
    absorption, guidance, value = torch.rand(3, n, dtype=torch.float64, generator=generator)
    return edges, weights, 0.01 + absorption / 5, guidance, value


def module(**options) -> SeededDiffusion:
    return SeededDiffusion(2, 3, contrast=60.0, absorption=0.2, dtype=torch.float64, **options)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return rand(batch, 2, H, W), rand(batch, 3, H, W, seed=1), rand(batch, H, W, seed=2) > 0.85


# ---- The system ------------------------------------------------------------------------------------------------------


def test_edges_of_a_grid():
    pairs = {tuple(pair) for pair in EDGES.T.tolist()}
    everyone = itertools.combinations(itertools.product(range(H), range(W)), 2)
    assert pairs == {(a * W + b, c * W + d) for (a, b), (c, d) in everyone if abs(a - c) + abs(b - d) == 1}
    assert grid_edges(1, 1).shape == (2, 0)


@pytest.mark.parametrize("dense_nodes", [1024, 0])
def test_the_solution_is_the_minimum(dense_nodes):
    """Against the normal equations of the energy, written with a difference matrix."""
    weights, absorption, guidance = rand(1, EDGES.shape[1]), 0.1 + rand(1, H * W, seed=1), rand(1, H * W, seed=2)
    seeds = rand(1, H * W, seed=3) > 0.8
    f = solve_elliptic(EDGES, weights, absorption, guidance, seeds, dense_nodes=dense_nodes)
    D = torch.zeros(EDGES.shape[1], H * W, dtype=torch.float64)
    D[torch.arange(len(D)), EDGES[0]], D[torch.arange(len(D)), EDGES[1]] = 1.0, -1.0
    slope = D.T @ (weights[0] * (D @ f[0])) + absorption[0] * (f[0] - guidance[0])
    assert slope[~seeds[0]].abs().max() < 1e-12
    assert (f[seeds] == 1).all() and seeds.any()


def test_dense_sparse_and_classical_agree():
    weights, absorption, guidance = rand(3, EDGES.shape[1]), 0.1 + rand(3, H * W, seed=1), rand(3, H * W, seed=2)
    for seeds in (None, rand(3, H * W, seed=3) > 0.8):
        dense = solve_elliptic(EDGES, weights, absorption, guidance, seeds)
        sparse = solve_elliptic(EDGES, weights, absorption, guidance, seeds, dense_nodes=0)
        classical = seeded_diffusion(EDGES, weights, guidance, absorption=absorption, seeds=seeds)
        torch.testing.assert_close(dense, classical, rtol=0, atol=1e-12)
        torch.testing.assert_close(sparse, classical, rtol=0, atol=1e-12)


def test_classical_with_values_at_the_seeds():
    """Between two prescribed ends a chain without absorption to speak of is a straight line."""
    chain = torch.stack([torch.arange(10), torch.arange(1, 11)])
    ends = torch.zeros(11, dtype=torch.bool)
    ends[[0, -1]] = True
    values = torch.linspace(2.0, 3.0, 11, dtype=torch.float64)
    f = seeded_diffusion(chain, torch.ones(10), 0 * values, absorption=1e-12, seeds=ends, values=values)
    torch.testing.assert_close(f, values, rtol=0, atol=1e-9)
    everywhere = torch.ones(11, dtype=torch.bool)
    assert torch.equal(
        seeded_diffusion(chain, torch.ones(10), 0 * values, absorption=1, seeds=everywhere, values=values), values
    )


@pytest.mark.parametrize("dense_nodes", [1024, 0])
def test_gradients_of_the_solution(dense_nodes):
    weights, absorption, guidance = rand(2, EDGES.shape[1]), 0.1 + rand(2, H * W, seed=1), rand(2, H * W, seed=2)
    seeds = rand(2, H * W, seed=3) > 0.8
    parts = [x.requires_grad_() for x in (weights, absorption, guidance)]

    def call(*parts: Tensor) -> Tensor:
        return solve_elliptic(EDGES, *parts, seeds, dense_nodes=dense_nodes)

    assert torch.autograd.gradcheck(call, parts, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, parts, fast_mode=True)


@few
@given(st.integers(0, 10**6))
def test_values_stay_in_the_range_of_guidance_and_seeds(seed):
    edges, weights, absorption, guidance, value = graph(seed)
    seeds = value > 0.7
    f = solve_elliptic(edges, weights[None], absorption[None], guidance[None], seeds[None])[0]
    high = 1.0 if seeds.any() else guidance.max()
    assert (f >= guidance.min() - 1e-12).all() and (f <= high + 1e-12).all()
    more = seeds.clone()
    more[seed % len(more)] = True
    assert (solve_elliptic(edges, weights[None], absorption[None], guidance[None], more[None])[0] >= f - 1e-12).all()


# ---- Seeds -----------------------------------------------------------------------------------------------------------


def objective(chosen: list[int], edges: Tensor, weights: Tensor, absorption: Tensor, guidance: Tensor, value: Tensor):
    seeds = torch.zeros(len(guidance), dtype=torch.bool)
    seeds[list(chosen)] = True
    return float(value @ seeded_diffusion(edges, weights, guidance, absorption=absorption, seeds=seeds))


@few
@given(st.integers(0, 10**6))
def test_the_objective_is_monotone_and_submodular(seed):
    system = graph(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(system[3]), generator=generator).tolist()
    small, large, s = order[:2], order[:5], order[5]
    gain_small = objective([*small, s], *system) - objective(small, *system)
    gain_large = objective([*large, s], *system) - objective(large, *system)
    assert gain_small >= gain_large - 1e-12 and gain_large >= -1e-12


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10**6))
def test_lazy_is_plain_greedy_and_gains_are_true(seed):
    edges, weights, absorption, guidance, value = system = graph(seed, n=10)
    options = {"num_seeds": 4, "value": value}
    lazy = greedy_seeds(edges, weights, absorption, guidance, **options)
    plain = greedy_seeds(edges, weights, absorption, guidance, **options, lazy=False)
    assert (lazy.nodes, lazy.gains) == (plain.nodes, plain.gains)
    assert lazy.evaluations <= plain.evaluations == 10 + 9 + 8 + 7
    for k in range(4):
        before = objective(lazy.nodes[:k], *system)
        gains = {s: objective([*lazy.nodes[:k], s], *system) - before for s in range(10) if s not in lazy.nodes[:k]}
        assert abs(lazy.gains[k] - gains[lazy.nodes[k]]) < 1e-10
        assert gains[lazy.nodes[k]] >= max(gains.values()) - 1e-10
    best = max(objective(list(some), *system) for some in itertools.combinations(range(10), 2))
    nothing = objective([], *system)
    assert sum(lazy.gains[:2]) >= (1 - 0.3679) * (best - nothing)


def test_lazy_saves_evaluations_and_solves():
    edges = grid_edges(12, 12)
    weights = rand(edges.shape[1]) ** 4
    field = torch.full((144,), 0.1, dtype=torch.float64)
    options = {"num_seeds": 8, "value": rand(144, seed=1)}
    lazy = greedy_seeds(edges, weights, field, 0 * field, **options)
    plain = greedy_seeds(edges, weights, field, 0 * field, **options, lazy=False)
    assert lazy.nodes == plain.nodes
    assert lazy.evaluations < plain.evaluations / 4


def test_equal_gains_go_to_the_first_node():
    """Four separate pairs of nodes: all gains are equal."""
    edges = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 7]])
    field = torch.full((8,), 0.5, dtype=torch.float64)
    for lazy in (True, False):
        found = greedy_seeds(
            edges, field[:4], field, 0 * field, num_seeds=3, value=field, lazy=lazy, candidates=torch.tensor([7, 5, 3])
        )
        assert found.nodes == [3, 5, 7]


# ---- The module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_seeds", [False, True])
def test_untrained_is_the_classical_solver(with_seeds):
    image, guides, seeds = inputs()
    seeds = seeds if with_seeds else None
    x = 255 * image.flatten(2)
    weights = torch.exp(-((x[..., EDGES[0]] - x[..., EDGES[1]]) ** 2).sum(1) / (2 * 60.0**2))
    expected = seeded_diffusion(
        EDGES,
        weights,
        guides.flatten(2).mean(1),
        absorption=0.2,
        seeds=None if seeds is None else seeds.flatten(1),
    )
    f = module()(image, guides, seeds)
    assert f.shape == (2, H, W)
    torch.testing.assert_close(f.flatten(1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dense_nodes", [1024, 0])
def test_gradients_of_the_module(dense_nodes):
    net = module(dense_nodes=dense_nodes)
    with torch.no_grad():
        net.logits.copy_(rand(3))
        net.log_contrast += rand(2)
    image, guides, seeds = inputs()
    names, parameters = zip(*net.named_parameters(), strict=True)

    def call(image: Tensor, guides: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (image, guides, seeds))

    tensors = (image, guides, *parameters)
    assert torch.autograd.gradcheck(call, tuple(x.detach().requires_grad_() for x in tensors), fast_mode=True)
    found = torch.autograd.grad(net(image, guides, seeds).square().sum(), list(parameters))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found)


def test_answers_do_not_depend_on_batch_mates_nor_on_leading_dimensions():
    net = module()
    image, guides, seeds = inputs(4)
    out = net(image, guides, seeds)
    torch.testing.assert_close(net(image[1], guides[1], seeds[1]), out[1], rtol=0, atol=1e-12)
    nested = net(*(x.unflatten(0, (2, 2)) for x in (image, guides, seeds)))
    torch.testing.assert_close(nested, out.unflatten(0, (2, 2)), rtol=0, atol=1e-12)


def test_copies_and_saved_weights():
    net, (image, guides, seeds) = module(), inputs()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3
    expected = net(image, guides, seeds)
    other = module()
    other.load_state_dict(net.state_dict())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), other):
        assert torch.equal(twin(image, guides, seeds), expected)
    single = copy.deepcopy(net).float()
    torch.testing.assert_close(single(image.float(), guides.float(), seeds), expected.float(), rtol=0, atol=1e-4)
    assert SeededDiffusion(device="meta").log_contrast.is_meta


def test_chosen_seeds_are_those_of_the_greedy_search():
    net, (image, guides, _) = module(), inputs()
    seeds = net.choose_seeds(image, guides, num_seeds=3)
    assert seeds.dtype == torch.bool and seeds.flatten(1).sum(1).tolist() == [3, 3]
    edges, weights, absorption, guidance = net._system(image, guides)
    for i in range(2):
        value = (guidance[i] - guidance[i].mean()).clamp(min=0)
        found = greedy_seeds(edges, weights[i], absorption[i], guidance[i], num_seeds=3, value=value, lazy=False)
        assert sorted(found.nodes) == seeds[i].flatten().nonzero().flatten().tolist()
    coarse = net.choose_seeds(image, guides, num_seeds=2, spacing=2)
    rows, columns = coarse[0].nonzero().T.tolist()
    assert set(rows) <= {1, 3} and set(columns) <= {1, 3}


def test_it_learns_what_is_alike():
    """The left and right halves differ in channel 0; channel 1 is noise. One seed shall light up its half."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(8, 2, 8, 10, generator=generator, dtype=torch.float64)
    target = torch.zeros(8, 8, 10, dtype=torch.float64)
    target[..., :5] = 1
    image[:, 0] = 0.3 + 0.2 * target + 0.02 * image[:, 0]
    seeds = torch.zeros(8, 8, 10, dtype=torch.bool)
    seeds[:, 4, 2] = True
    guides = torch.zeros(8, 1, 8, 10, dtype=torch.float64)
    net = SeededDiffusion(2, 1, contrast=40.0, dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    errors = []
    for _ in range(40):
        loss = (net(image, guides, seeds) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.3 * errors[0]
    assert net.contrast[1] > 2 * net.contrast[0], "the channel of noise must count for less"


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": rand(2, 3, H, W)}, ValueError, r"image must have shape \(\.\.\., 2, height, width\)"),
        ({"guides": rand(2, 2, H, W)}, ValueError, r"guides must have shape \(\.\.\., 3, height, width\)"),
        ({"guides": rand(1, 3, H, W)}, ValueError, "guides must have the batch and the size of image"),
        ({"image": rand(2, 2, H, W).float()}, TypeError, "image is torch.float32 but the module is torch.float64"),
        ({"image": torch.ones(2, 2, H, W, dtype=torch.uint8)}, TypeError, "image must be floating point"),
        ({"image": rand(2, 2, H, W) / 0}, ValueError, "image has 80 NaN or infinite"),
        ({"image": rand(2, 2, H, W).to("meta")}, ValueError, "image is on meta"),
        ({"guides": rand(0, 3, H, W)}, ValueError, "guides is empty"),
        ({"seeds": rand(2, H, W)}, TypeError, "seeds must be a bool tensor.*torch.float64"),
        ({"seeds": torch.ones(2, H, W + 1, dtype=torch.bool)}, ValueError, r"seeds must have shape \(2, 4, 5\)"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    image, guides, seeds = inputs()
    with pytest.raises(error, match=message):
        module()(**{"image": image, "guides": guides, "seeds": seeds, **change})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"contrast": 0.0}, ValueError, "contrast must be greater than 0.*grey levels"),
        ({"absorption": -1.0}, ValueError, "absorption must be greater"),
        ({"num_features": 0}, ValueError, "num_features must be at least 1"),
        ({"num_guides": 1.5}, TypeError, "num_guides must be an int"),
        ({"data_range": 0.0}, ValueError, "data_range must be greater"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SeededDiffusion(**options)


def test_bad_arguments_of_the_functions():
    edges, weights, absorption, guidance, value = graph(0)
    for change, error, message in (
        ({"guidance": guidance + 1}, ValueError, "guidance must be at most 1"),
        ({"value": -value}, ValueError, "value must be at least 0"),
        ({"num_seeds": 10}, ValueError, "num_seeds must be at most 9"),
        ({"num_seeds": 0}, ValueError, "num_seeds must be at least 1"),
        ({"weights": weights * torch.nan}, ValueError, "weights has"),
    ):
        options = {"edges": edges, "weights": weights, "absorption": absorption, "guidance": guidance, "num_seeds": 1}
        with pytest.raises(error, match=message):
            greedy_seeds(**{**options, **change})
    for change, error, message in (
        ({"edges": edges.double()}, ValueError, "edges must be integers"),
        ({"edges": edges + 1}, ValueError, "edges must be between nodes"),
        ({"weights": weights[1:]}, ValueError, "weights must have shape"),
        ({"weights": -weights}, ValueError, "weights must be at least 0"),
        ({"absorption": 0.0}, ValueError, "absorption must be positive"),
        ({"seeds": value}, TypeError, "seeds must be a bool"),
        ({"seeds": value[:3] > 0}, ValueError, "seeds must broadcast"),
    ):
        options = {"edges": edges, "weights": weights, "guidance": guidance, "absorption": absorption}
        with pytest.raises(error, match=message):
            seeded_diffusion(**{**options, **change})
