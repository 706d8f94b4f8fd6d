"""Synthetic gradients: their defining equations, what they equal untrained, and that linear ones become true."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unrolled import (
    LISTA,
    LISTACP,
    Backprop,
    Checkpointed,
    CRFasRNN,
    SC2Net,
    Step,
    Tolerance,
    Truncated,
    Unroll,
    fit,
)
from unrolled.decoupled import (
    ConvSynthesiser,
    DecoupledChain,
    DecoupledModule,
    LinearSynthesiser,
    MLPSynthesiser,
    Synthesiser,
    SyntheticBPTT,
    SyntheticGradients,
    ZeroSynthesiser,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


M, N, BATCH = 6, 10, 4
DICTIONARY = nn.functional.normalize(randn(M, N), dim=0)
Y, X = randn(BATCH, M, seed=1), randn(BATCH, N, seed=2)


def error(codes: Tensor, x: Tensor = X) -> Tensor:
    return (codes - x).square().sum(1).mean()


def awake(synthesiser: Synthesiser, seed: int = 3) -> Synthesiser:
    """Away from its estimate of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in synthesiser.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return synthesiser


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in net.parameters()]


# ---- Synthesisers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("kind", [LinearSynthesiser, MLPSynthesiser, ConvSynthesiser])
def test_a_synthesiser_starts_at_zero_and_can_learn(kind: type, difference: bool) -> None:
    synthesiser = kind(3, 3, difference=difference)
    shape = (2, 3, 5, 4) if kind is ConvSynthesiser else (2, 3)
    h, condition = torch.randn(shape), torch.randn(shape)
    assert not synthesiser(h, condition).any()
    (synthesiser(h, condition) - h).square().sum().backward()
    assert synthesiser.last.weight.grad.any()
    awake(synthesiser)
    seen = synthesiser(h, condition)
    assert seen.shape == h.shape
    assert not torch.equal(synthesiser(h, condition + 1), seen)
    if difference:
        torch.testing.assert_close(synthesiser(h + 1, condition + 1), seen)
    synthesiser.reset_parameters()
    assert not synthesiser(h, condition).any()


def test_linear_is_the_affine_map_of_both() -> None:
    synthesiser = awake(LinearSynthesiser(2, 3, dtype=torch.float64))
    h, c = randn(4, 2), randn(4, 3, seed=1)
    A, b = synthesiser.last.weight, synthesiser.last.bias
    torch.testing.assert_close(synthesiser(h, c), h @ A[:, :2].T + c @ A[:, 2:].T + b)


def test_labels_are_one_hot_and_spread_over_pixels() -> None:
    labels = torch.tensor([2, 0])
    vector = nn.functional.one_hot(labels, 3)
    flat, image = awake(LinearSynthesiser(4, 3)), awake(ConvSynthesiser(2, 3, hidden=(), kernel_size=3))
    assert torch.equal(flat(torch.ones(2, 4), labels), flat(torch.ones(2, 4), vector.float()))
    h = torch.randn(2, 2, 4, 5)
    spread = vector.float()[:, :, None, None].expand(2, 3, 4, 5)
    for condition in (labels, vector):
        assert torch.equal(image(h, condition), image(h, spread))


@pytest.mark.parametrize(
    ("make", "error_type", "message"),
    [
        (lambda: LinearSynthesiser(0), ValueError, "features must be at least 1"),
        (lambda: LinearSynthesiser(3, -1), ValueError, "condition must be at least 0"),
        (lambda: LinearSynthesiser(3, 2, difference=True), ValueError, "Set condition=3"),
        (lambda: LinearSynthesiser(3, difference="yes"), TypeError, "difference must be True or False"),
        (lambda: MLPSynthesiser(3, hidden=()), ValueError, "use LinearSynthesiser"),
        (lambda: MLPSynthesiser(3, hidden=64), TypeError, "hidden must be a sequence"),
        (lambda: MLPSynthesiser(3, hidden=(0,)), ValueError, r"hidden\[0\] must be at least 1"),
        (lambda: ConvSynthesiser(3, kernel_size=4), ValueError, "kernel_size must be odd"),
        (lambda: LinearSynthesiser(3)(torch.ones(2, 4)), ValueError, "made for 3 features"),
        (lambda: LinearSynthesiser(3)(torch.ones(2, 3).double()), TypeError, "float64 but LinearSynthesiser is"),
        (lambda: LinearSynthesiser(3, 2)(torch.ones(2, 3)), ValueError, "no target came"),
        (lambda: LinearSynthesiser(3, 2)(torch.ones(2, 3), torch.ones(2, 5)), ValueError, "target must have shape"),
        (lambda: LinearSynthesiser(3, 2)(torch.ones(2, 3), [0, 1]), TypeError, "target must be a Tensor"),
    ],
)
def test_bad_synthesisers_are_refused(make: Callable[[], Any], error_type: type, message: str) -> None:
    with pytest.raises(error_type, match=message):
        make()


# ---- An Unroll in windows --------------------------------------------------------------------------------------------


def network(kind: str, layers: int, tied: bool) -> Unroll:
    if kind == "SC2Net":
        return SC2Net(DICTIONARY, layers, alpha=0.05, tied=tied)
    return LISTA(DICTIONARY, layers, alpha=0.05, tied=tied, momentum=kind == "momentum")


WIDTH = {"LISTA": N, "momentum": 2 * N, "SC2Net": 2 * N}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", WIDTH)
@settings(deadline=None, max_examples=8)
@given(layers=st.integers(1, 7), every=st.integers(1, 7), conditioned=st.booleans())
def test_untrained_it_is_truncated_bit_for_bit(
    kind: str, tied: bool, layers: int, every: int, conditioned: bool
) -> None:
    every = min(every, layers)
    net = network(kind, layers, tied)
    other = copy.deepcopy(net)
    other.gradient = Truncated(every)
    synthesiser = LinearSynthesiser(WIDTH[kind], N if conditioned else 0, dtype=torch.float64)
    y, z = Y.clone().requires_grad_(), Y.clone().requires_grad_()
    found = SyntheticGradients(net, every, synthesiser)(y, target=X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slow contraction
        expected = other(z)
    assert torch.equal(found, expected)
    error(found).backward()
    error(expected).backward()
    assert torch.equal(y.grad, z.grad)
    for a, b in zip(gradients(net), gradients(other), strict=True):
        # What Truncated leaves without a gradient has one of zeros here, as a synthesiser that learns would fill it.
        assert a is b is None or torch.equal(a, torch.zeros_like(a) if b is None else b)


class Oracle(Synthesiser):
    """The true gradient, by running the rest of the network."""

    condition = N

    def __init__(self, rest: Unroll) -> None:
        super().__init__()
        self.rest = [rest]  # in a list: its parameters are not the synthesiser's

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            x = h.detach().requires_grad_()
            return len(h) * torch.autograd.grad(error(self.rest[0](Y, state=x), condition), x)[0]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False, ("weight",)])
def test_with_true_estimates_it_is_backprop(tied: Any, every: int) -> None:
    net = LISTA(DICTIONARY, 6, alpha=0.05, tied=tied)
    exact = copy.deepcopy(net)
    y, z = Y.clone().requires_grad_(), Y.clone().requires_grad_()
    oracles = [Oracle(net[border:]) for border in range(every, 6, every)]
    learner = SyntheticGradients(net, every, oracles)
    error(learner(y, target=X)).backward()
    error(exact(z)).backward()
    torch.testing.assert_close(y.grad, z.grad)
    for a, b in zip(gradients(net), gradients(exact), strict=True):
        torch.testing.assert_close(a, b)


def by_hand(net: Unroll, every: int, models: list[Synthesiser], scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """The windows one after another with plain backward passes: gradients of the network and of the synthesisers."""
    borders = [*range(0, len(net), every), len(net)]
    state: Tensor | None = None
    for w, (begin, end) in enumerate(itertools.pairwise(borders)):
        entry = None if state is None else state.detach().requires_grad_()
        out = net[begin:end](Y, state=entry)
        if end == len(net):
            error(out).backward()
        else:
            (out * models[w](out.detach(), X).detach() / scale).sum().backward()
        if entry is not None:
            misfit = (models[w - 1](entry.detach(), X) - scale * entry.grad).square().sum(1).mean()
            misfit.backward()
        state = out
    return gradients(net), [p.grad for model in models for p in model.parameters()]


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("tied", [True, False])
def test_the_defining_equations(tied: bool, scale: float | None) -> None:
    net = LISTACP(DICTIONARY, 6, alpha=0.05, tied=tied)
    models = [awake(MLPSynthesiser(N, N, hidden=(5,), dtype=torch.float64), seed) for seed in (3, 4)]
    twin, twins = copy.deepcopy(net), copy.deepcopy(models)
    learner = SyntheticGradients(net, 2, models, scale=scale)
    error(learner(Y, target=X)).backward()
    expected, lessons = by_hand(twin, 2, twins, BATCH if scale is None else scale)
    for a, b in zip(gradients(net), expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(learner.synthesisers), lessons, strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()


def test_one_synthesiser_may_serve_all_borders() -> None:
    shared = awake(LinearSynthesiser(N, N, dtype=torch.float64))
    apart = [copy.deepcopy(shared) for _ in range(2)]
    net = LISTA(DICTIONARY, 6, alpha=0.05)
    for models in ([shared, shared], apart):
        error(SyntheticGradients(copy.deepcopy(net), 2, models)(Y, target=X)).backward()
    for ours, one, other in zip(gradients(shared), *map(gradients, apart), strict=True):
        torch.testing.assert_close(ours, one + other)


def test_zero_grad_before_backward_erases_nothing() -> None:
    def run(when: str) -> list[Tensor]:
        learner = SyntheticGradients(LISTA(DICTIONARY, 6, alpha=0.05), 2, awake(LinearSynthesiser(N, dtype=Y.dtype)))
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        if when == "before":
            optimizer.zero_grad()
        loss = error(learner(Y))
        assert all(g is None or not g.any() for g in gradients(learner)), "nothing arrives before loss.backward()"
        if when == "after":
            optimizer.zero_grad()
        loss.backward()
        return [g.clone() for g in gradients(learner)]

    before, after = run("before"), run("after")
    assert all(map(torch.equal, before, after))
    assert sum(bool(g.any()) for g in before) == len(before) - 1  # the first layer multiplies a code of zeros


def test_gradients_add_up_and_autograd_grad_finds_them() -> None:
    learner = SyntheticGradients(LISTA(DICTIONARY, 4, alpha=0.05), 2, awake(LinearSynthesiser(N, dtype=Y.dtype)))
    parameters = list(learner.parameters())
    loss = error(learner(Y))
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for a, p in zip(found, parameters, strict=True):
        torch.testing.assert_close(2 * a, p.grad)


def test_the_graph_goes_with_its_loss() -> None:
    """Kept gradients must not outlive it: no reference cycle, so that nothing waits for the garbage collector."""
    learner = SyntheticGradients(LISTA(DICTIONARY, 4, alpha=0.05), 2, LinearSynthesiser(N, dtype=Y.dtype))
    loss = error(learner(Y))
    nodes, answers = [loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        answers += [weakref.ref(node.answer)] if hasattr(node, "answer") else []
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert answers and answers[0]() is not None
    gc.disable()
    try:
        loss.backward()
        del loss, node
        assert answers[0]() is None
    finally:
        gc.enable()


def test_what_comes_before_the_network_learns_once() -> None:
    """Also where it is the network itself: a cascade must not count its first half twice."""
    net = LISTA(DICTIONARY, 4, alpha=0.05, tied=True)
    back = DICTIONARY.T @ torch.linalg.inv(DICTIONARY @ DICTIONARY.T)
    exact = copy.deepcopy(net)
    inner = exact(Y) @ back

    class True_(Oracle):
        def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
            with torch.enable_grad():
                x = h.detach().requires_grad_()
                loss = error(self.rest[0](inner.detach(), state=x), condition)
                return len(h) * torch.autograd.grad(loss, x)[0]

    error(exact(inner)).backward()
    learner = SyntheticGradients(net, 2, True_(net[2:]))
    error(learner(net(Y) @ back, target=X)).backward()
    for a, b in zip(gradients(net), gradients(exact), strict=True):
        torch.testing.assert_close(a, b)


def test_a_crf_with_labels_at_every_pixel() -> None:
    net = CRFasRNN(3, num_iters=4).double()
    logits, image = randn(1, 3, 5, 6).requires_grad_(), 255 * randn(1, 3, 5, 6, seed=1).sigmoid()
    learner = SyntheticGradients(net, 2, awake(LinearSynthesiser(3, 3, dtype=torch.float64)))  # its classes come last
    labels = torch.randint(3, (1, 5, 6), generator=torch.Generator().manual_seed(0))
    out = learner(logits, image, target=labels)
    assert torch.equal(out, net(logits, image))
    nn.functional.cross_entropy(out, labels).backward()
    assert logits.grad.isfinite().all() and logits.grad.any()
    assert learner.synthesisers[0].last.weight.grad.any()


class _Images(Step):
    """Two images, x+ = x + rate (y - z), z+ = x: a state of two tensors with channels."""

    event_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((2, 1, 1), 0.3, dtype=torch.float64))

    def init(self, y: Tensor) -> _Pair:
        return _Pair(torch.zeros_like(y), torch.zeros_like(y))

    def forward(self, state: _Pair, y: Tensor) -> _Pair:
        return _Pair(state.x + self.rate * (y - state.z), state.x)

    def readout(self, state: _Pair) -> Tensor:
        return state.x


class _Pair(NamedTuple):
    x: Tensor
    z: Tensor


def test_images_meet_a_convolution_by_channels() -> None:
    """Both tensors of the state side by side; with the true gradient it is backpropagation."""
    y, x = randn(3, 2, 4, 5), randn(3, 2, 4, 5, seed=1)
    net = Unroll(_Images(), 4)
    shapes: list[tuple[int, ...]] = []

    class True_(ConvSynthesiser):
        def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
            shapes.append(tuple(h.shape))
            with torch.enable_grad():
                state = _Pair(*(part.detach().requires_grad_() for part in h.split(2, 1)))
                loss = (net(y, state=state, num_iters=2) - condition).square().sum((1, 2, 3)).mean()
                return 3 * torch.cat(torch.autograd.grad(loss, list(state)), 1)

    (SyntheticGradients(net, 2, True_(4, 2))(y, target=x) - x).square().sum((1, 2, 3)).mean().backward()
    found, net[0].rate.grad = net[0].rate.grad, None
    (net(y) - x).square().sum((1, 2, 3)).mean().backward()
    torch.testing.assert_close(found, net[0].rate.grad)
    assert set(shapes) == {(3, 4, 4, 5)}
    learner = SyntheticGradients(net, 2, awake(ConvSynthesiser(4, 2, kernel_size=3, dtype=torch.float64)))
    (learner(y, target=x) - x).square().mean().backward()
    assert learner.synthesisers[0].last.weight.grad.any()


def test_memory_is_that_of_one_window() -> None:
    """Peak bytes saved for backward, 96 layers in windows of 8, at most an eighth of backpropagation's."""
    torch.manual_seed(0)
    dictionary = nn.functional.normalize(torch.randn(20, 40), dim=0)
    y, x = torch.randn(32, 20), torch.randn(32, 40)

    def peak(net: Unroll, call: Callable[[], Tensor]) -> int:
        known = {p.untyped_storage().data_ptr() for p in net.parameters()}
        counts: dict[int, int] = {}
        sizes: dict[int, int] = {}
        most = 0

        class Handle:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor.detach()  # with its past it would keep alive the node that saved it

        def drop(key: int) -> None:
            counts[key] -= 1
            if counts[key] == 0:
                del sizes[key]

        def pack(tensor: Tensor) -> Handle:
            nonlocal most
            handle, key = Handle(tensor), tensor.untyped_storage().data_ptr()
            if key not in known:
                counts[key] = counts.get(key, 0) + 1
                sizes[key] = tensor.untyped_storage().nbytes()
                most = max(most, sum(sizes.values()))
                weakref.finalize(handle, drop, key)
            return handle

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
            error(call(), x).backward()
        return most

    net = LISTACP(dictionary, 96, alpha=0.1, tied=True)
    learner = SyntheticGradients(net, 8, LinearSynthesiser(40, 40, difference=True))
    synthetic, full = peak(net, lambda: learner(y, target=x)), peak(net, lambda: net(y))
    assert 0 < synthetic <= full / 8


def test_it_trains_with_fit_and_survives_copies() -> None:
    dictionary = DICTIONARY.float()
    x = torch.randn(64, N) * (torch.rand(64, N) < 0.2)
    learner = SyntheticGradients(LISTACP(dictionary, 6, alpha=0.1), 2, LinearSynthesiser(N, N, difference=True))
    learner = pickle.loads(pickle.dumps(copy.deepcopy(learner)))

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return error(net(batch @ dictionary.T, target=batch), batch)

    before = {name: p.clone() for name, p in learner.named_parameters()}
    history = fit(learner, [x], loss, num_steps=80, seed=0)
    assert history.loss[-1] < 0.8 * history.loss[0]
    assert all(not torch.equal(p, before[name]) for name, p in learner.named_parameters() if "dictionary" not in name)


def test_outside_training_it_is_the_network() -> None:
    net = LISTA(DICTIONARY, 4, alpha=0.05)
    learner = SyntheticGradients(net, 2, LinearSynthesiser(N, N, dtype=Y.dtype))
    with torch.no_grad():
        assert torch.equal(learner(Y), net(Y))
    learner.eval()
    found = torch.autograd.grad(error(learner(Y)), list(net.parameters()))
    for a, b in zip(found, torch.autograd.grad(error(net(Y)), list(net.parameters())), strict=True):
        assert torch.equal(a, b)
    learner.train()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    assert not learner(Y).requires_grad


def test_frozen_layers_stay_out() -> None:
    net = LISTA(DICTIONARY, 6, alpha=0.05)
    for step in net.steps[:3]:
        step.requires_grad_(False)
    learner = SyntheticGradients(net, 2, awake(LinearSynthesiser(N, dtype=Y.dtype)))
    error(learner(Y)).backward()
    assert [step.weight.grad is not None for step in net.steps] == [False] * 3 + [True] * 3
    assert learner.synthesisers[1].last.weight.grad.any()


class _Counted(NamedTuple):
    x: Tensor
    count: Tensor


class _Counting(Step):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.dtype = dtype

    def init(self, y: Tensor) -> _Counted:
        return _Counted(torch.zeros_like(y), torch.zeros(len(y), dtype=torch.long))

    def forward(self, state: _Counted, y: Tensor) -> _Counted:
        return _Counted(state.x + self.rate * (y - state.x), state.count + 1)

    def readout(self, state: _Counted) -> Tensor:
        return state.x


class _Integers(_Counting):
    def init(self, y: Tensor) -> Tensor:
        return torch.zeros(len(y), 2, dtype=torch.long)

    def forward(self, state: Tensor, y: Tensor) -> Tensor:
        return state + 1

    def readout(self, state: Tensor) -> Tensor:
        return state


def test_counters_pass_a_border_and_get_no_gradient() -> None:
    net = Unroll(_Counting(torch.long), 4)
    learner = SyntheticGradients(net, 2, awake(LinearSynthesiser(M, dtype=Y.dtype)))
    error(learner(Y), randn(BATCH, M)).backward()
    assert net[0].rate.grad.isfinite() and net[0].rate.grad != 0


def test_a_half_precision_window_stays_one() -> None:
    net = LISTA(DICTIONARY, 4, alpha=0.05, tied=True).bfloat16()
    learner = SyntheticGradients(net, 2, LinearSynthesiser(N).bfloat16())
    out = learner(Y.bfloat16())
    error(out, X.bfloat16()).backward()
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.bfloat16 for g in gradients(learner))


class _Wrong(Synthesiser):
    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        return h[:, 1:]


def _learner(**options: Any) -> SyntheticGradients:
    net = options.pop("net", None) or LISTA(DICTIONARY, 6, alpha=0.05)
    settings = {"every": 2, "synthesiser": LinearSynthesiser(N, dtype=torch.float64), **options}
    return SyntheticGradients(net, **settings)


@pytest.mark.parametrize(
    ("make", "error_type", "message"),
    [
        (lambda: _learner(every=7), ValueError, "every is 7, but the network has 6 iterations"),
        (lambda: _learner(every=0), ValueError, "every must be at least 1"),
        (lambda: _learner(net=nn.Linear(2, 2)), TypeError, "net must be an Unroll"),
        (
            lambda: _learner(net=LISTA(DICTIONARY, 6, alpha=1, gradient=Checkpointed(2))),
            ValueError,
            "gradient=Backprop",
        ),
        (lambda: _learner(net=LISTA(DICTIONARY, 6, alpha=1, stop=Tolerance(rtol=0.1))), ValueError, "stop=None"),
        (lambda: _learner(synthesiser=nn.Linear(N, N)), TypeError, "synthesiser must be a Synthesiser"),
        (lambda: _learner(synthesiser=[ZeroSynthesiser()]), ValueError, "1 synthesisers for 2 borders"),
        (lambda: _learner(scale=0.0), ValueError, "scale must be greater than 0"),
        (lambda: _learner(synthesiser=LinearSynthesiser(N, N, dtype=Y.dtype))(Y), ValueError, "target is missing"),
        (lambda: _learner(synthesiser=LinearSynthesiser(7, dtype=Y.dtype))(Y), ValueError, "made for 7 features"),
        (lambda: _learner(synthesiser=_Wrong())(Y), ValueError, r"_Wrong must return .* \(4, 10\); got \(4, 9\)"),
        (lambda: _learner()(Y.float()), TypeError, "y is torch.float32"),
        (lambda: _learner(net=Unroll(_Integers(torch.long), 6))(Y), TypeError, "no gradient can cross a border"),
        (
            lambda: _learner(net=LISTA(DICTIONARY + 0j, 6, alpha=1))(Y + 0j),
            TypeError,
            "the state is complex",
        ),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Any], error_type: type, message: str) -> None:
    with pytest.raises(error_type, match=message):
        make()


# ---- Chains ----------------------------------------------------------------------------------------------------------


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


STEPS = 700  # of the linear chain


def squared(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().sum(1).mean()


def test_a_linear_chain_converges_to_the_least_squares_solution() -> None:
    """Two linear modules and a linear synthesiser that sees the target: the gradient is 2 W'(W h - y), linear in both.

    So where learning comes to rest the synthetic gradient is the true one, and the chain is backpropagation's.
    """
    torch.manual_seed(0)
    x = 40**0.5 * torch.linalg.qr(randn(40, 4)).Q  # white, so that a few hundred steps of one rate suffice
    target = x @ randn(4, 3, seed=1) + randn(40, 3, seed=2)  # with noise: the loss does not end at zero
    best = x @ torch.linalg.lstsq(x, target).solution
    modules = [nn.Linear(4, 5, bias=False, dtype=x.dtype), nn.Linear(5, 3, bias=False, dtype=x.dtype)]
    by_backprop = copy.deepcopy(nn.Sequential(*modules))
    chain = DecoupledChain(modules, LinearSynthesiser(5, 3, dtype=x.dtype), sgd)
    first, last = chain.stages

    def estimate_error() -> float:
        """Relative to the true gradients of the samples, which are not zero even at the solution."""
        with torch.no_grad():
            h = first(x)
            truth = 2 * (last(h) - target) @ last.module.weight
            return float((first.synthesiser(h, target) - truth).norm() / truth.norm())

    before = estimate_error()
    losses = [chain.update(x, target, squared).item() for _ in range(STEPS)]
    optimizer = sgd(by_backprop.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        squared(by_backprop(x), target).backward()
        optimizer.step()
    assert losses[0] > 2 * losses[-1]
    torch.testing.assert_close(by_backprop(x), best, rtol=0, atol=1e-6)
    torch.testing.assert_close(chain(x), best, rtol=0, atol=1e-6)
    assert before == 1.0 and estimate_error() < 1e-6


def test_an_update_by_hand() -> None:
    """Two steps of a chain of three, each gradient from its definition."""
    torch.manual_seed(0)
    modules = [nn.Linear(3, 4).double(), nn.Linear(4, 5).double(), nn.Linear(5, 2).double()]
    models = [awake(LinearSynthesiser(4, dtype=Y.dtype)), awake(LinearSynthesiser(5, 2, dtype=Y.dtype))]
    ours, theirs = copy.deepcopy(modules), copy.deepcopy(models)
    chain = DecoupledChain(modules, models, sgd)
    x, target, rate, B = randn(6, 3), randn(6, 2, seed=1), 0.05, 6
    for _ in range(2):
        value = chain.update(x, target, squared)
        h: Tensor = x
        arrived: list[Tensor] = []
        outs: list[Tensor] = []
        for i, module in enumerate(ours):
            h = h.detach().requires_grad_()
            out = module(h)
            if i < 2:
                weight = theirs[i](out, target if i == 1 else None).detach() / B
                objective = (out * weight).sum()
            else:
                objective = expected = squared(out, target)
            *found, back = torch.autograd.grad(objective, [*module.parameters(), h])
            with torch.no_grad():
                for p, g in zip(module.parameters(), found):
                    p -= rate * g
            arrived.append(B * back)
            outs.append(out.detach())
            h = out
        for i, model in enumerate(theirs):
            misfit = (model(outs[i], target if i == 1 else None) - arrived[i + 1]).square().sum(1).mean()
            found = torch.autograd.grad(misfit, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), found):
                    p -= rate * g
        torch.testing.assert_close(value, expected.detach())
    for a, b in zip([*modules, *models], [*ours, *theirs], strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def clouds(count: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    centres = 2 * torch.eye(3, 6)
    return centres[labels] + 0.7 * torch.randn(count, 6, generator=generator), labels


def deep(width: int = 16) -> list[nn.Module]:
    sizes = [6, width, width]
    return [*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(sizes)), nn.Linear(width, 3)]


OPTIMISERS = {
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=1e-2),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=3e-3),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=3e-2),
}


def accuracy(chain: nn.Module) -> float:
    x, labels = clouds(500, seed=1)
    with torch.no_grad():
        return float((chain(x).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("optimizer", OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_chain_learns_with_any_optimiser(optimizer: Any) -> None:
    torch.manual_seed(0)
    chain = DecoupledChain(deep(), LinearSynthesiser(16, 3), optimizer)
    assert len(chain.optimizers) == 5
    x, labels = clouds()
    first = [p.clone() for p in chain.stages[0].parameters()]
    for _ in range(60):
        chain.update(x, labels, nn.functional.cross_entropy)
    assert accuracy(chain) > 0.9
    assert all(not torch.equal(a, b) for a, b in zip(first, chain.stages[0].parameters()))


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("unlocked", [True, False])
def test_sporadic_updates_and_predicted_inputs(conditioned: bool, unlocked: bool) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 16), nn.Tanh()) for _ in range(2)] if unlocked else None
    chain = DecoupledChain(
        deep(),
        MLPSynthesiser(16, 3 if conditioned else 0, hidden=(32,)),
        lambda ps: torch.optim.Adam(ps, lr=1e-2),
        probability=0.3,
        input_model=models,
    )
    x, labels = clouds()
    moved = []
    for _ in range(200):
        before = [stage.module.state_dict() for stage in chain.stages]
        before = [{k: v.clone() for k, v in state.items()} for state in before]
        chain.update(x, labels, nn.functional.cross_entropy)
        moved.append(
            [
                any(not torch.equal(v, old[k]) for k, v in stage.module.state_dict().items())
                for stage, old in zip(chain.stages, before)
            ]
        )
    rates = torch.tensor(moved).float().mean(0)
    assert ((rates > 0.2) & (rates < 0.4)).all()  # 200 draws at 0.3: within 3 standard errors
    assert accuracy(chain) > 0.8  # a third of the labels is guessed right


def test_a_module_is_updated_before_the_next_one_runs() -> None:
    seen: list[bool] = []

    class Watching(nn.Linear):
        def forward(self, h: Tensor) -> Tensor:
            seen.append(torch.equal(first.weight, weight))
            return super().forward(h)

    first = nn.Linear(3, 4)
    weight = first.weight.detach().clone()
    chain = DecoupledChain([first, Watching(4, 2)], awake(LinearSynthesiser(4)), sgd)
    chain.update(torch.randn(5, 3), torch.randn(5, 2), squared)
    assert seen == [False]


@pytest.mark.parametrize(
    ("make", "error_type", "message"),
    [
        (lambda: DecoupledChain([nn.Linear(2, 2)], ZeroSynthesiser(), sgd), ValueError, "at least two"),
        (lambda: DecoupledChain(nn.Linear(2, 2), ZeroSynthesiser(), sgd), TypeError, "modules must be a sequence"),
        (lambda: DecoupledChain(deep(), ZeroSynthesiser(), sgd, probability=0.0), ValueError, "probability"),
        (lambda: DecoupledChain(deep(), ZeroSynthesiser(), sgd, probability=1.5), ValueError, "at most 1"),
        (lambda: DecoupledChain(deep(), ZeroSynthesiser(), torch.optim.Adam), TypeError, None),
        (lambda: DecoupledChain(deep(), ZeroSynthesiser(), sgd(deep()[0].parameters())), TypeError, "its own"),
        (lambda: DecoupledChain(deep(), ZeroSynthesiser(), lambda ps: 3), TypeError, "must return a torch.optim"),
        (lambda: DecoupledChain(deep(), ZeroSynthesiser(), sgd, input_model=deep()), ValueError, "3 modules for 2"),
        (lambda: DecoupledModule("f", ZeroSynthesiser(), sgd), TypeError, "module must be"),
        (lambda: DecoupledModule(nn.Linear(2, 2), nn.Linear(2, 2), sgd), TypeError, "synthesiser must be"),
        (lambda: DecoupledModule(nn.Linear(2, 2), None, sgd).step(torch.ones(1, 2)), ValueError, "pass loss"),
        (
            lambda: DecoupledModule(nn.Linear(2, 2), ZeroSynthesiser(), sgd).learn(torch.ones(1, 2), torch.ones(2)),
            ValueError,
            "gradient must have the shape",
        ),
        (
            lambda: DecoupledChain(deep(), LinearSynthesiser(9), sgd).update(*clouds(), nn.functional.cross_entropy),
            ValueError,
            "made for 9 features",
        ),
    ],
)
def test_bad_chains_are_refused(make: Callable[[], Any], error_type: type, message: str | None) -> None:
    if message is None:  # a class makes an optimiser of parameters too
        assert isinstance(make(), DecoupledChain)
        return
    with pytest.raises(error_type, match=message):
        make()


# ---- Recurrent networks ----------------------------------------------------------------------------------------------


def recurrent(kind: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    if kind == "LSTM":
        return nn.LSTM(3, 4, num_layers=2, batch_first=True).double(), 16
    if kind == "GRU":
        return nn.GRU(3, 4, batch_first=True).double(), 4
    return (nn.LSTMCell(3, 4).double(), 8) if kind == "LSTMCell" else (nn.GRUCell(3, 4).double(), 4)


KINDS = ["LSTM", "GRU", "LSTMCell", "GRUCell"]


def windows(net: SyntheticBPTT, parts: list[Tensor]) -> list[Tensor]:
    border, losses = None, []
    for k, part in enumerate(parts):
        out, border = net(part, border, last=k == len(parts) - 1)
        losses.append(out.square().sum(-1).sum(1).mean())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_is_truncated_bptt(kind: str) -> None:
    net, width = recurrent(kind)
    plain = copy.deepcopy(net)
    parts = list(randn(5, 12, 3).split(4, 1))
    for loss in windows(SyntheticBPTT(net, LinearSynthesiser(width, dtype=Y.dtype)), parts):
        loss.backward()
    state: Any = None
    for part in parts:
        if isinstance(plain, nn.RNNCellBase):
            outs = []
            for x in part.unbind(1):
                state = plain(x, state)
                outs.append(state[0] if isinstance(state, tuple) else state)
            out = torch.stack(outs, 1)
        else:
            out, state = plain(part, state)
        out.square().sum(-1).sum(1).mean().backward()
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
    for a, b in zip(gradients(net), gradients(plain), strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_true_gradient_at_the_border_it_is_full_bptt(kind: str) -> None:
    """And what the synthesiser is taught is that gradient."""
    net, width = recurrent(kind)
    first, second = randn(5, 8, 3).split(4, 1)

    class True_(Synthesiser):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros((), dtype=Y.dtype))

        def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
            return self.value + self.bias

    synthesiser = True_()
    learner = SyntheticBPTT(net, synthesiser)
    # The true gradient, from a pass over both windows.
    _, after = learner._run(first, None)
    states = [s.detach().requires_grad_() for s in (after if isinstance(after, tuple) else (after,))]
    rest, _ = learner._run(second, tuple(states) if isinstance(after, tuple) else states[0])
    back = torch.autograd.grad(rest.square().sum(-1).sum(1).mean(), states)
    synthesiser.value = 5 * torch.cat([b.transpose(0, 1).flatten(1) if b.dim() == 3 else b for b in back], 1)
    assert synthesiser.value.shape == (5, width)
    whole, _ = learner._run(torch.cat([first, second], 1), None)
    expected = torch.autograd.grad(whole.square().sum(-1).sum(1).mean(), list(net.parameters()))
    for loss in windows(learner, [first, second]):
        loss.backward()
    for a, b in zip(gradients(net), expected, strict=True):
        torch.testing.assert_close(a, b)
    # It was right, so there was nothing to learn.
    assert synthesiser.bias.grad.abs() < 1e-12


def test_the_recurrent_lesson_is_the_gradient_that_arrived() -> None:
    net, width = recurrent("GRU")
    synthesiser = awake(LinearSynthesiser(width, 2, dtype=Y.dtype))
    learner = SyntheticBPTT(net, synthesiser)
    first, second = randn(5, 8, 3).split(4, 1)
    condition = randn(5, 2, seed=1)
    _, border = learner(first, condition=condition)
    start = border.state.clone().requires_grad_()
    arrived = 5 * torch.autograd.grad(net(second, start)[0].square().sum(-1).sum(1).mean(), start)[0]
    misfit = (synthesiser(border.state[0], condition) - arrived[0]).square().sum(1).mean()
    expected = torch.autograd.grad(misfit, list(synthesiser.parameters()))
    out, _ = learner(second, border, last=True)
    out.square().sum(-1).sum(1).mean().backward()
    for a, b in zip(gradients(synthesiser), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_window_without_loss_still_learns() -> None:
    net, width = recurrent("LSTM")
    learner = SyntheticBPTT(net, awake(LinearSynthesiser(width, dtype=Y.dtype)))
    out, _ = learner(randn(5, 4, 3))
    (0 * out.sum()).backward()
    assert all(g.any() for g in gradients(net))


@pytest.mark.parametrize(
    ("make", "error_type", "message"),
    [
        (lambda: SyntheticBPTT("LSTM", ZeroSynthesiser()), TypeError, "net must be"),
        (lambda: SyntheticBPTT(nn.GRU(3, 4), nn.Linear(4, 4)), TypeError, "synthesiser must be"),
        (lambda: SyntheticBPTT(nn.GRU(3, 4), LinearSynthesiser(5))(torch.ones(2, 1, 3)), ValueError, "for 5 features"),
        (lambda: SyntheticBPTT(nn.GRU(3, 4), LinearSynthesiser(4, 2))(torch.ones(2, 1, 3)), ValueError, "no target"),
        (
            lambda: SyntheticBPTT(nn.GRU(3, 4), ZeroSynthesiser())(torch.ones(2, 1, 3), [1]),
            TypeError,
            "a state must be",
        ),
    ],
)
def test_bad_recurrent_use_is_refused(make: Callable[[], Any], error_type: type, message: str) -> None:
    with pytest.raises(error_type, match=message):
        make()


def test_backprop_is_the_default_of_the_networks_here() -> None:
    """The comparisons above mean what they say only if the networks' own strategy is the exact one."""
    assert LISTA(DICTIONARY, 2, alpha=1.0).gradient == Backprop()
