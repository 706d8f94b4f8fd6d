"""Iterations that run again in the backward pass: to the last bit what `Backprop` computes, whatever surrounds them."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from unrolled import Backprop, Checkpointed, Step, Unroll
from unrolled.gradient import recompute
from unrolled.stopping import Tolerance

F64 = torch.float64
K = 9
WINDOWS = [Checkpointed(), Checkpointed(1), Checkpointed(4)]

pytestmark = pytest.mark.parametrize("strategy", WINDOWS, ids=str)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Recurrent(Step):
    """x+ = tanh(x W) + y."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.5 * randn(4, 4))

    def init(self, y):
        return y

    def forward(self, x, y):
        return torch.tanh(x @ self.weight) + y


def inputs(*others, seed=1):
    y = randn(3, 4, seed=seed).requires_grad_()
    return y, [y, *others]


def same(gradients, strategy):
    """`gradients(strategy)` gives as many tensors as `gradients(Backprop())`, equal to the last bit."""
    found, expected = gradients(strategy), gradients(Backprop())
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert all(bool(g.any()) for g in expected), "a gradient of zeros shows nothing"


# ---- What iterations may depend on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_inputs_and_the_start(strategy, tied):
    def gradients(gradient):
        net = Unroll(Recurrent(), K, tied=tied, gradient=gradient)
        start = randn(3, 4, seed=2).requires_grad_()
        y, wanted = inputs(start, *net.parameters())
        return torch.autograd.grad(net(y, state=2 * start).square().sum(), wanted)

    same(gradients, strategy)


def test_a_tensor_that_only_a_closure_knows(strategy):
    class Weighed(Recurrent):
        def __init__(self, weigh):
            super().__init__()
            self.weigh = weigh

        def forward(self, x, y):
            return self.weigh(super().forward(x, y))

    def gradients(gradient):
        leaf = randn(4, seed=3).requires_grad_()
        outside = leaf.exp()
        net = Unroll(Weighed(lambda x: 0.3 * outside * x), K, gradient=gradient)
        y, wanted = inputs(leaf, *net.parameters())
        return torch.autograd.grad(net(y).square().sum(), wanted)

    same(gradients, strategy)


class Counted(NamedTuple):
    x: Tensor
    k: Tensor


class Counting(Recurrent):
    """With an integer in the state that decides what an iteration does."""

    def init(self, y):
        return Counted(y, torch.zeros((), dtype=torch.int64))

    def forward(self, state, y):
        return Counted(torch.tanh(state.x @ self.weight) / (1 + state.k) + y, state.k + 1)

    def readout(self, state):
        return state.x


@pytest.mark.parametrize("stop", [None, Tolerance(rtol=0.05)], ids=["to the end", "stopped"])
def test_states_of_several_tensors_and_integers(strategy, stop):
    def gradients(gradient):
        net = Unroll(Counting(), K, gradient=gradient, stop=stop)
        y, wanted = inputs(*net.parameters())
        return torch.autograd.grad(net(y).square().sum(), wanted)

    same(gradients, strategy)


@pytest.mark.parametrize("derivative", ["used as a number", "differentiated"])
def test_a_step_that_takes_derivatives_itself(strategy, derivative):
    class Descending(Recurrent):
        def forward(self, x, y):
            with torch.enable_grad():
                at = x if derivative == "differentiated" else x.detach()
                at = at if at.requires_grad else at.requires_grad_()
                energy = torch.tanh(at @ self.weight).square().sum() + (at - y).square().sum()
                (slope,) = torch.autograd.grad(energy, at, create_graph=derivative == "differentiated")
            return torch.tanh(x @ self.weight) - 0.1 * slope

    def gradients(gradient):
        net = Unroll(Descending(), K, gradient=gradient)
        y, wanted = inputs(*net.parameters())
        return torch.autograd.grad(net(y).square().sum(), wanted)

    same(gradients, strategy)


def test_a_function_of_ones_own_that_asks_twice(strategy):
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.tanh(x)

        @staticmethod
        def backward(ctx, slope):
            (first,), (second,) = ctx.saved_tensors, ctx.saved_tensors
            assert torch.equal(first, second)
            return slope * (1 - torch.tanh(first) ** 2)

    class Own(Recurrent):
        def forward(self, x, y):
            return Tanh.apply(x @ self.weight) + y

    def gradients(gradient):
        net = Unroll(Own(), K, gradient=gradient)
        y, wanted = inputs(*net.parameters())
        return torch.autograd.grad(net(y).square().sum(), wanted)

    same(gradients, strategy)


@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_autocast_is_that_of_the_forward_pass(strategy, where):
    def gradients(gradient):
        net = Unroll(Recurrent().float(), K, gradient=gradient)
        y = randn(3, 4, seed=1, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "backward"):
            loss = net(y).float().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "forward"):
            return torch.autograd.grad(loss, [y, *net.parameters()])

    same(gradients, strategy)


def test_the_default_device_is_that_of_the_forward_pass(strategy):
    seen = []

    class Looking(Recurrent):
        def forward(self, x, y):
            seen.append(torch.empty(0).device.type)
            return super().forward(x, y)

    net, (y, _) = Unroll(Looking(), K, gradient=strategy), inputs()
    with torch.device("meta"):
        out = net(y)
    out.sum().backward()
    assert len(seen) > K and set(seen) == {"meta"}
    assert torch.empty(0).device.type == "cpu"


def test_random_numbers_are_drawn_again_and_those_after_stay_as_they_were(strategy):
    class Dropping(Recurrent):
        def forward(self, x, y):
            return torch.dropout(torch.tanh(x @ self.weight), 0.5, train=self.training) + y

    def gradients(gradient):
        net = Unroll(Dropping(), K, gradient=gradient)
        y, wanted = inputs(*net.parameters())
        torch.manual_seed(5)
        loss, between = net(y).square().sum(), torch.rand(2)
        return [*torch.autograd.grad(loss, wanted), between, torch.rand(2)]

    same(gradients, strategy)


def test_where_nothing_is_drawn_generators_are_left_alone(strategy, monkeypatch):
    monkeypatch.setattr(recompute, "_set_random_state", lambda devices, states: pytest.fail("touched"))
    net, (y, _) = Unroll(Recurrent(), K, gradient=strategy), inputs()
    net(y).sum().backward()


def test_random_numbers_of_a_gpu(strategy, monkeypatch):
    """Which this machine need not have: one state for each device, found and put back in order."""
    del strategy
    states = {torch.device("cuda", i): torch.tensor([i], dtype=torch.uint8) for i in range(2)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state.clone()}))
    devices = [torch.device("cuda", 1), torch.device("cpu"), torch.device("cuda", 0)]
    before = recompute._random_state(devices)
    for state in states.values():
        state += 10
    with recompute._random_again(devices, before):
        assert [int(state) for state in states.values()] == [0, 1]
    assert [int(state) for state in states.values()] == [10, 11]


# ---- What may be done with the result --------------------------------------------------------------------------------


def test_several_backward_passes(strategy):
    def gradients(gradient):
        net = Unroll(Recurrent(), K, gradient=gradient)
        y, wanted = inputs(*net.parameters())
        loss = net(y).square().sum()
        parts = [g for x in wanted for g in torch.autograd.grad(loss, [x], retain_graph=True)]
        twice = [g for _ in range(2) for g in torch.autograd.grad(loss, wanted, retain_graph=True)]
        return [*parts, *twice, *torch.autograd.grad(loss, wanted)]

    same(gradients, strategy)


def test_second_derivatives(strategy):
    def gradients(gradient):
        net = Unroll(Recurrent(), K, gradient=gradient)
        y, wanted = inputs(*net.parameters())
        first = torch.autograd.grad(net(y).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    same(gradients, strategy)
    net, y = Unroll(Recurrent(), 3, gradient=strategy), randn(1, 4, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(net, (y,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # what forward mode does itself
def test_derivatives_in_forward_mode_and_of_those(strategy):
    def gradients(gradient):
        net, y = Unroll(Recurrent(), K, gradient=gradient), randn(3, 4, seed=1).requires_grad_()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(y, torch.ones_like(y))
            out = net(dual)
            (slope,) = torch.autograd.grad(out.square().sum(), dual)
            unpack = torch.autograd.forward_ad.unpack_dual
            return [*unpack(out), *unpack(slope)]

    same(gradients, strategy)


def test_many_vectors_at_once(strategy):
    def gradients(gradient):
        net = Unroll(Recurrent(), K, gradient=gradient)
        y, wanted = inputs(*net.parameters())
        out = net(y)
        vectors = torch.eye(out.numel(), dtype=F64).reshape(-1, *out.shape)
        return torch.autograd.grad(out, wanted, vectors, is_grads_batched=True)

    same(gradients, strategy)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_of_a_checkpoint(strategy, reentrant):
    def gradients(gradient):
        net = Unroll(Recurrent(), K, gradient=gradient)
        y, wanted = inputs(*net.parameters())
        out = torch.utils.checkpoint.checkpoint(net, y, use_reentrant=reentrant)
        out.square().sum().backward()
        return [x.grad for x in wanted]

    same(gradients, strategy)


# ---- What is kept ----------------------------------------------------------------------------------------------------


class Alive:
    """Counts what autograd keeps: the hooks of `saved_tensors_hooks` around a network."""

    def __init__(self):
        self.now = 0

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor.detach()

    def pack(self, tensor):
        box = self.Box(tensor)
        self.now += 1
        weakref.finalize(box, self._gone)
        return box

    def _gone(self):
        self.now -= 1


def test_states_are_kept_as_autograd_keeps_tensors_and_let_go_of(strategy):
    meter, during = Alive(), []

    class Watching(Recurrent):
        def forward(self, x, y):
            during.append(meter.now)
            return super().forward(x, y)

    net = Unroll(Watching(), K, gradient=strategy)
    y, wanted = inputs(*net.parameters())
    starts = strategy.starts(K)
    with saved_tensors_hooks(meter.pack, lambda box: box.tensor.clone()):
        out = net(y)
    whole = 0 if strategy.every else len(starts) - 1  # windows of which more than the state is kept: the last
    states = len(starts) - bool(whole)
    in_last = meter.now - states
    assert in_last == (3 * (K - starts[-1]) if whole else 0)  # x, W and the tanh of an iteration
    during.clear()
    gc.collect()
    gc.disable()  # by counting references alone, or memory would wait for the collector
    try:
        found = torch.autograd.grad(out.square().sum(), wanted)
        del out
        assert meter.now == 0
    finally:
        gc.enable()
    # The second runs go from the last window to the first, each with the states of those before it.
    ends = [*starts[1:], K] if not whole else starts[1:]
    lengths = [end - start for start, end in zip(starts, ends)]
    assert during == [kept for kept, n in reversed(list(enumerate(lengths, 1))) for _ in range(n)]
    net.gradient = Backprop()
    for ours, theirs in zip(found, torch.autograd.grad(net(y).square().sum(), wanted)):
        assert torch.equal(ours, theirs)


def alive(kind):
    """How many there are, without a run of the collector of garbage."""
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())


def test_tensors_of_the_second_run_go_as_soon_as_they_can(strategy):
    class Positive(Recurrent):
        def forward(self, x, y):
            return torch.tanh(x @ self.weight.exp()) + y

    net = Unroll(Positive(), K, gradient=strategy)
    y, wanted = inputs(*net.parameters())
    gc.collect()
    gc.disable()
    try:
        before = alive(Tensor)
        loss = net(y).square().sum()
        with_loss = alive(Tensor)
        torch.autograd.grad(loss, wanted, retain_graph=True)
        assert alive(Tensor) == with_loss, "used"
        torch.autograd.grad(loss, [y], retain_graph=True)
        assert alive(Tensor) > with_loss, "the exponentials may be asked for, as the graph is kept"
        del loss
        assert alive(Tensor) == before
    finally:
        gc.enable()


def test_nothing_is_filled_in_for_derivatives_that_a_step_took_itself(strategy):
    class Sloping(Recurrent):
        def forward(self, x, y):
            with torch.enable_grad():
                at = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(torch.tanh(at @ self.weight).square().sum(), at)
            return torch.tanh(x @ self.weight) - 0.1 * slope + y

    before = alive(recompute._Handle)
    net, (y, _) = Unroll(Sloping(), K, gradient=strategy), inputs()
    out = net(y)
    again = K if strategy.every else strategy.starts(K)[-1]
    assert out.requires_grad and alive(recompute._Handle) - before == 3 * again  # x, the weight and the tanh alone


@pytest.mark.parametrize("step", [Recurrent, Counting])
def test_a_start_that_is_changed_in_place_is_noticed(strategy, step):
    net, (y, _) = Unroll(step(), K, gradient=strategy), inputs()
    first = net[0].init(randn(3, 4, seed=2))
    loss = net(y, state=first).square().sum()
    (first if isinstance(first, Tensor) else first.x).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_that_computes_something_else_later_is_refused(strategy):
    class Remembering(Recurrent):
        calls = 0

        def forward(self, x, y):
            self.calls += 1
            return super().forward(x, y) if self.calls <= K else x + y

    net, (y, _) = Unroll(Remembering(), K, gradient=strategy), inputs()
    loss = net(y).square().sum()
    with pytest.raises(RuntimeError, match=r"Iterations \d to \d saved \d tensors .* but 0 when .*Backprop\(\)"):
        loss.backward()


# ---- What is left to torch.utils.checkpoint --------------------------------------------------------------------------


class Marked(Tensor):
    """A tensor of a subclass."""


def test_the_unusual_takes_the_long_way(strategy, monkeypatch):
    calls = []
    torchs = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *a, **k: calls.append(a[2]) or torchs(*a, **k))

    def gradients(gradient):
        net = Unroll(Recurrent(), K, gradient=gradient)
        y, wanted = inputs(*net.parameters())
        out = net(y.as_subclass(Marked))
        return [g.as_subclass(Tensor) for g in torch.autograd.grad(out.square().sum(), wanted)]

    same(gradients, strategy)
    windows = strategy.starts(K) if strategy.every else strategy.starts(K)[:-1]
    assert calls == windows
    calls.clear()

    net = Unroll(Recurrent(), K, gradient=strategy)
    y, _ = inputs()
    torch.testing.assert_close(torch.vmap(net)(y), net(y))
    assert calls == windows  # of the former alone
    with torch.no_grad():
        torch.vmap(net)(y)
    assert calls == windows
    net.to("meta")(y.detach().to("meta")).sum().backward()
    assert calls == 2 * windows
