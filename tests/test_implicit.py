"""`Implicit`, `Phantom`, and the guard that tells where short gradients mislead."""

import contextlib
import copy
import math
import pickle
import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unrolled import LISTA, Backprop, SC2Net, Step, Tolerance, Trace, Truncated, Unroll
from unrolled.cluster import KMeans
from unrolled.crf import Bilateral, Compatibility, CRFasRNN, Exact, Spatial
from unrolled.functional import soft_threshold
from unrolled.gradient import (
    Anderson,
    ContractionMeter,
    GradientWarning,
    Implicit,
    Loop,
    Neumann,
    Phantom,
    Solution,
    contraction_factor,
)
from unrolled.image.tnrd import TNRD

F64 = torch.float64
TIGHT = {"tol": 1e-12, "max_iters": 1000}


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Descent(Step):
    """x+ = x - s A' tanh(A x - y) - s x / 2, with everything that has a gradient an input of the call."""

    def prepare(self, y, A, s):
        return y, A, s

    def init(self, context):
        y, A, _ = context
        return y.new_zeros(*y.shape[:-1], A.shape[1])

    def forward(self, x, context):
        y, A, s = context
        return x - s * (torch.tanh(x @ A.mT - y) @ A + x / 2)


def descent_inputs():
    return randn(2, 4), randn(4, 3, seed=1) / 2, torch.tensor(0.3, dtype=F64)


class ElasticNet(Step):
    """x+ = soft((1 - rho / (L + rho)) x + W (y - A x), theta): contracts by about 1 - rho / (L + rho)."""

    def __init__(self, A, rho, alpha=0.05):
        super().__init__()
        lipschitz = torch.linalg.matrix_norm(A, 2) ** 2
        self.A = A
        self.keep = 1 - rho / (lipschitz + rho)
        self.weight = nn.Parameter(A.mT / (lipschitz + rho))
        self.theta = nn.Parameter(alpha / (lipschitz + rho))

    def init(self, y):
        return y.new_zeros(len(y), self.A.shape[1])

    def forward(self, x, y):
        return soft_threshold(self.keep * x + (y - x @ self.A.mT) @ self.weight.mT, self.theta)


def sparse_problem(seed=0):
    A = nn.functional.normalize(randn(50, 100, seed=seed), dim=0)
    chosen = torch.rand(32, 100, generator=torch.Generator().manual_seed(seed + 1)) < 0.1
    x = randn(32, 100, seed=seed + 2) * chosen
    return A, x @ A.mT, x


class Pair(NamedTuple):
    x: Tensor
    v: Tensor


class HeavyBall(Step):
    """x+ = x + v+, v+ = v / 2 - s (A'(A x - y) + x): a state of two tensors."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(randn(5, 4, seed=3) / 3)
        self.s = nn.Parameter(torch.tensor(0.3, dtype=F64))

    def init(self, y):
        zero = y.new_zeros(*y.shape[:-1], 4)
        return Pair(zero, zero)

    def forward(self, state, y):
        v = state.v / 2 - self.s * ((state.x @ self.A.mT - y) @ self.A + state.x)
        return Pair(state.x + v, v)

    def readout(self, state):
        return state.x + 0.1 * state.v


def perturbed(net):
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter += 0.02 * randn(*parameter.shape, seed=k, dtype=parameter.dtype)
    return net


def lista(num_iters=400, **options):
    return perturbed(LISTA(randn(40, 8), num_iters, alpha=0.3, **{"tied": True, **options}))


def clusters(batch):
    """Three blobs of seven points each, and where the centres start."""
    places = 4 * torch.eye(3, 2, dtype=F64)
    points = places.repeat_interleave(7, 0) + 0.5 * randn(batch, 21, 2, seed=1)
    return points, places + 0.5 * randn(batch, 3, 2, seed=2)


def diffusion(**options):
    net = TNRD(120, filter_size=3, dtype=F64, **{"tied": True, **options})
    with torch.no_grad():
        net[0].raw_reaction.fill_(0.4)  # without a data term nothing holds the image
    return net


def gradients(net, inputs, weights=None):
    """By every parameter and every input; of a linear loss, so that u does not depend on the answer."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = net(*inputs)
    weights = randn(*out.shape, seed=9, dtype=out.dtype) if weights is None else weights
    return torch.autograd.grad(
        (out * weights).abs().sum() if out.is_complex() else (out * weights).sum(),
        [*net.parameters(), *inputs],
        allow_unused=True,
    )


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@contextlib.contextmanager
def silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        yield


# ---- Implicit against backpropagation at convergence -----------------------------------------------------------------

SYSTEMS = {
    "descent": (lambda **o: Unroll(Descent(), 400, **o), descent_inputs),
    "LISTA": (lambda **o: lista(**o), lambda: (randn(3, 40, seed=1),)),
    "LISTA factored": (lambda **o: lista(factored=True, **o), lambda: (randn(3, 40, seed=1),)),
    "LISTA momentum": (lambda **o: lista(600, momentum=True, **o), lambda: (randn(3, 40, seed=1),)),
    "SC2Net": (lambda **o: perturbed(SC2Net(randn(40, 8), 400, alpha=0.3, **o)), lambda: (randn(3, 40, seed=1),)),
    "heavy ball": (lambda **o: Unroll(HeavyBall(), 200, **o), lambda: (randn(3, 5, seed=1),)),
    "CRF": (
        lambda **o: CRFasRNN(
            3,
            (
                Bilateral(theta_alpha=2.0, theta_beta=15.0, weight=0.8, filter=Exact(), learn=True),
                Spatial(theta_gamma=1.5, weight=0.4, filter=Exact()),
            ),
            100,
            compatibility=Compatibility.LEARNED,
            dtype=F64,
            **o,
        ),
        lambda: (randn(2, 3, 4, 5, seed=1), 20 * randn(2, 2, 4, 5, seed=2)),
    ),
    "k-means": (lambda **o: KMeans(200, temperature=1.0, dtype=F64, **o), lambda: clusters(2)),
    "TNRD": (lambda **o: diffusion(**o), lambda: (0.5 + 0.2 * randn(2, 1, 6, 6, seed=1),)),
}


@pytest.mark.parametrize("solver", [Neumann(), Anderson()], ids=str)
@pytest.mark.parametrize("name", SYSTEMS)
def test_implicit_is_backprop_at_convergence(name, solver):
    make, inputs = SYSTEMS[name]
    exact = gradients(make(), inputs())
    found = gradients(make(gradient=Implicit(**TIGHT, solver=solver)), inputs())
    for one, other in zip(found, exact):
        # Momentum makes no difference at a fixed point: its gradient is 0 there, and None is allowed to say so.
        one = torch.zeros_like(other) if one is None else one
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(flat(exact).norm()))


@pytest.mark.parametrize("strategy", [Implicit(**TIGHT), Implicit(**TIGHT, solver=Neumann())], ids=str)
def test_implicit_against_the_numeric_derivative(strategy):
    net = Unroll(Descent(), 150, gradient=strategy)
    assert torch.autograd.gradcheck(net, [x.requires_grad_() for x in descent_inputs()])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_directional_derivative_by_the_parameters(name):
    make, inputs = SYSTEMS[name]
    net, inputs = make(gradient=Implicit(**TIGHT)), inputs()
    if not list(net.parameters()):
        pytest.skip("everything that has a gradient is an input: gradcheck above")
    weights = randn(*net(*inputs).shape, seed=9)
    directions = [randn(*p.shape, seed=100 + k) for k, p in enumerate(net.parameters())]
    pairs = zip(gradients(net, inputs, weights), directions)
    claimed = sum((g * d).sum() for g, d in pairs if g is not None)

    @torch.no_grad()
    def at(h):
        for p, d in zip(net.parameters(), directions):
            p.add_(h * d)
        value = (net(*inputs) * weights).sum()
        for p, d in zip(net.parameters(), directions):
            p.sub_(h * d)
        return value

    h = 1e-7  # TNRD's influence functions have kinks, which a wider step would meet
    torch.testing.assert_close(claimed, (at(h) - at(-h)) / (2 * h), rtol=1e-6, atol=1e-7)


def test_complex_states():
    dictionary, y = randn(40, 6, dtype=torch.complex128), randn(3, 40, seed=1, dtype=torch.complex128)
    exact = gradients(LISTA(dictionary, 400, alpha=0.3, tied=True), (y,))
    for solver in (Neumann(), Anderson()):
        strategy = Implicit(**TIGHT, solver=solver)
        found = gradients(LISTA(dictionary, 400, alpha=0.3, tied=True, gradient=strategy), (y,))
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


# ---- The defining equations, at a fixed point ------------------------------------------------------------------------


def at_rest(strategy, num_iters=1):
    """Gradients of a network that starts at its fixed point, by its parameters and y."""
    net, y = lista(gradient=strategy), randn(3, 40, seed=1)
    with torch.no_grad():
        state = lista(3000).run(y)
    y.requires_grad_()
    weights = randn(3, 8, seed=9)
    out = net(y, state=state, num_iters=num_iters)
    return flat(torch.autograd.grad((out * weights).sum(), [*net.parameters(), y]))


@pytest.mark.parametrize("terms", [1, 3, 10])
def test_neumann_is_the_truncated_series(terms):
    """v = sum_{j <= n} (J')^j u is what n + 1 iterations from the fixed point pass on."""
    with silenced():
        found = at_rest(Implicit(tol=1e-15, max_iters=terms, solver=Neumann()))
    torch.testing.assert_close(found, at_rest(Backprop(), terms + 1), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 4])
def test_phantom_without_damping_is_backprop_through_as_many_iterations(steps):
    torch.testing.assert_close(at_rest(Phantom(steps, 1.0)), at_rest(Backprop(), steps), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("damping", [0.3, 0.8])
def test_phantom_is_its_defining_equation(damping):
    net, y = lista(50), randn(3, 40, seed=1)
    with torch.no_grad():
        z = net(y)
    value, step = z, net[0]
    for _ in range(4):
        z = damping * step(z, step.prepare(y)) + (1 - damping) * z
    weights = randn(3, 8, seed=9)
    expected = torch.autograd.grad((z * weights).sum(), list(net.parameters()))
    net.gradient = Phantom(4, damping)
    assert torch.equal(net(y), value), "the damped iterations must not change the answer"
    torch.testing.assert_close(gradients(net, (y,), weights)[:-1], expected, rtol=1e-12, atol=1e-13)


def test_phantom_comes_near_with_more_steps():
    exact = at_rest(Backprop(), 2000)
    errors = [float((at_rest(Phantom(steps, 0.5)) - exact).norm() / exact.norm()) for steps in (1, 10, 100)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


def test_phantom_with_a_state_of_two_tensors():
    inputs = (randn(3, 5, seed=1),)
    exact = flat(gradients(Unroll(HeavyBall(), 200), inputs))
    found = flat(gradients(Unroll(HeavyBall(), 200, gradient=Phantom(300, 0.7)), inputs))
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


# ---- Slow contraction: figures of the guide --------------------------------------------------------------------------


def elastic(rho, strategy, seed=0, num_iters=400):
    """Gradient of the squared error, and what the strategy warned of."""
    A, y, x = sparse_problem(seed)
    net = Unroll(ElasticNet(A, rho), num_iters, gradient=strategy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = (net(y) - x).square().sum(-1).mean()
        found = flat(torch.autograd.grad(loss, list(net.parameters())))
    assert all(issubclass(one.category, GradientWarning) for one in caught)
    return found, [str(one.message) for one in caught]


def test_a_hundred_neumann_terms_at_contraction_095():
    exact, _ = elastic(0.3, Backprop())
    found, _ = elastic(0.3, Implicit(tol=1e-12, solver=Neumann()))
    assert (found - exact).norm() <= 0.02 * exact.norm()  # 0.95^100 = 0.006
    found, told = elastic(0.3, Implicit(tol=1e-12, max_iters=300))
    assert (found - exact).norm() <= 1e-8 * exact.norm() and not told


@pytest.mark.parametrize("strategy", [Truncated(1), Truncated(5), Phantom(5, 0.5), Phantom(20, 0.5)], ids=str)
def test_short_gradients_point_the_wrong_way_where_iterations_contract_slowly(strategy):
    quick, told = elastic(0.3, copy.deepcopy(strategy))
    assert torch.cosine_similarity(quick, elastic(0.3, Backprop())[0], dim=0) > 0.9
    assert not told
    slow, told = elastic(0.03, copy.deepcopy(strategy))
    assert torch.cosine_similarity(slow, elastic(0.03, Backprop())[0], dim=0) < -0.8
    (told,) = told
    assert "contract by 0.99" in told and "Checkpointed(20)" in told and str(strategy) in told


def test_enough_last_iterations_need_no_warning():
    _, told = elastic(0.03, Truncated(150))  # 0.9914^150 = 0.27 is left out
    assert not told


def test_implicit_warns_where_it_has_not_converged():
    _, told = elastic(0.03, Implicit(max_iters=500))
    (told,) = told
    assert "have not converged" in told and "contract by 0.99" in told and "Run about" in told
    # The number of iterations that it advises suffices.
    advised = int(told.split("Run about ")[1].split()[0])
    assert 400 < advised < 700
    assert elastic(0.03, Implicit(max_iters=500), num_iters=advised)[1] == []


def test_implicit_warns_where_the_backward_solver_has_not_converged():
    strategy = Implicit(tol=1e-6, max_iters=20, solver=Neumann())
    _, (told,) = elastic(0.3, strategy)
    assert "stopped at a relative residual of 0.025 after 20 products" in told
    assert strategy.last_solve.num_iters == 20 and 0.02 < strategy.last_solve.residual < 0.03
    assert elastic(0.3, strategy)[1] == [], "once"
    advised = int(told.split("max_iters=")[2].split()[0])
    assert advised > 20
    assert elastic(0.3, Implicit(tol=1e-6, max_iters=100))[1] == [], "the default solver takes fewer"


def test_no_fixed_point_at_all():
    class Growing(Step):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.1, dtype=F64))

        def init(self, y):
            return y

        def forward(self, x, y):
            return self.a * x

    for strategy in (Implicit(), Phantom(2), Truncated(1)):
        net = Unroll(Growing(), 30, gradient=strategy)
        with pytest.warns(GradientWarning, match=r"contract by 1\.1000.*Checkpointed\(5\)"):
            out = net(randn(2, 3))
        out.sum().backward()  # Anderson's method solves v = 1.1 v + u all the same
    net.gradient = Implicit(solver=Neumann())
    with silenced():
        out = net(randn(2, 3))
    with pytest.warns(GradientWarning, match="after 100 products, above tol"):
        out.sum().backward()
    assert math.isfinite(net[0].a.grad)


# ---- The guard -------------------------------------------------------------------------------------------------------


def test_the_guard_looks_at_calls_one_two_four_eight_and_warns_once():
    net = Unroll(ElasticNet(sparse_problem()[0], 0.3), 30, gradient=Truncated(1))
    y = sparse_problem()[1][:2]
    spans = []

    def watched(advance, state, num_iters):
        def spy(state, start, stop):
            spans[-1].append((start, stop))
            return advance(state, start, stop)

        spans.append([])
        return strategy(Loop(spy, advance.once, advance.step), state, num_iters)

    strategy, net.gradient = net.gradient, watched
    for _ in range(9):
        net(y)
    with torch.no_grad():
        net(y)
    assert [len(span) > 2 for span in spans] == [call in (1, 2, 4, 8) for call in range(1, 11)]

    slow, y = Unroll(ElasticNet(sparse_problem()[0], 0.03), 200, gradient=Truncated(1)), sparse_problem()[1]
    with pytest.warns(GradientWarning) as caught:
        for _ in range(4):
            slow(y)
    assert len(caught) == 1
    twin = copy.deepcopy(slow)
    twin(y)  # what a copy has warned of, it has warned of


def test_nobody_is_warned_without_gradients_or_of_untied_layers():
    y = sparse_problem()[1]
    for gradient, options in ((Truncated(1), {"tied": False}), (Truncated(1), {}), (Phantom(), {}), (Implicit(), {})):
        net = Unroll(ElasticNet(sparse_problem()[0], 0.03), 30, gradient=gradient, **options)
        with torch.set_grad_enabled(options != {}):
            net(y)


@pytest.mark.parametrize("factor", [0.3, 0.9, 0.995, 1.0, 1.02])
def test_the_factor_of_a_linear_map(factor):
    A = factor * torch.linalg.qr(randn(6, 6))[0]
    x, states = randn(4, 6, seed=1), []
    for _ in range(6):
        states.append(x)
        x = x @ A.T
    torch.testing.assert_close(contraction_factor(states), torch.full((4,), factor, dtype=F64))
    torch.testing.assert_close(contraction_factor(states, event_dim=2), torch.tensor(factor, dtype=F64))
    torch.testing.assert_close(contraction_factor([Pair(s, s) for s in states])[0].item(), factor)


def test_samples_have_factors_of_their_own_and_rest_does_not_count():
    rates = torch.tensor([0.2, 0.9, 0.0], dtype=F64)
    states = [1 + rates[:, None] ** k * torch.ones(3, 2, dtype=F64) for k in range(600)]
    states[0][2] = 1.0  # a sample that never moves
    found = contraction_factor(states)
    torch.testing.assert_close(found[:2], rates[:2], rtol=0, atol=0.01)
    assert found[2].isnan()
    assert contraction_factor([s.float() for s in states])[1] < 0.95, "rounding must not be taken for slowness"
    meter = ContractionMeter(1)
    for state in states[:20]:
        meter.update(state)
    true = (states[19] - 1).norm(dim=-1) / states[19].norm(dim=-1)
    torch.testing.assert_close(meter.distance, true, rtol=1e-6, atol=1e-12)


def test_tensors_that_do_not_begin_with_the_batch_are_one_sample():
    states = [Pair(0.9**k * randn(4, 3), 0.9**k * randn(2, 3, seed=1)) for k in range(6)]
    torch.testing.assert_close(contraction_factor(states), torch.tensor(0.9, dtype=F64))


@given(st.floats(0.01, 1.5), st.integers(3, 12))
@settings(deadline=None, max_examples=20)
def test_the_factor_does_not_depend_on_scale_or_place(scale, count):
    states = [randn(2, 3, seed=k) for k in range(count)]
    moved = [5.0 + scale * state for state in states]
    torch.testing.assert_close(contraction_factor(moved), contraction_factor(states), rtol=1e-6, atol=1e-9)


def test_what_diverges_has_an_infinite_factor():
    states = [torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[math.inf]]), torch.tensor([[math.nan]])]
    assert contraction_factor(states).item() == math.inf
    with pytest.raises(ValueError, match="at least 3 states, got 2"):
        contraction_factor(states[:2])
    with pytest.raises(TypeError, match="must hold floating point tensors"):
        contraction_factor([torch.arange(3)] * 3)
    with pytest.raises(RuntimeError, match="three states"):
        _ = ContractionMeter(1).factor
    for bad in (0, -1):
        with pytest.raises(ValueError, match="window must be"):
            ContractionMeter(1, bad)


# ---- What the answer and the graph are -------------------------------------------------------------------------------

STRATEGIES = [Implicit(), Phantom(3)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_answer_is_that_of_backprop(name, strategy):
    make, inputs = SYSTEMS[name]
    inputs = inputs()
    exact, net = make(), make(gradient=strategy)
    with silenced():
        torch.testing.assert_close(net(*inputs), exact(*inputs), rtol=0, atol=1e-12)
    with torch.no_grad():
        out = net(*inputs)
        assert torch.equal(out, exact(*inputs)) and not out.requires_grad


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_memory_does_not_grow_with_the_iterations(strategy):
    def saved(num_iters):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        net = lista(num_iters, gradient=strategy)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(randn(3, 40, seed=1))
        assert out.requires_grad
        return sum(kept.values())

    assert saved(500) == saved(50)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_trace_sees_the_iterations_alone(strategy):
    for stop in (None, Tolerance(1e-3)):
        net, exact = lista(60, gradient=strategy, stop=stop), lista(60, stop=stop)
        y = randn(3, 40, seed=1)
        with Trace(net, states=True) as trace:
            net(y)
        with Trace(exact, states=True) as expected:
            exact(y)
        assert len(trace) == len(expected)
        torch.testing.assert_close(trace.states, expected.states, rtol=0, atol=0)
        torch.testing.assert_close(trace.num_iters, expected.num_iters)


def test_a_stopped_sample_has_its_gradient_where_it_stopped():
    y = randn(3, 40, seed=1) * torch.tensor([[1e-3], [1.0], [30.0]])  # three speeds
    exact = flat(gradients(lista(600), (y,)))
    for strategy in (Implicit(**TIGHT), Phantom(400, 1.0)):
        net = lista(600, gradient=strategy, stop=Tolerance(1e-12))
        with Trace(net) as trace:
            net(y)
        assert trace.num_iters.max() < 600, "all samples must have stopped"
        torch.testing.assert_close(flat(gradients(net, (y,))), exact, rtol=1e-8, atol=1e-8)


def test_batch_mates_make_no_difference():
    y = randn(4, 40, seed=1)
    strategy = Implicit(**TIGHT)
    net = lista(gradient=strategy)

    def by_y(y):
        y = y.detach().requires_grad_()
        return torch.autograd.grad(net(y).square().sum(), y)[0]

    torch.testing.assert_close(by_y(y)[:1], by_y(y[:1]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(by_y(y)[0], by_y(y[0]), rtol=1e-9, atol=1e-10)


def test_a_frozen_network_returns_plain_tensors():
    net, y = lista(gradient=Implicit()), randn(3, 40, seed=1)
    net.requires_grad_(False)
    assert not net(y).requires_grad
    out = net(y.requires_grad_())
    assert torch.autograd.grad(out.sum(), y)[0].abs().sum() > 0


def test_backward_twice_needs_the_graph_and_second_derivatives_are_refused():
    net, y = lista(gradient=Implicit()), randn(3, 40, seed=1)
    out = net(y).square().sum()
    parameters = list(net.parameters())
    first = torch.autograd.grad(out, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, parameters), first)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out, parameters)
    slopes = torch.autograd.grad(net(y).square().sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slopes[0].sum().backward()


def test_gradients_reach_what_came_before_the_network():
    features = nn.Linear(7, 40, dtype=F64)
    signal = randn(3, 7, seed=2)

    def slope(strategy):
        net = lista(gradient=strategy)
        return torch.autograd.grad(net(features(signal)).square().sum(), list(features.parameters()))

    torch.testing.assert_close(slope(Implicit(**TIGHT)), slope(Backprop()), rtol=1e-8, atol=1e-8)


def test_functional_call_is_served():
    net, exact, y = lista(gradient=Implicit(**TIGHT)), lista(), randn(3, 40, seed=1)
    values = {name: (1.01 * p.detach()).requires_grad_() for name, p in net.named_parameters()}

    def slope(net):
        loss = torch.func.functional_call(net, values, (y,)).square().sum()
        return torch.autograd.grad(loss, list(values.values()))

    torch.testing.assert_close(slope(net), slope(exact), rtol=1e-8, atol=1e-8)


def test_autocast():
    net, y, weights = lista().float(), randn(3, 40, seed=1).float(), randn(3, 8, seed=9).float()
    exact = flat(gradients(net, (y,), weights))
    for strategy in (Implicit(tol=0.05), Phantom(100, 1.0)):
        net.gradient = strategy
        with silenced(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = flat(gradients(net, (y,), weights))
        assert found.isfinite().all() and torch.cosine_similarity(found, exact, dim=0) > 0.98


def test_float32():
    net, y = lista().float(), randn(3, 40, seed=1).float()
    exact = flat(gradients(net, (y,)))
    for solver in (Anderson(), Neumann()):
        net.gradient = Implicit(tol=1e-9, max_iters=300, solver=solver)  # finer than float32: its resolution counts
        torch.testing.assert_close(flat(gradients(net, (y,))), exact, rtol=1e-4, atol=1e-4)
        assert net.gradient.last_solve.residual < 1.2e-6


# ---- States that hold more than numbers ------------------------------------------------------------------------------


class Counting(NamedTuple):
    x: Tensor
    k: Tensor
    flips: Tensor


class WithCounters(Step):
    """x+ = a x + y, beside an integer that counts and a mask that says which entries changed sign."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def init(self, y):
        return Counting(torch.zeros_like(y), torch.tensor(0), torch.zeros_like(y, dtype=torch.bool))

    def forward(self, state, y):
        x = self.a * state.x + y
        return Counting(x, state.k + 1, x.sign() != state.x.sign())

    def readout(self, state):
        return state.x


@pytest.mark.parametrize("strategy", [Implicit(**TIGHT), Phantom(60, 1.0)], ids=str)
def test_integers_and_masks_in_a_state_are_constants(strategy):
    net, y = Unroll(WithCounters(), 60, gradient=strategy), randn(2, 3)
    state = net.run(y)
    assert state.k == 60 and state.flips.dtype == torch.bool
    (slope,) = torch.autograd.grad(net(y).sum(), net[0].a)
    torch.testing.assert_close(slope, 4 * y.sum())  # x = y / (1 - a), dx/da = y / (1 - a)^2


@pytest.mark.parametrize("strategy", [Implicit(), Phantom(), Truncated(2)], ids=str)
def test_no_gradient_through_integers(strategy):
    class Labels(Step):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.3))

        def init(self, y):
            return torch.zeros_like(y, dtype=torch.long)

        def forward(self, labels, y):
            return (y + self.shift > labels).long()

    net, y = Unroll(Labels(), 5, gradient=strategy), torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"its tensors are torch.int64, and integers and booleans have no derivative"):
        net(y)
    with torch.no_grad():
        assert net(y).dtype == torch.long


def test_a_state_without_dimensions():
    class Root(Step):
        """x+ = (x + a / x) / 2"""

        event_dim = 0

        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(3.0, dtype=F64))

        def init(self, y):
            return y

        def forward(self, x, y):
            return (x + self.a / x) / 2

    for strategy in (Implicit(**TIGHT), Truncated(1), Phantom(1, 1.0)):  # one step is exact: the method is superlinear
        net = Unroll(Root(), 10, gradient=strategy)
        (slope,) = torch.autograd.grad(net(torch.tensor(1.0, dtype=F64)), net[0].a)
        torch.testing.assert_close(slope.item(), 0.5 / math.sqrt(3), rtol=1e-8, atol=0)


# ---- What is refused, and what else runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("tied", [False, ("weight",)], ids=str)
def test_untied_layers_are_refused(strategy, tied):
    with pytest.raises(ValueError, match=r"needs a network with tied=True.*Checkpointed\(every\)"):
        LISTA(randn(6, 10), 5, alpha=0.3, tied=tied, gradient=strategy)
    net = LISTA(randn(6, 10), 5, alpha=0.3, tied=tied)
    net.gradient = strategy
    with pytest.raises(ValueError, match=r"needs a network with tied=True"):
        net(randn(2, 6))


def test_functional_transforms_are_refused_clearly():
    net, y = lista(20, gradient=Implicit()), randn(3, 40, seed=1)
    for call in (torch.vmap(net), torch.func.jacrev(net), torch.func.grad(lambda y: net(y).sum())):
        with pytest.raises(RuntimeError, match=r"does not run under the transforms of torch\.func.*Backprop\(\)"):
            call(y)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(net)(y), net(y))
    phantom = lista(20, gradient=Phantom(3))
    values = {name: p.detach() for name, p in phantom.named_parameters()}

    def loss(values, y):
        return torch.func.functional_call(phantom, values, (y,)).sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, y)
    whole = torch.autograd.grad(phantom(y).sum(), list(phantom.parameters()))
    for found, expected in zip(each.values(), whole):
        torch.testing.assert_close(found.sum(0), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("strategy", [Implicit(**TIGHT), Phantom(3), Truncated(2)], ids=str)
def test_export_and_compile(strategy):
    net, y = lista(8, gradient=strategy), randn(3, 40, seed=1)
    program = torch.export.export(net, (y,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(randn(5, 40, seed=2)), net(randn(5, 40, seed=2)))
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=not isinstance(strategy, Implicit))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo has warnings of its own where it falls back
        exact = gradients(net, (y,))
        torch.testing.assert_close(gradients(compiled, (y,)), exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_strategies_are_values(duplicate):
    for one, other in (
        (Implicit(1e-8, 50, Neumann()), Implicit(1e-8, 50, Anderson())),
        (Phantom(3, 0.5), Phantom(3, 0.6)),
        (Anderson(3), Anderson(4)),
    ):
        assert duplicate(one) == one != other and hash(duplicate(one)) == hash(one)
        assert repr(duplicate(one)) == repr(one)
    assert repr(Implicit()) == "Implicit(tol=1e-06, max_iters=100, solver=Anderson(memory=5))"
    assert repr(Phantom()) == "Phantom(steps=5, damping=0.5)"
    net = lista(gradient=Implicit())
    net(randn(3, 40, seed=1)).sum().backward()
    twin = duplicate(net)
    assert twin.gradient.last_solve == net.gradient.last_solve is not None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Implicit(tol=0.0), ValueError, "tol must be greater than 0"),
        (lambda: Implicit(tol=True), TypeError, "tol must be a real number"),
        (lambda: Implicit(max_iters=0), ValueError, "max_iters must be at least 1"),
        (lambda: Implicit(solver=Neumann), TypeError, r"solver must be an object such as Anderson\(\)"),
        (lambda: Implicit(solver="anderson"), TypeError, "solver must be an object"),
        (lambda: Anderson(0), ValueError, "memory must be at least 1"),
        (lambda: Phantom(0), ValueError, "steps must be at least 1"),
        (lambda: Phantom(2.0), TypeError, "steps must be an int"),
        (lambda: Phantom(2, 0.0), ValueError, "damping must be greater than 0"),
        (lambda: Phantom(2, 1.5), ValueError, "damping must be at most 1"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("strategy", [Implicit(**TIGHT), Phantom(60, 1.0), Truncated(60)], ids=str)
def test_by_hand_with_a_function_of_ones_own(strategy):
    """A strategy is a function over `advance`: no network is needed."""
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def advance(x, start, stop):
        for _ in range(start, stop):
            x = a * x + 1
        return x

    (slope,) = torch.autograd.grad(strategy(advance, randn(2, 3), 60).sum(), a)
    torch.testing.assert_close(slope.item(), 24.0)  # six times 1 / (1 - a)^2


# ---- The solvers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Neumann(), Anderson(1), Anderson(), Anderson(30)], ids=str)
def test_solvers_solve(solver):
    A = randn(3, 8, 8) / 8
    u = randn(3, 8, seed=1)
    v, residual, num_iters = solver(lambda v: torch.einsum("bij,bj->bi", A, v) + u, u, 1e-12, 500)
    expected = torch.linalg.solve(torch.eye(8, dtype=F64) - A, u)
    torch.testing.assert_close(v, expected, rtol=1e-10, atol=1e-10)
    assert residual <= 1e-12 and num_iters < 500


def test_anderson_with_memory_for_all_dimensions_ends_in_as_many_steps():
    """On a linear problem it is then equivalent to GMRES, which ends after n steps."""
    A = torch.linalg.qr(randn(6, 6))[0] * 0.99
    u = randn(1, 6, seed=1)
    _, _, used = Anderson(memory=8)(lambda v: v @ A.T + u, u, 1e-9, 100)
    assert used <= 9
    _, _, slow = Neumann()(lambda v: v @ A.T + u, u, 1e-9, 5000)
    assert slow > 1000


def test_anderson_takes_a_fraction_of_the_products():
    A, y, _ = sparse_problem()
    used = {}
    for solver in (Neumann(), Anderson()):
        net = Unroll(ElasticNet(A, 0.03), 1000, gradient=Implicit(tol=1e-6, max_iters=3000, solver=solver))
        net(y).square().sum().backward()
        used[type(solver)] = net.gradient.last_solve.num_iters
    assert used[Anderson] < used[Neumann] / 5


def test_a_gradient_of_zero_stays_zero():
    net, y = lista(gradient=Implicit()), randn(3, 40, seed=1)
    (net(y) * 0).sum().backward()
    assert all(not p.grad.any() for p in net.parameters())
    assert net.gradient.last_solve.residual == 0


def test_a_solver_of_ones_own():
    def damped(g, u, tol, max_iters):
        v = u
        for _ in range(max_iters):
            v = 0.5 * v + 0.5 * g(v)
        return Solution(v, 0.0, max_iters)

    found = flat(gradients(lista(gradient=Implicit(max_iters=800, solver=damped)), (randn(3, 40, seed=1),)))
    exact = flat(gradients(lista(), (randn(3, 40, seed=1),)))
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)
