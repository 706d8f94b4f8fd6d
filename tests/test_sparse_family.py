"""Sparse recovery: the mathematics of thresholds and weights, and what the networks promise beyond the contract."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import data
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unrolled import Momentum, Unroll, solvers
from unrolled.functional import hard_threshold, soft_threshold
from unrolled.operators import Boundary, Convolution, Dense, LinearOperator
from unrolled.sparse import (
    ALISTA,
    GLISTA,
    LAMP,
    LFISTA,
    LISTACP,
    NAALISTA,
    ALISTAStep,
    HyperLISTA,
    StepLISTA,
    SupportSelection,
    TiLISTA,
    analytic_weight,
    exponential_gate,
    inverse_gate,
    linear_gate,
    select_support,
    symmetric_preconditioner,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def unit_columns(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.functional.normalize(randn(*shape, seed=seed, dtype=dtype), dim=0)


def sparse_codes(count: int, n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator, dtype=dtype)
    return x * (torch.rand(count, n, generator=generator, dtype=dtype) < 0.1)


def decibels(estimate: Tensor, truth: Tensor) -> float:
    """Aggregate NMSE, 10 log10(sum of squared errors / sum of squares)."""
    return 10 * math.log10(float((estimate - truth).square().sum() / truth.square().sum()))


def coherence(W: Tensor, A: Tensor) -> Tensor:
    gram = (W.mH @ A).abs()
    return (gram - gram.diag().diag()).max()


# ---- Support selection -----------------------------------------------------------------------------------------------

codes = st.integers(0, 2**31).map(lambda seed: 2 * randn(3, 20, seed=seed))


@settings(max_examples=25, deadline=None)
@given(codes, st.floats(0, 2), st.integers(0, 20))
def test_exactly_the_share_of_large_entries_is_not_shrunk(z: Tensor, theta: float, count: int) -> None:
    out = select_support(z, theta, count / 20)
    soft = soft_threshold(z, theta)
    large = (z.abs() >= theta).sum(-1)
    if theta > 1e-6:  # else shrinking changes nothing, or nothing that the last bit would show
        assert torch.equal((out != soft).sum(-1), large.clamp(max=count))
    kept = out == z
    assert (out[~kept] == soft[~kept]).all()
    torch.testing.assert_close(select_support(z, theta, torch.tensor(count / 20, dtype=z.dtype)), out, rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(codes, st.floats(0.01, 2), st.integers(0, 19))
def test_selection_grows_with_its_share(z: Tensor, theta: float, count: int) -> None:
    less, more = (select_support(z, theta, k / 20).abs() for k in (count, count + 1))
    assert (more >= less).all() and (more <= z.abs()).all()


@settings(max_examples=25, deadline=None)
@given(codes, st.floats(0, 2))
def test_selection_lies_between_soft_and_hard(z: Tensor, theta: float) -> None:
    assert torch.equal(select_support(z, theta, 0.0), soft_threshold(z, theta))
    torch.testing.assert_close(select_support(z, theta, 1.0), hard_threshold(z, theta), rtol=0, atol=0)


def test_ties_do_not_raise_the_count() -> None:
    assert ((select_support(torch.ones(2, 8), 0.25, 0.5) == 1).sum(-1) == 4).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 2]), st.floats(0, 1.5))
def test_ranking_only_crowded_samples_is_ranking_all(seed: int, event_dim: int, theta: float) -> None:
    z = randn(6, 4, 5, seed=seed)
    shares = torch.rand(z.shape[:-event_dim], generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
    found = select_support(z, theta, shares, event_dim=event_dim)
    # Under vmap nothing is looked at, and every sample is ranked.
    ranked = torch.vmap(lambda z, p: select_support(z, theta, p, event_dim=event_dim))(z, shares)
    torch.testing.assert_close(found, ranked, rtol=0, atol=0)


def test_every_sample_can_have_its_own_share() -> None:
    z = randn(4, 10)
    shares = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=z.dtype)
    expected = torch.stack([select_support(row, 0.3, float(p)) for row, p in zip(z, shares, strict=True)])
    torch.testing.assert_close(select_support(z, 0.3, shares), expected, rtol=0, atol=0)
    torch.testing.assert_close(select_support(z, 0.3, shares.clamp(max=0.5), most=0.5)[:3], expected[:3])
    # one sample in three dimensions is the same sample
    folded = select_support(z.reshape(4, 5, 2), 0.3, shares, event_dim=2)
    torch.testing.assert_close(folded.flatten(1), expected, rtol=0, atol=0)


def test_selection_of_complex_entries_goes_by_modulus() -> None:
    z = torch.polar(torch.tensor([3.0, 2.0, 1.0, 0.1]), torch.tensor([0.3, -2.0, 1.0, 2.0])).to(torch.complex128)
    out = select_support(z, 0.5, 0.25)
    torch.testing.assert_close(out.abs(), torch.tensor([3.0, 1.5, 0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(out[:3].angle(), z[:3].angle())


def test_gradient_of_selection() -> None:
    z, theta = randn(3, 12).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, theta: select_support(z, theta, 0.25), (z, theta))


def test_schedule_counts_in_percent() -> None:
    z, theta = randn(1, 500), 1e-3
    schedule = SupportSelection(rate=1.2, maximum=13.0)
    counts = [int((schedule(z, theta, torch.tensor(float(k))) == z).sum()) for k in range(1, 17)]
    assert counts == [round(min(1.2 * k, 13) * 5) for k in range(1, 17)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: select_support(randn(5), 0.1, 1.5), ValueError, "fraction must be at most 1, got 1.5"),
        (lambda: select_support(randn(5), 0.1, -0.5), ValueError, "fraction must be at least 0"),
        (lambda: select_support(randn(5), 0.1, "all"), TypeError, "fraction must be a real number"),  # type: ignore[arg-type]
        (lambda: select_support(randn(5), 0.1, torch.tensor(0.5), most=2), ValueError, "most must be at most 1"),
        (lambda: select_support(randn(5), -0.1, 0.5), ValueError, "theta must be at least 0"),
        (lambda: select_support(randn(5), 0.1, 0.5, event_dim=2), ValueError, "event_dim is 2, but z has 1"),
        (lambda: select_support(torch.arange(5), 0.1, 0.5), TypeError, "z must be floating point"),
        (lambda: SupportSelection(rate=-1), ValueError, "rate must be at least 0"),
        (lambda: SupportSelection(maximum=101), ValueError, r"maximum must be at most 100 \(per cent\)"),
        (lambda: SupportSelection(maximum=math.nan), ValueError, "maximum must be finite"),
        (lambda: SupportSelection(rate="1.2"), TypeError, "rate must be a real number"),  # type: ignore[arg-type]
    ],
)
def test_bad_selection_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- Weights in closed form ------------------------------------------------------------------------------------------

DICTIONARIES = {
    "wide": unit_columns(25, 50),
    "atoms of any norm": 3 * randn(25, 50),
    "square": randn(20, 20),
    "tall": randn(20, 12),
    "rank deficient": randn(20, 8) @ randn(8, 40, seed=1),
    "equal atoms": unit_columns(20, 30)[:, [*range(30), 3, 3]],
    "complex": unit_columns(20, 40, dtype=torch.complex128),
}


@pytest.mark.parametrize("name", DICTIONARIES)
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_analytic_weight_solves_its_problem(name: str, damping: float) -> None:
    A = DICTIONARIES[name]
    W = analytic_weight(A, damping=damping)
    torch.testing.assert_close((W.conj() * A).sum(0), torch.ones_like(A[0]), rtol=0, atol=1e-12)
    # Lagrange: the gradient of the objective to w_i, (A A^H + damping) w_i, is a multiple of a_i.
    gradient = A @ (A.mH @ W) + damping * W
    multiplier = (A.conj() * gradient).sum(0) / (A.conj() * A).sum(0)
    torch.testing.assert_close(gradient, multiplier * A, rtol=1e-9, atol=1e-9)


def test_analytic_weight_lowers_the_coherence() -> None:
    for seed in range(3):
        A = unit_columns(125, 250, seed=seed)
        W = analytic_weight(A)
        assert coherence(W, A) < coherence(A, A)
        assert (W.mT @ A).square().sum() < (A.mT @ A).square().sum()


def test_analytic_weight_of_a_basis_is_its_inverse() -> None:
    A = DICTIONARIES["square"]
    torch.testing.assert_close(analytic_weight(A).mT, torch.linalg.inv(A), rtol=1e-9, atol=1e-9)


def test_damping_limits_the_noise() -> None:
    """Interference of unit codes and noise together, as variances: least where damping is the noise's."""
    U, _, Vh = torch.linalg.svd(randn(20, 40), full_matrices=False)
    A = U * torch.logspace(0, -3, 20, dtype=torch.float64) @ Vh

    def variance(damping: float) -> float:
        W = analytic_weight(A, damping=damping)
        interference = (W.mT @ A - torch.eye(40, dtype=W.dtype)).square().sum(1)
        return float((interference + 1e-3 * W.square().sum(0)).mean())

    assert variance(1e-3) < min(variance(1e-4), variance(1e-2))
    assert variance(1e-3) < 0.1 * variance(0.0)


def test_agrees_with_the_published_weights() -> None:
    published = data.load("lista_250x500.npz")
    A, W, gram = (torch.from_numpy(published[key]) for key in ("A", "W", "W_gram"))
    assert torch.linalg.norm(analytic_weight(A) - W) < 1e-4 * torch.linalg.norm(W)
    ours = symmetric_preconditioner(A, num_rounds=50) @ A
    assert coherence(ours, ours) < 1.01 * coherence(gram, gram)


@pytest.mark.parametrize("name", ["wide", "atoms of any norm", "complex"])
def test_symmetric_preconditioner(name: str) -> None:
    A = DICTIONARIES[name]
    G = symmetric_preconditioner(A)
    torch.testing.assert_close(G, G.mH)
    tight = G @ A @ A.mH @ G.mH
    torch.testing.assert_close(tight, torch.eye(len(A)).to(A) * A.shape[1] / len(A), rtol=0, atol=1e-9)
    W = symmetric_preconditioner(A, num_rounds=200) @ A
    torch.testing.assert_close(torch.linalg.vector_norm(W, dim=0), torch.ones(A.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("function", [analytic_weight, symmetric_preconditioner])
def test_bad_dictionaries_have_no_weight(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="dictionary has 1 zero atoms"):
        function(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="dictionary must be a matrix"):
        function(torch.ones(3))
    with pytest.raises(ValueError, match="damping must be at least 0"):
        function(torch.eye(3), damping=-1)


def test_rounds_are_counted() -> None:
    with pytest.raises(ValueError, match="num_rounds must be at least 0"):
        symmetric_preconditioner(torch.eye(3), num_rounds=-1)


# ---- Recovery without training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n"), [(250, 500), (350, 700)])
def test_hyperlista_recovers_untrained(symmetric: bool, m: int, n: int) -> None:
    for seed in (0, 1):
        A = unit_columns(m, n, seed=seed, dtype=torch.float32)
        x = sparse_codes(200, n, dtype=torch.float32)
        with torch.no_grad():
            found = HyperLISTA(A, symmetric=symmetric)(x @ A.T)
        assert decibels(found, x) <= -80


def test_hyperlista_does_not_mind_units() -> None:
    A = unit_columns(50, 100)
    y = sparse_codes(8, 100) @ A.T
    net = HyperLISTA(A)
    torch.testing.assert_close(net(1e3 * y), 1e3 * net(y), rtol=1e-9, atol=1e-9)
    assert not net(torch.zeros_like(y)).any()


def test_amp_recovers_untrained() -> None:
    A = unit_columns(250, 500)
    x = sparse_codes(400, 500)
    y = x @ A.T
    assert decibels(solvers.amp(A, y, num_iters=16), x) <= -27
    found = solvers.amp(A, y, num_iters=30)
    assert decibels(found, x) <= -33
    torch.testing.assert_close(LAMP(A, 30)(y), found, rtol=0, atol=1e-10)


def test_amp_takes_operators() -> None:
    A = unit_columns(40, 60)
    shaped = Reshaped(A)
    y = sparse_codes(5, 60) @ A.T
    expected = solvers.amp(A, y, num_iters=10)
    torch.testing.assert_close(solvers.amp(shaped, y.reshape(5, 8, 5), num_iters=10).flatten(1), expected)


def test_amp_refuses() -> None:
    A = unit_columns(4, 6, dtype=torch.complex128)
    with pytest.raises(TypeError, match=r"amp is for real signals"):
        solvers.amp(A, A[:, 0])
    with pytest.raises(ValueError, match="threshold must be greater than 0"):
        solvers.amp(A.real, A.real[:, 0], threshold=0)


class Reshaped(LinearOperator):
    """A matrix between signals of shape (8, 5) and codes of shape (3, 4, 5), with its tensor hidden from torch."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__((3, 4, 5), (8, 5))
        self.matrix = [matrix]

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(-3) @ self.matrix[0].mT).unflatten(-1, (8, 5))

    def adjoint(self, y: Tensor) -> Tensor:
        return (y.flatten(-2) @ self.matrix[0].conj()).unflatten(-1, (3, 4, 5))

    def norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self.matrix[0], 2)


# ---- Networks: operators, complex data, memory -----------------------------------------------------------------------


@pytest.mark.parametrize("selection", [None, SupportSelection(5.0, 20.0)])
@pytest.mark.parametrize(
    ("network", "options"),
    [
        (StepLISTA, {}),
        (StepLISTA, {"momentum": True}),
        (LISTACP, {}),
        (TiLISTA, {}),
        (ALISTA, {"fixed": True}),
        (NAALISTA, {"fixed": True, "hidden": 4}),
        (GLISTA, {}),
    ],
)
def test_an_operator_is_as_good_as_its_matrix(
    network: Callable[..., Unroll], options: dict[str, Any], selection: SupportSelection | None
) -> None:
    A = unit_columns(40, 60)
    y = randn(3, 40)
    options = {"alpha": 0.2, **options}
    if network is not StepLISTA:
        options["support_selection"] = selection
        weights = (0.4 * A, Reshaped(0.4 * A))
    else:
        weights = (None, None)
    if options.pop("fixed", False):
        assert weights[0] is not None

    def build(dictionary: Any, weight: Any) -> Unroll:
        torch.manual_seed(0)
        return network(dictionary, 6, **options, **({} if weight is None else {"weight": weight})).double()

    expected = build(A, weights[0])(y)
    torch.testing.assert_close(build(Reshaped(A), weights[1])(y.reshape(3, 8, 5)).flatten(1), expected)
    assert expected.any()


COMPLEX = unit_columns(12, 20, dtype=torch.complex128)


@pytest.mark.parametrize(
    "net",
    [
        LISTACP(COMPLEX, 8, alpha=0.3),
        TiLISTA(COMPLEX, 8, alpha=0.3, support_selection=None),
        GLISTA(COMPLEX, 8, alpha=0.3),
        StepLISTA(COMPLEX, 8, alpha=0.3),
        LFISTA(COMPLEX, 8, alpha=0.3),
        LISTACP(COMPLEX, 8, alpha=0.3, momentum=True),
    ],
    ids=lambda net: type(net).__name__,
)
def test_complex_networks_start_as_solvers(net: Unroll) -> None:
    y = randn(3, 12, dtype=torch.complex128)
    accelerated = isinstance(net, LFISTA) or isinstance(net[0], Momentum)
    expected = (solvers.fista if accelerated else solvers.ista)(COMPLEX, y, 0.3, num_iters=8)
    torch.testing.assert_close(net(y), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "build", [ALISTA, HyperLISTA, NAALISTA, lambda A: HyperLISTA(A, symmetric=False)], ids=["A", "H", "NA", "H'"]
)
def test_a_unitary_change_of_phase_changes_nothing_else(build: Callable[..., Unroll]) -> None:
    """A real problem turned by phases of the measurements and of the codes has the real solution, turned."""
    A, y = unit_columns(30, 60), sparse_codes(4, 60) @ unit_columns(30, 60).T
    rows, columns = (torch.polar(torch.ones(k).double(), randn(k, seed=k)) for k in (30, 60))
    torch.manual_seed(0)
    real = build(A)(y)
    torch.manual_seed(0)
    turned = build(rows[:, None] * A * columns.conj())(rows * y)
    torch.testing.assert_close(turned, columns * real, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("net", "shared"),
    [
        (LISTACP(DICTIONARIES["wide"], 4), ("dictionary.matrix",)),
        (LISTACP(DICTIONARIES["wide"], 4, tied=("log_theta",)), ("dictionary.matrix", "log_theta")),
        (LISTACP(DICTIONARIES["wide"], 4, momentum=True), ("step.dictionary.matrix",)),
        (ALISTA(DICTIONARIES["wide"], 4), ("dictionary.matrix", "weight.matrix")),
        (TiLISTA(DICTIONARIES["wide"], 4), ("dictionary.matrix", "weight.matrix")),
        (GLISTA(DICTIONARIES["wide"], 4), ("dictionary.matrix",)),
        (NAALISTA(DICTIONARIES["wide"], 4, tied=False), ("dictionary.matrix", "weight.matrix")),
        (LAMP(DICTIONARIES["wide"], 4), ("dictionary",)),
        (StepLISTA(DICTIONARIES["wide"], 4, alpha=0.1), ("dictionary.matrix",)),
        (HyperLISTA(DICTIONARIES["wide"], 4, tied=False), ("dictionary.matrix", "pseudo_inverse.matrix", "c3")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Unroll) else "",
)
def test_fixed_matrices_are_held_once(net: Unroll, shared: tuple[str, ...]) -> None:
    for twin in (net, copy.deepcopy(net), copy.deepcopy(net).float()):
        for name in shared:
            assert len({step.state_dict()[name].data_ptr() for step in twin.steps}) == 1
        other = next(name for name, _ in net[0].named_parameters() if name not in shared)
        assert len({step.state_dict()[other].data_ptr() for step in twin.steps}) == 4


def test_the_dictionary_is_copied_and_fixed() -> None:
    A = torch.nn.Parameter(unit_columns(6, 10).T.contiguous().T)  # not contiguous, which safetensors would refuse
    for build in (LISTACP, TiLISTA, ALISTA, GLISTA, LAMP, lambda A: StepLISTA(A, alpha=0.1)):
        step = build(A)[0]  # type: ignore[operator]
        held = next(value for name, value in step.named_buffers() if name.startswith("dictionary"))
        assert held.data_ptr() != A.data_ptr() and held.is_contiguous() and not held.requires_grad


def test_a_learned_kernel_is_shared() -> None:
    kernel = torch.nn.Parameter(randn(1, 3, 3))
    net = StepLISTA(Convolution(kernel, (3, 7), boundary=Boundary.CIRCULAR), 4, alpha=0.1)
    assert sum(p.numel() for p in net.parameters()) == kernel.numel() + 4
    net(randn(2, 1, 7)).square().sum().backward()
    assert kernel.grad is not None and kernel.grad.any()


def test_casting_on_construction() -> None:
    net = ALISTA(unit_columns(6, 10), dtype=torch.float32)
    assert net(torch.ones(2, 6)).dtype == torch.float32
    operator = Dense(unit_columns(6, 10))
    assert StepLISTA(operator, alpha=0.1, dtype=torch.float32)(torch.ones(2, 6)).dtype == torch.float32
    assert operator.matrix.dtype == torch.float64, "the caller's operator must stay as it is"


def test_parameter_counts() -> None:
    A = unit_columns(6, 10)
    counts = {ALISTA: 32, TiLISTA: 60 + 32, LISTACP: 16 * 61, GLISTA: 16 * 64, HyperLISTA: 2, LAMP: 16 * 61}
    for network, count in counts.items():
        assert sum(p.numel() for p in network(A).parameters()) == count  # type: ignore[operator]


def test_lfista_layers_are_the_general_memory_of_two() -> None:
    """Layer k is soft(We y + Wg x_k + Wm x_{k-1}) with Wg = G + b M and Wm = -b M."""
    A, y = unit_columns(6, 10), randn(3, 6)
    net = LFISTA(A, 3, alpha=0.1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * randn(*p.shape, seed=9)
    t1 = 1.0
    t2 = (1 + math.sqrt(1 + 4 * t1**2)) / 2
    t3 = (1 + math.sqrt(1 + 4 * t2**2)) / 2
    b = (t2 - 1) / t3
    x1, x2, x3 = net.iterates(y)
    layer: Any = net[2]
    z = y @ layer.weight.T + x2 @ (layer.inhibition + b * layer.inertia).T - b * x1 @ layer.inertia.T
    torch.testing.assert_close(x3, soft_threshold(z, layer.theta), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", [exponential_gate, inverse_gate, linear_gate])
def test_glista_gates_are_decreasing_from_one(gate: Callable[[Tensor], Tensor]) -> None:
    values = gate(torch.linspace(0, 5, 50))
    assert values[0] == 1 and (values.diff() <= 0).all() and (values >= 0).all()


def test_glista_gates_open() -> None:
    """With a gain and an overshoot, one layer from a known code, against its formula."""
    A, y, x = unit_columns(6, 10), randn(2, 6), randn(2, 10, seed=1)
    net = GLISTA(A, 1, alpha=0.5, gate=linear_gate)
    step: Any = net[0]
    with torch.no_grad():
        step.gain.fill_(0.7)
        step.log_slope.fill_(math.log(2.0))
        step.overshoot.fill_(0.4)
    u = x * (1 + 0.7 * (1 - 2 * x.abs()).clamp(min=0))
    theta = 0.5 / solvers.lipschitz(A)
    found = soft_threshold(u + (y - u @ A.T) @ A / solvers.lipschitz(A), theta)
    expected = x + (1 + 0.4 * theta / ((found - x).abs() + theta)) * (found - x)
    torch.testing.assert_close(net(y, state=x), expected, rtol=0, atol=1e-12)


def test_naalista_is_an_lstm_cell() -> None:
    A, y = unit_columns(6, 10), randn(4, 6)
    net = NAALISTA(A, 5, hidden=3, support_selection=None)
    step: Any = net[0]
    cell = torch.nn.LSTMCell(2, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.nn.init.normal_(step.head.weight)
        cell.weight_ih.copy_(step.gates.weight[:, :2])
        cell.weight_hh.copy_(step.gates.weight[:, 2:])
        cell.bias_ih.copy_(step.gates.bias)
        cell.bias_hh.zero_()
    W = analytic_weight(A)
    x, memory = torch.zeros(4, 10, dtype=y.dtype), None
    for _ in range(5):
        r = y - x @ A.T
        d = r @ W
        memory = cell(torch.stack((r.abs().mean(1), d.abs().mean(1)), 1), memory)
        gamma, theta = step.head(memory[0]).exp().unsqueeze(-1).unbind(1)
        x = soft_threshold(x + gamma * d, theta)
    torch.testing.assert_close(net(y), x, rtol=0, atol=1e-12)
    assert x.any()


# ---- Errors ----------------------------------------------------------------------------------------------------------

A = unit_columns(6, 10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ALISTA(A, weight=A[:, :9]), ValueError, r"weight maps \(9,\) to \(6,\)"),
        (lambda: LISTACP(A, weight=A[:, :9]), ValueError, r"weight maps \(9,\) to \(6,\)"),
        (lambda: NAALISTA(A, weight=A[:, :9]), ValueError, r"weight maps \(9,\) to \(6,\)"),
        (lambda: TiLISTA(A, weight=A.float()), TypeError, "weight is torch.float32"),
        (lambda: TiLISTA(A, weight=A[0]), ValueError, "weight must be a matrix"),
        (lambda: ALISTA(A, weight=A * torch.nan), ValueError, "weight has 60 NaN"),
        (lambda: ALISTA(Reshaped(unit_columns(40, 60))), TypeError, "weight must be given"),
        (lambda: LISTACP(Reshaped(unit_columns(40, 60))), TypeError, "weight must be given"),
        (lambda: LISTACP([[1.0]]), TypeError, "dictionary must be a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: LISTACP(torch.zeros(3, 4)), ValueError, "dictionary has 4 zero atoms"),
        (lambda: LISTACP(COMPLEX, dtype=torch.float64), TypeError, "dtype must be complex"),
        (lambda: LISTACP(A, alpha=0), ValueError, "alpha must be greater than 0"),
        (lambda: StepLISTA(A, alpha=-1), ValueError, "alpha must be greater than 0"),
        (lambda: LFISTA(A, alpha=0), ValueError, "alpha must be greater than 0"),
        (lambda: NAALISTA(A, alpha=0), ValueError, "alpha must be greater than 0"),
        (lambda: NAALISTA(A, hidden=0), ValueError, "hidden must be at least 1"),
        (lambda: LISTACP(A, support_selection=13.0), TypeError, "support_selection must be None or a Supp"),  # type: ignore[arg-type]
        (lambda: NAALISTA(A, support_selection=13.0), TypeError, "support_selection must be None or a Supp"),  # type: ignore[arg-type]
        (lambda: LISTACP(A, momentum=True, support_selection=SupportSelection()), ValueError, "cannot be combined"),
        (lambda: LISTACP(A, tied="weight"), TypeError, "tied must be"),
        (lambda: LISTACP(A, tied=("weights",)), ValueError, "tied names 'weights'"),
        (lambda: GLISTA(A, gate="exp"), TypeError, "gate must be a function"),  # type: ignore[arg-type]
        (lambda: LAMP(COMPLEX), TypeError, "dictionary must be floating point"),
        (lambda: LAMP(A, threshold=0), ValueError, "threshold must be greater than 0"),
        (lambda: HyperLISTA(A, c1=0), ValueError, "c1 must be greater than 0"),
        (lambda: HyperLISTA(A, c3=-1), ValueError, "c3 must be greater than 0"),
        (lambda: HyperLISTA(Dense(A)), TypeError, "dictionary must be a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: LAMP(A)(COMPLEX[:6, 0]), TypeError, "y must be floating point"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_steps_can_be_built_from_operators() -> None:
    step = ALISTAStep(Dense(A), Dense(analytic_weight(A)), alpha=0.4, support_selection=SupportSelection())
    y = randn(3, 6)
    torch.testing.assert_close(Unroll(step, 4)(y), ALISTA(A, 4, tied=True)(y), rtol=0, atol=0)
