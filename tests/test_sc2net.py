"""SC2Net, AdaptiveISTA and the double tanh: against LSTM code of another library, ISTA, and their own mathematics."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unrolled import LISTA, Checkpointed, fit, solvers
from unrolled.functional import double_tanh, soft_threshold
from unrolled.losses import CodeError, Lasso
from unrolled.problems import SparseRecovery
from unrolled.solvers import lasso_objective
from unrolled.sparse.adaptive import AdaptiveISTA, CellState
from unrolled.sparse.sc2net import CentredGates, SC2Net, SigmoidGates

ALPHA = 0.3
properties = settings(max_examples=25, deadline=None, derandomize=True)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


DICTIONARY, SIGNALS = 1.5 * randn(6, 10), randn(4, 6, seed=1)


def shaken(net, size=0.2):
    """Away from the start, with gates that differ from signal to signal and layer to layer."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return net


# ---- The cell --------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("kind", [CentredGates, SigmoidGates])
def test_the_cell_is_the_published_recurrence(kind, scalar):
    """One signal at a time, gate by gate, in NumPy."""
    net = shaken(SC2Net(DICTIONARY, 4, alpha=ALPHA, gates=kind(scalar=scalar)))
    step = net[0]
    weight, S, theta = (t.detach().numpy() for t in (step.weight, step.inhibition, step.theta))
    (Ui, Uf), (Vi, Vf), (bi, bf) = (
        [part.detach().numpy() for part in t.chunk(2)] for t in (step.gate_weight, step.gate_inhibition, step.gate_bias)
    )
    expected = []
    for y in SIGNALS.numpy():
        c = x = np.zeros(10)
        for _ in range(4):
            i, f = sigmoid(Ui @ y + Vi @ x + bi), sigmoid(Uf @ y + Vf @ x + bf)
            if kind is CentredGates:
                i, f = 2 * i, 2 * f - 1
            c = f * c + i * (weight @ y + S @ x)
            x = np.maximum(c - theta, 0) - np.maximum(-c - theta, 0)
        expected.append(x)
    np.testing.assert_allclose(net(SIGNALS).detach().numpy(), np.stack(expected), rtol=0, atol=1e-12)


def test_the_cell_is_that_of_an_lstm():
    """torch's LSTM computes o tanh(c): where tanh is nearly linear and o = 1, this is the network without a threshold.

    The output gate's bias is 40, so that o = 1 in float64. All candidates and cells are near 1e-5, where tanh(x) / x
    is 1 up to x^2 / 3 = 3e-11; five layers gather a few of these errors.
    """
    size = 1e-5
    D, y = randn(6, 10), size * SIGNALS
    net = shaken(SC2Net(D, 5, alpha=1.0, gates=SigmoidGates(1.0), threshold=1e-30))
    step = net[0]
    lstm = nn.LSTMCell(6, 10, dtype=torch.float64)
    with torch.no_grad():
        Ui, Uf = step.gate_weight.chunk(2)
        Vi, Vf = step.gate_inhibition.chunk(2)
        bi, bf = step.gate_bias.chunk(2)
        none = torch.zeros(10, dtype=torch.float64)
        lstm.weight_ih.copy_(torch.cat((Ui, Uf, step.weight, torch.zeros_like(Ui))))
        lstm.weight_hh.copy_(torch.cat((Vi, Vf, step.inhibition, torch.zeros_like(Vi))))
        lstm.bias_ih.copy_(torch.cat((bi, bf, none, none + 40)))
        lstm.bias_hh.zero_()
        h = c = torch.zeros(4, 10, dtype=torch.float64)
        for code in net.iterates(y):
            h, c = lstm(y, (h, c))
            assert h.abs().max() > 0.1 * size
            torch.testing.assert_close(code, h, rtol=0, atol=1e-8 * size)


@pytest.mark.parametrize("scalar", [False, True])
def test_adaptive_ista_is_its_recurrence(scalar):
    net = shaken(AdaptiveISTA(DICTIONARY, 4, alpha=ALPHA, scalar_gates=scalar))
    c = x = SIGNALS.new_zeros(4, 10)
    for step in net:
        i, f = step.log_input.exp(), step.atanh_forget.tanh()
        assert i.shape == (() if scalar else (10,))
        c = f * c + i * (SIGNALS @ step.weight.T + x @ step.inhibition.T)
        x = c.sign() * (c.abs() - step.theta).clamp(min=0)
    torch.testing.assert_close(net(SIGNALS), x, rtol=0, atol=1e-12)


def test_sc2net_with_gates_that_see_nothing_is_adaptive_ista():
    net = SC2Net(DICTIONARY, 6, alpha=ALPHA)
    free = AdaptiveISTA(DICTIONARY, 6, alpha=ALPHA, tied=True)
    logits = randn(2, 10, seed=3)
    with torch.no_grad():
        net[0].gate_bias.copy_(logits.flatten())
        i, f = net[0].gates(*logits)
        free[0].log_input.copy_(i.log())
        free[0].atanh_forget.copy_(f.atanh())
    torch.testing.assert_close(net(SIGNALS), free(SIGNALS), rtol=0, atol=1e-12)


# ---- ISTA, the start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gates", [CentredGates(), CentredGates(scalar=True), SigmoidGates(40.0)])
def test_the_untrained_network_is_ista(gates, tied):
    for num_iters in (1, 3, 30):
        found = SC2Net(DICTIONARY, num_iters, alpha=ALPHA, gates=gates, tied=tied)(SIGNALS)
        expected = solvers.ista(DICTIONARY, SIGNALS, ALPHA, num_iters=num_iters)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@properties
@given(saturation=st.floats(2, 30), num_iters=st.integers(1, 20))
def test_published_gates_start_as_near_to_ista_as_they_say(saturation, num_iters):
    """With T(c) = W y + S soft(c) a layer makes c + (1 - e) (T(c) - c): e |T(c) - c| away from ISTA's.

    T is non-expansive, so that the layers behind do not enlarge what those before added.
    """
    net = SC2Net(DICTIONARY, num_iters, alpha=ALPHA, gates=SigmoidGates(saturation))
    epsilon = 1 / (1 + np.exp(saturation))
    prepared = net[0].prepare(SIGNALS)
    state, bound = net[0].init(prepared), 0.0
    for _ in range(num_iters):
        candidate = SIGNALS @ net[0].weight.T + state.code @ net[0].inhibition.T
        bound += epsilon * (state.cell - candidate).norm().item()
        state = net[0](state, prepared)
    expected = solvers.ista(DICTIONARY, SIGNALS, ALPHA, num_iters=num_iters)
    assert (state.code - expected).norm() <= bound + 1e-12


@properties
@given(f=st.floats(-0.8, 0.8))
def test_gates_that_sum_to_one_keep_the_fixed_points(f):
    """The Lasso's answer stays where it is: c = f c + (1 - f) (W y + S x) holds for the c of ISTA's fixed point."""
    x = solvers.fista(DICTIONARY, SIGNALS, ALPHA, num_iters=20_000, restart=True, tol=1e-14)
    net = AdaptiveISTA(DICTIONARY, 3, alpha=ALPHA, scalar_gates=True, tied=True)
    cell = SIGNALS @ net[0].weight.T + x @ net[0].inhibition.T
    with torch.no_grad():
        net[0].log_input.fill_(1 - f).log_()
        net[0].atanh_forget.fill_(f).atanh_()
        after = net(SIGNALS, state=CellState(cell, x))
    torch.testing.assert_close(after, x, rtol=0, atol=1e-8)


def test_over_relaxation_is_faster_than_ista():
    """Why the forget gate may be negative: no gates within (0, 1) do this."""
    errors = []
    x = solvers.fista(DICTIONARY, SIGNALS, ALPHA, num_iters=20_000, restart=True, tol=1e-14)
    for f in (0.5, 0.0, -0.5):
        net = AdaptiveISTA(DICTIONARY, 400, alpha=ALPHA, scalar_gates=True, tied=True)
        with torch.no_grad():
            net[0].log_input.fill_(1 - f).log_()
            net[0].atanh_forget.fill_(f).atanh_()
            errors.append((net(SIGNALS) - x).norm().item())
    assert errors[2] < 0.7 * errors[1] < 0.7 * 0.7 * errors[0]


@properties
@given(relaxation=st.floats(0.1, 1.5))
def test_a_relaxed_start_converges_to_the_lassos_answer(relaxation):
    """Both halves of ISTA's step are firmly non-expansive, so that their composition allows factors up to 3/2."""
    x = solvers.fista(DICTIONARY, SIGNALS, 4 * ALPHA, num_iters=20_000, restart=True, tol=1e-14)
    net = SC2Net(DICTIONARY, 1, alpha=4 * ALPHA, gates=CentredGates(relaxation=relaxation))
    i, f = net[0].gates(*net[0].gate_bias.detach().chunk(2))
    torch.testing.assert_close(i, torch.full_like(i, relaxation), rtol=1e-12, atol=0)
    torch.testing.assert_close(f, 1 - i, rtol=0, atol=1e-12)
    with torch.no_grad():
        distances = [(code - x).norm().item() for code in net.iterates(SIGNALS, num_iters=800)]
    assert distances[-1] < 0.05 * distances[0]


@pytest.mark.parametrize("relaxation", [0.0, -1.0, 2.0, 3.0])
def test_a_relaxation_that_no_gate_reaches(relaxation):
    with pytest.raises(ValueError, match="relaxation must be (greater than 0|less than 2)"):
        CentredGates(relaxation=relaxation)


def test_complex_signals():
    D = torch.complex(DICTIONARY, randn(6, 10, seed=4))
    y = torch.complex(SIGNALS, randn(4, 6, seed=5))
    found = AdaptiveISTA(D, 10, alpha=ALPHA)(y)
    torch.testing.assert_close(found, solvers.ista(D, y, ALPHA, num_iters=10), rtol=0, atol=1e-10)
    with pytest.raises(TypeError, match="dictionary and dtype must be real: .* take AdaptiveISTA"):
        SC2Net(D, alpha=ALPHA)
    with pytest.raises(TypeError, match="dictionary and dtype must be real"):
        SC2Net(DICTIONARY, alpha=ALPHA, dtype=torch.complex64)


# ---- Gates -----------------------------------------------------------------------------------------------------------


@properties
@given(a=st.floats(-800, 800), b=st.floats(-800, 800))
def test_gates_stay_in_their_ranges(a, b):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    i, f = SigmoidGates()(a, b)
    j, g = CentredGates()(a, b)
    assert 0 <= i <= 1 and 0 <= f <= 1
    torch.testing.assert_close(j, 2 * i, rtol=1e-12, atol=0)
    torch.testing.assert_close(g, 2 * f - 1, rtol=0, atol=1e-12)


def test_gates_have_a_gradient_at_the_start():
    """Half, for the centred ones; e (1 - e) for the published ones, which is nothing where they are saturated."""
    for gates, slope in (
        (CentredGates(), 0.5),
        (SigmoidGates(3.0), 1 / (1 + np.exp(3)) / (1 + np.exp(-3))),
        (SigmoidGates(800.0), 0.0),
    ):
        logits = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in gates.biases]
        found = [torch.autograd.grad(gate, logits[k])[0] for k, gate in enumerate(gates(*logits))]
        assert [g.item() for g in found] == pytest.approx([slope, slope], abs=1e-15)


def test_number_of_parameters():
    def count(net):
        return sum(parameter.numel() for parameter in net.parameters())

    m, n, K = 6, 10, 4
    one = m * n + n * n + n
    assert count(SC2Net(DICTIONARY, K, alpha=ALPHA)) == 3 * (m * n + n * n) + 3 * n
    assert count(SC2Net(DICTIONARY, K, alpha=ALPHA, gates=CentredGates(scalar=True))) == one + 2 * (m + n + 1)
    assert count(AdaptiveISTA(DICTIONARY, K, alpha=ALPHA)) == one + 2 * n * K
    assert count(AdaptiveISTA(DICTIONARY, K, alpha=ALPHA, scalar_gates=True)) == one + 2 * K
    assert count(LISTA(DICTIONARY, K, alpha=ALPHA, tied=True)) == one


# ---- Shrinkage -------------------------------------------------------------------------------------------------------


def test_soft_codes_are_sparse_and_those_of_the_double_tanh_are_not():
    soft = SC2Net(DICTIONARY, 8, alpha=4 * ALPHA)(SIGNALS)
    smooth = SC2Net(DICTIONARY, 8, alpha=ALPHA, shrinkage=double_tanh, threshold=1.0)(SIGNALS)
    assert (soft == 0).double().mean() > 0.3
    assert (smooth != 0).all() and smooth.abs().max() < 2


def test_a_threshold_of_ones_own():
    net = SC2Net(DICTIONARY, 2, alpha=ALPHA, threshold=1.25)
    torch.testing.assert_close(net[0].theta, torch.full((10,), 1.25, dtype=torch.float64))
    with pytest.raises(ValueError, match="threshold must be greater than 0"):
        SC2Net(DICTIONARY, alpha=ALPHA, threshold=0.0)


class Scaled(nn.Module):
    """A shrinkage with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, cell, theta):
        return self.log_scale.exp() * soft_threshold(cell, theta)


def test_a_shrinkage_that_learns():
    net = SC2Net(DICTIONARY, 3, alpha=ALPHA, shrinkage=Scaled(), tied=False)
    torch.testing.assert_close(net(SIGNALS), SC2Net(DICTIONARY, 3, alpha=ALPHA)(SIGNALS), rtol=0, atol=1e-12)
    names = [name for name, _ in net.named_parameters() if name.endswith("log_scale")]
    assert names == [f"steps.{k}.shrinkage.log_scale" for k in range(3)]
    net(SIGNALS).square().sum().backward()
    assert all(parameter.grad.abs() > 0 for name, parameter in net.named_parameters() if name in names)
    assert torch.equal(pickle.loads(pickle.dumps(net))(SIGNALS), net(SIGNALS))


@properties
@given(x=st.floats(-6, 6), h=st.floats(1e-3, 3), u=st.floats(0, 4))
def test_double_tanh(x, h, u):
    x, h = torch.tensor([x], dtype=torch.float64), abs(h)
    found = double_tanh(x, u)
    np.testing.assert_allclose(found.numpy(), np.tanh(x.numpy() + u) + np.tanh(x.numpy() - u), rtol=0, atol=1e-14)
    assert torch.equal(double_tanh(-x, torch.tensor(u)), -double_tanh(x, torch.tensor(u)))
    assert double_tanh(x + h, u) >= found and found.abs() <= 2


def test_double_tanh_shrinks_from_088_on():
    """Its slope at 0 passes 1 where tanh(u)^2 = 1/2."""
    edge = float(np.arctanh(0.5**0.5))
    for u in (0.0, 0.5, edge, 1.0, 2.5):
        x = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(double_tanh(x, u), x)
        assert slope.item() == pytest.approx(2 / np.cosh(u) ** 2, rel=1e-12)
        assert (slope.item() < 1 - 1e-9) == (u > edge)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    u = torch.linspace(0.1, 2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(double_tanh, (x, u))


def test_double_tanh_refuses():
    with pytest.raises(TypeError, match="x must be floating point, got torch.complex64"):
        double_tanh(torch.ones(2, dtype=torch.complex64), 1.0)
    with pytest.raises(ValueError, match="threshold must be at least 0"):
        double_tanh(torch.ones(2), -1.0)


# ---- The network as a whole ------------------------------------------------------------------------------------------


def test_a_state_can_be_taken_up_again():
    net = shaken(SC2Net(DICTIONARY, 6, alpha=ALPHA))
    half = net.run(SIGNALS, num_iters=3)
    assert isinstance(half, CellState)
    assert torch.equal(net(SIGNALS, state=half, num_iters=3), net(SIGNALS))
    # The code alone does not tell where the cell was.
    forgotten = CellState(half.code, half.code)
    assert not torch.allclose(net(SIGNALS, state=forgotten, num_iters=3), net(SIGNALS))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6)])
@pytest.mark.parametrize("gates", [CentredGates(), CentredGates(scalar=True)])
def test_any_batch_dimensions(shape, gates):
    net = shaken(SC2Net(DICTIONARY, 3, alpha=ALPHA, gates=gates))
    y = randn(*shape, seed=6)
    torch.testing.assert_close(net(y), net(y.reshape(-1, 6)).reshape(*shape[:-1], 10), rtol=0, atol=1e-12)
    free = shaken(AdaptiveISTA(DICTIONARY, 3, alpha=ALPHA))
    torch.testing.assert_close(free(y), free(y.reshape(-1, 6)).reshape(*shape[:-1], 10), rtol=0, atol=1e-12)


def test_reset_parameters_goes_back_to_ista_on_another_dictionary():
    other = randn(6, 10, seed=7)
    for net in (SC2Net(DICTIONARY, 5, alpha=ALPHA), AdaptiveISTA(DICTIONARY, 5, alpha=ALPHA, tied=True)):
        shaken(net)[0].reset_parameters(other)
        expected = solvers.ista(other, SIGNALS, ALPHA, num_iters=5)
        torch.testing.assert_close(net(SIGNALS), expected, rtol=0, atol=1e-10)
        with pytest.raises(ValueError, match=r"dictionary must have shape \(6, 10\) as before"):
            net[0].reset_parameters(randn(6, 9))


def test_the_meta_device():
    for network in (SC2Net, AdaptiveISTA):
        net = network(DICTIONARY.to("meta"), 3, alpha=ALPHA)
        assert net(SIGNALS.to("meta")).shape == (4, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gates": "sigmoid"}, TypeError, r"gates must be an object such as CentredGates\(\)"),
        ({"gates": CentredGates}, TypeError, "gates must be an object such as CentredGates"),
        ({"shrinkage": "soft"}, TypeError, "shrinkage must be a function of cell and threshold"),
        ({"alpha": 0.0}, ValueError, "alpha must be greater than 0"),
        ({"dictionary": DICTIONARY.int()}, TypeError, "dictionary must be floating point .*, got torch.int32"),
        ({"dictionary": [[1.0]]}, TypeError, "dictionary must be a torch.Tensor"),
        ({"tied": ("gate",)}, ValueError, "tied names 'gate', which SC2NetStep does not have"),
    ],
)
def test_what_it_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        SC2Net(**{"dictionary": DICTIONARY, "alpha": ALPHA, **arguments})
    with pytest.raises(ValueError, match="saturation must be finite"):
        SigmoidGates(float("inf"))


def test_repr():
    text = repr(SC2Net(DICTIONARY.float(), 2, alpha=0.1, gates=SigmoidGates(scalar=True), shrinkage=double_tanh))
    assert "SC2NetStep(signal=6, atoms=10, alpha=0.1, gates=SigmoidGates(saturation=4.0, scalar=True)" in text
    assert "shrinkage=double_tanh" in text
    assert "scalar_gates=True" in repr(AdaptiveISTA(DICTIONARY, 2, alpha=0.1, scalar_gates=True))


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SC2Net, AdaptiveISTA], ids=["SC2Net", "AdaptiveISTA"])
def test_training_on_the_objective_beats_ista_and_uses_the_gates(make):
    problem = SparseRecovery(m=10, n=30, seed=0)
    y, _ = problem.test(300)
    net = make(problem.dictionary, 5, alpha=0.1)
    start = lasso_objective(problem.dictionary, y, net(y), 0.1).mean().item()
    gated = copy.deepcopy(net)
    frozen = net.requires_grad_(False)
    for name, parameter in net.named_parameters():  # the gates alone
        parameter.requires_grad_(any(word in name for word in ("gate", "log_input", "forget")))
    signals = (batch.y for batch in problem.batches(64))
    fit(net, signals, Lasso(problem.dictionary, 0.1), num_steps=150)
    alone = lasso_objective(problem.dictionary, y, net(y), 0.1).mean().item()
    fit(gated, signals, Lasso(problem.dictionary, 0.1), num_steps=150)
    together = lasso_objective(problem.dictionary, y, gated(y), 0.1).mean().item()
    assert frozen is net
    assert together < alone < 0.97 * start


def test_supervised_training():
    problem = SparseRecovery(m=20, n=40, seed=0)
    y, x = problem.test(300)
    net = SC2Net(problem.dictionary, 5, alpha=0.1, gradient=Checkpointed(every=2))
    before = CodeError()(net, (y, x)).item()
    fit(net, ((batch.y, batch.x) for batch in problem.batches(64)), CodeError(), num_steps=200)
    assert CodeError()(net, (y, x)).item() < 0.8 * before
