"""The gradient strategies: against numeric derivatives, against each other, and what they keep in memory."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from unrolled import LISTA, Backprop, Checkpointed, Step, Tolerance, Truncated, Unroll
from unrolled.gradient import GradientWarning

F64 = torch.float64
EXACT = {"rtol": 0.0, "atol": 1e-12}  # the same float64 operations, perhaps in another order


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lista(num_iters, **options):
    """A network away from its untrained values, so that layers differ and nothing sits on a kink."""
    net = LISTA(randn(6, 10), num_iters, alpha=0.3, **options)
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter += 0.03 * randn(*parameter.shape, seed=k)
    return net


def gradients(net, y=None):
    """d(sum of squares) by every parameter, None where it has no part in it."""
    y = randn(3, 6, seed=1) if y is None else y
    return torch.autograd.grad(net(y).square().sum(), list(net.parameters()), allow_unused=True)


class Carried(NamedTuple):
    x: Tensor
    w: Tensor


class Descent(Step):
    """x+ = x - s A'(A x - y), with everything that has a gradient an input of the call."""

    def prepare(self, y, A, s, x0):
        return y, A, s, x0

    def init(self, context):
        return context[3]

    def forward(self, x, context):
        y, A, s, _ = context
        return x - s * torch.tanh(x @ A.mT - y) @ A


# ---- Exact and biased ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 1, 2, 3, 7, 99])
def test_checkpointed_against_the_numeric_derivative(every):
    net = Unroll(Descent(), 7, gradient=Checkpointed(every))
    inputs = randn(2, 4), randn(4, 3, seed=1), torch.tensor(0.1, dtype=F64), randn(2, 3, seed=2)
    assert torch.autograd.gradcheck(net, [x.requires_grad_() for x in inputs])


@given(st.integers(1, 600))
def test_windows_become_longer_towards_the_start(num_iters):
    starts = Checkpointed().starts(num_iters)
    lengths = [b - a for a, b in itertools.pairwise([*starts, num_iters])]
    assert sum(lengths) == num_iters and min(lengths) >= 1
    counted = [2 + i // 2 for i in range(len(lengths))]  # from the end; what is left over goes first
    assert lengths[:0:-1] == counted[:-1] and lengths[0] <= counted[-1]
    # States kept and iterations run once more, an iteration taken to hold two states: near 2 sqrt(K), which is the
    # least that windows can do, and below what windows of equal length need, 2 sqrt(2 K).
    peak = max(kept + 2 * length for kept, length in enumerate(lengths, 1))
    if num_iters >= 64:
        assert peak <= 2 * math.sqrt(num_iters) + 3 < 2 * math.sqrt(2 * num_iters)


@pytest.mark.parametrize("strategy", [Backprop(), Checkpointed(), Checkpointed(3), Truncated(8)], ids=str)
@pytest.mark.parametrize("options", [{"tied": True}, {"factored": True, "momentum": True}], ids=str)
def test_a_directional_derivative_by_the_parameters(strategy, options):
    net = lista(8, gradient=strategy, **options)
    y = randn(3, 6, seed=1)
    directions = [randn(*p.shape, seed=100 + k) for k, p in enumerate(net.parameters())]
    claimed = sum((g * d).sum() for g, d in zip(gradients(net), directions, strict=True))

    @torch.no_grad()
    def loss_at(h):
        for p, d in zip(net.parameters(), directions, strict=True):
            p.add_(h * d)
        value = net(y).square().sum()
        for p, d in zip(net.parameters(), directions, strict=True):
            p.sub_(h * d)
        return value

    h = 1e-6  # error h^2 of the formula, 1e-16 / h of the rounding
    torch.testing.assert_close(claimed, (loss_at(h) - loss_at(-h)) / (2 * h), rtol=1e-7, atol=1e-8)


def test_truncated_against_the_numeric_derivative_from_its_constant_start():
    last, total = 3, 8
    y, A, s, x0 = randn(2, 4), randn(4, 3, seed=1), torch.tensor(0.1, dtype=F64), randn(2, 3, seed=2)
    start = Unroll(Descent(), total - last).run(y, A, s, x0)
    inputs = [x.requires_grad_() for x in (y, A, s)]

    def tail(y, A, s):  # what Truncated claims to differentiate
        return Unroll(Descent(), last)(y, A, s, x0, state=start)

    assert torch.autograd.gradcheck(tail, inputs)
    truncated = Unroll(Descent(), total, gradient=Truncated(last))(y, A, s, x0)
    expected = torch.autograd.grad(tail(*inputs).square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(truncated.square().sum(), inputs), expected, **EXACT)


@pytest.mark.parametrize("tied", [True, False, ("weight",)], ids=str)
def test_truncated_to_one_is_the_derivative_of_the_last_iteration_alone(tied):
    net = lista(5, tied=tied, gradient=Truncated(1))
    y = randn(3, 6, seed=1)
    found = gradients(net)
    with torch.no_grad():
        before = net[:4](y)
    step = net[4]
    loss = step(before, step.prepare(y)).square().sum()
    expected = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    torch.testing.assert_close(found, expected, **EXACT)
    assert sum(g is not None and bool(g.any()) for g in found) == 3  # weight, inhibition, threshold


def test_truncated_leaves_the_early_layers_and_the_start_alone():
    net = lista(6, gradient=Truncated(2))
    x0 = randn(3, 10, seed=5).requires_grad_()
    net(randn(3, 6, seed=1), state=x0).square().sum().backward()
    reached = [all(p.grad is not None and bool(p.grad.any()) for p in step.parameters()) for step in net]
    assert reached == [False] * 4 + [True] * 2
    assert all(p.grad is None for step in net[:4] for p in step.parameters())
    assert x0.grad is None


def test_truncated_cuts_what_the_state_carries_along():
    class Carrying(Step):
        """x+ = w x + y with the learned w in the state, untouched by the iterations."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5, dtype=F64))

        def init(self, y):
            return Carried(torch.zeros_like(y), self.w * torch.ones_like(y))

        def forward(self, state, y):
            return Carried(state.w * state.x + y, state.w)

        def readout(self, state):
            return state.x

    net, y = Unroll(Carrying(), 4, gradient=Truncated(2)), randn(2, 3).requires_grad_()
    out = net(y)
    assert torch.autograd.grad(out.sum(), net[0].w, allow_unused=True, retain_graph=True) == (None,)
    (slope,) = torch.autograd.grad(out.sum(), y)
    torch.testing.assert_close(slope, torch.full_like(y, 1.5))  # y itself and w y, the last two of four


def test_truncated_is_biased_and_the_bias_falls():
    def whole(strategy):
        return torch.cat([g.flatten() for g in gradients(lista(12, tied=True, gradient=strategy))])

    exact = whole(Backprop())
    with pytest.warns(GradientWarning, match="contract by 1"):  # 12 iterations in which codes still grow
        errors = [float((whole(Truncated(last)) - exact).norm()) for last in (1, 4, 8, 12)]
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0.0


@pytest.mark.parametrize("strategy", [Checkpointed(2), Truncated(9)], ids=str)
def test_a_stopped_network_has_the_same_exact_gradient(strategy):
    stop = Tolerance(rtol=0.3)
    exact, other = lista(9, stop=stop), lista(9, stop=stop, gradient=strategy)
    torch.testing.assert_close(gradients(other), gradients(exact), **EXACT)
    assert any(g is not None and not g.any() for g in gradients(exact)), "a layer must have been stopped before"


@pytest.mark.parametrize("strategy", [Checkpointed(), Checkpointed(2), Checkpointed(5)], ids=str)
def test_dropout_is_the_same_when_computed_again(strategy):
    class Dropping(Step):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6, dtype=F64)
            self.drop = nn.Dropout(0.5)

        def init(self, y):
            return y

        def forward(self, x, y):
            return y + self.drop(torch.tanh(self.linear(x)))

    def under_seed(gradient):
        net.gradient = gradient
        torch.manual_seed(7)
        return gradients(net)

    net = Unroll(Dropping(), 5)
    exact = under_seed(Backprop())
    torch.testing.assert_close(under_seed(strategy), exact, **EXACT)
    torch.manual_seed(8)
    assert not torch.allclose(gradients(net)[0], exact[0]), "the masks must matter"


def test_checkpointed_never_gives_a_wrong_gradient_under_functional_call():
    """The values that were swapped in are gone when the backward pass runs the iterations again."""
    exact, net = lista(4), lista(4, gradient=Checkpointed(2))
    y = randn(3, 6, seed=1)
    values = {name: (1.1 * p.detach()).requires_grad_() for name, p in net.named_parameters()}

    def gradient(network):
        loss = torch.func.functional_call(network, values, (y,)).square().sum()
        return torch.autograd.grad(loss, list(values.values()))

    expected = gradient(exact)
    try:
        found = gradient(net)
    except RuntimeError:
        return  # refused: as good
    torch.testing.assert_close(found, expected, **EXACT)


def test_checkpointed_says_that_it_does_not_run_under_functional_gradients():
    net, y = lista(4, gradient=Checkpointed(2)), randn(3, 6, seed=1)
    for transform in (torch.func.jacrev(net), torch.func.grad(lambda y: net(y).sum())):
        with pytest.raises(RuntimeError, match=r"Checkpointed\(every=2\) does not run .* torch\.func.*Backprop\(\)"):
            transform(y)
    torch.testing.assert_close(torch.vmap(net)(y), net(y))  # no gradient inside the transform: fine


def test_the_module_is_a_package_with_the_names_that_it_had():
    import pickle

    from unrolled import gradient

    for strategy in (Backprop(), Checkpointed(2), Truncated(2)):
        assert getattr(gradient, type(strategy).__name__) is type(strategy)
        assert pickle.loads(pickle.dumps(strategy)) == strategy


# ---- Memory and work -------------------------------------------------------------------------------------------------


def saved_bytes(net: Unroll, y: Tensor) -> int:
    """What the backward pass of one call keeps, each storage once, parameters and input apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (y, *net.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # held by the graph, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(y)
    assert out.requires_grad
    return sum(kept.values())


def test_checkpointed_keeps_an_eighth():
    y = randn(16, 20, seed=1)

    def bytes_of(strategy, num_iters=32, tied=True):
        net = LISTA(randn(20, 40), num_iters, alpha=0.1, factored=True, tied=tied, gradient=strategy)
        return saved_bytes(net, y)

    state = 16 * 40 * 8
    for tied in (True, False):
        everything = bytes_of(Backprop(), tied=tied)
        assert everything >= 32 * state
        assert 7 * state <= bytes_of(Checkpointed(4), tied=tied) <= everything / 8
    # Truncated keeps what a network of that many layers would, and the state that it starts from.
    assert bytes_of(Truncated(4)) <= bytes_of(Backprop(), num_iters=4) + state


def counted(gradient: Callable) -> tuple[Unroll, list[int]]:
    calls = [0]

    class Counting(Descent):
        def forward(self, x, context):
            calls[0] += 1
            return super().forward(x, context)

    return Unroll(Counting(), 8, gradient=gradient), calls


@pytest.mark.parametrize(
    ("strategy", "forward", "backward"),
    [(Backprop(), 8, 0), (Checkpointed(3), 8, 8), (Checkpointed(), 8, 6), (Truncated(3), 8, 0), (Truncated(99), 8, 0)],
    ids=str,
)
def test_the_requested_rule_runs(strategy, forward, backward):
    net, calls = counted(strategy)
    inputs = randn(2, 4), randn(4, 3, seed=1), torch.tensor(0.1, dtype=F64), randn(2, 3, seed=2)
    inputs[0].requires_grad_()
    out = net(*inputs)
    assert calls == [forward]
    out.sum().backward()
    assert calls == [forward + backward]
    assert torch.equal(out, Unroll(Descent(), 8)(*inputs))

    calls[0] = 0
    with torch.no_grad():
        assert not net(*inputs).requires_grad
    assert calls == [8]


# ---- As objects ------------------------------------------------------------------------------------------------------


def test_a_strategy_of_ones_own():
    """Any callable will do: here the last two iterations of every four."""
    spans = []

    def sparse(advance, state, num_iters):
        for start in range(0, num_iters, 4):
            with torch.no_grad():
                state = advance(state, start, start + 2)
            state = advance(state, start + 2, min(start + 4, num_iters))
            spans.append(start)
        return state

    net = lista(8, gradient=sparse)
    assert torch.equal(net(randn(3, 6, seed=1)), lista(8)(randn(3, 6, seed=1)))
    assert spans == [0, 4]
    reached = [g is not None for g in gradients(net)]
    # weight, threshold and inhibition of each layer; the no_grad of layers 4 and 5 cuts all that came before.
    assert reached == [False] * 18 + [True] * 6


def test_a_strategy_may_be_a_module_that_learns():
    class Damped(nn.Module):
        def __init__(self):
            super().__init__()
            self.damping = nn.Parameter(torch.tensor(0.5, dtype=F64))

        def forward(self, advance, state, num_iters):
            for k in range(num_iters):
                state = self.damping * state + (1 - self.damping) * advance(state, k, k + 1)
            return state

    net = lista(4, gradient=Damped())
    assert "gradient.damping" in dict(net.named_parameters())
    assert all(g is not None for g in gradients(net))


@pytest.mark.parametrize(("kind", "argument"), [(Checkpointed, "every"), (Truncated, "last")])
def test_strategies_are_values(kind, argument):
    four = kind(4)
    assert four == kind(**{argument: 4}) != kind(5)
    assert hash(four) == hash(kind(4))
    assert repr(four) == f"{kind.__name__}({argument}=4)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(four, argument, 5)
    for value, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), ("4", TypeError)):
        with pytest.raises(error, match=rf"^{argument} must be"):
            kind(value)
    assert Backprop() == Backprop() and hash(Backprop()) == hash(Backprop())
    assert len({Checkpointed(4), Truncated(4), Backprop()}) == 3
