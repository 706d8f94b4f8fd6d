"""`Tolerance`: every sample stops by itself, at the iteration that the rule says, in every form of the network."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unrolled import LISTA, Checkpointed, Momentum, Step, Tolerance, Trace, Unroll

F64 = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # the same float64 operations in batches of another size
quick = settings(max_examples=20, deadline=None)


class Halving(Step):
    """x+ = x / 2 + y: converges to 2 y, and halves its change every time; counts in a state that the batch shares."""

    def __init__(self, event_dim=1):
        super().__init__()
        self.event_dim = event_dim
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.calls = 0

    def init(self, y):
        return CountedState(torch.zeros_like(y), y.real.new_zeros(()))

    def forward(self, state, y):
        self.calls += 1
        return CountedState(self.rate * state.x + y, state.count + 1)

    def readout(self, state):
        return state.x


class CountedState(NamedTuple):
    x: Tensor
    count: Tensor  # ()


class Scaling(Step):
    """x+ = factor * x, from y."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def init(self, y):
        return y

    def forward(self, x, y):
        return self.factor * x


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def traced(net: Unroll, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    with Trace(net) as trace:
        out = net(*inputs)
    return out, trace.num_iters


def by_hand(net: Unroll, y: Tensor, rtol: float, atol: float) -> tuple[Tensor, int]:
    """The rule for one sample, over the iterates of the network without it."""
    stop, net.stop = net.stop, None
    iterates = [torch.zeros(()), *net.iterates(y)]
    net.stop = stop
    for count, (before, after) in enumerate(itertools.pairwise(iterates), start=1):
        if (after - before).norm() <= atol + rtol * after.norm() or count == net.num_iters:
            return after, count
    raise AssertionError("unreachable")


# ---- The rule --------------------------------------------------------------------------------------------------------


@quick
@given(
    rtol=st.floats(1e-5, 0.5) | st.just(0.0),
    atol=st.floats(1e-4, 1.0),
    spread=st.floats(0.0, 3.0),
    momentum=st.booleans(),
)
def test_every_sample_stops_where_the_rule_says(rtol, atol, spread, momentum):
    y = randn(4, 6) * 10 ** torch.linspace(0, spread, 4, dtype=F64)[:, None]
    net = LISTA(randn(6, 10, seed=1), 25, alpha=0.5, tied=True, momentum=momentum, stop=Tolerance(rtol, atol))
    out, num_iters = traced(net, y)
    for i in range(len(y)):
        expected, count = by_hand(net, y[i], rtol, atol)
        torch.testing.assert_close(out[i], expected, **EXACT)
        assert num_iters[i] == count


@pytest.mark.parametrize("num_iters", [1, 30])
@pytest.mark.parametrize("event_dim", [0, 1, 3])
def test_the_norm_is_taken_over_one_sample(event_dim, num_iters):
    """Entry by entry, vector by vector, image by image: what belongs together stops together."""
    y = 1.0 + randn(2, 3, 2, 4).abs()
    net = Unroll(Halving(event_dim), num_iters, stop=Tolerance(rtol=0.0, atol=0.1))
    out, used = traced(net, y)
    assert used.shape == y.shape[: 4 - event_dim]
    # The k-th change is y / 2^(k-1).
    size = y.flatten(4 - event_dim).norm(dim=-1) if event_dim else y
    assert torch.equal(used, (1 + (size / 0.1).log2().ceil().long()).clamp(max=num_iters))
    # x_k = 2 (1 - 2^-k) y
    steps = used.reshape(used.shape + (1,) * event_dim)
    torch.testing.assert_close(out, 2 * (1 - 0.5**steps) * y)


def test_a_single_sample_without_batch_dimensions():
    y = randn(5)
    net = Unroll(Halving(), 40, stop=Tolerance(1e-3))
    out, used = traced(net, y)
    batched, each = traced(net, y[None])
    assert torch.equal(out, batched[0]) and used.shape == () and used == each[0]


def test_complex_readouts_are_measured_by_their_modulus():
    y = torch.full((1, 2), 3j, dtype=torch.complex128)
    net = Unroll(Halving(), 40, stop=Tolerance(rtol=0.0, atol=0.1))
    for same_size in (y, 1j * y, y.imag):
        _, used = traced(net, same_size)
        assert used.item() == 7  # 3 sqrt(2) / 2^(k-1) <= 0.1


def test_a_converged_start_stops_after_one_iteration():
    y = randn(3, 2)
    net = Unroll(Halving(), 50, stop=Tolerance(1e-6))
    _, used = traced(net, y)
    assert used.min() > 15 and used.max() < 50
    net[0].calls = 0
    net(y, state=net.run(y))
    assert net[0].calls == 1 + used.max()


def test_momentum_stops_by_the_samples_of_the_step_inside():
    class Images(Scaling):
        event_dim = 3

    _, used = traced(Unroll(Momentum(Images(0.5)), 9, stop=Tolerance(10.0)), torch.ones(2, 3, 4, 4))
    assert used.tolist() == [1, 1]


def test_nan_never_settles():
    y = torch.ones(3, 2, dtype=F64)
    y[1, 0] = torch.nan
    out, used = traced(Unroll(Halving(), 60, stop=Tolerance(1e-3)), y)
    assert used.tolist() == [used[0], 60, used[2]] and used[0] < 60
    assert out[1, 0].isnan() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_diverging_sample_never_settles(dtype):
    """Its norm overflows, or its iterate does: infinity is no answer, though inf <= inf."""
    y = torch.ones(1, 2, dtype=dtype)
    num_iters = 1200  # 3^1200 is infinite in float64
    _, used = traced(Unroll(Scaling(3.0), num_iters, stop=Tolerance(1e-3)), y)
    assert used.item() == num_iters


def test_the_last_step_of_a_settling_sample_is_taken():
    """||x1 - x0|| <= tolerance says that x1 is the answer, not x0."""
    y = torch.ones(1, 1, dtype=F64)
    assert Unroll(Scaling(0.5), 9, stop=Tolerance(rtol=10.0))(y).item() == 0.5


# ---- Batches and forms -----------------------------------------------------------------------------------------------


def coder(num_iters=40, tolerance=1e-2, **options):
    return LISTA(randn(6, 10, seed=1), num_iters, alpha=0.4, momentum=True, stop=Tolerance(tolerance), **options)


@pytest.mark.parametrize("tied", [True, False])
def test_an_answer_does_not_depend_on_the_batch(tied):
    y = randn(8, 6) * torch.logspace(-1, 2, 8, dtype=F64)[:, None]
    net = coder(tied=tied)
    out, used = traced(net, y)
    assert len(set(used.tolist())) > 2, "the samples must differ for the test to say something"
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(y[order]), out[order], **EXACT)
    torch.testing.assert_close(net(y.reshape(2, 4, 6)), out.reshape(2, 4, 10), **EXACT)
    for i in range(8):
        torch.testing.assert_close(net(y[i]), out[i], **EXACT)
    # A NaN beside them (past the check at the door) does not touch the others either.
    poisoned = y.clone()
    poisoned[3] = torch.nan
    net.steps[0].check = lambda y: None
    others = torch.arange(8) != 3
    torch.testing.assert_close(net(poisoned)[others], out[others], **EXACT)


def compiled(net, y):
    torch._dynamo.reset()
    return torch.compile(net, fullgraph=True, backend="aot_eager")(y)


def exported(net, y):
    return torch.export.export(net, (y[:5],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()(y)


FORMS = {"compiled": compiled, "exported": exported, "vmap": lambda net, y: torch.vmap(net)(y)}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_eager_answer(form):
    y = randn(8, 6) * torch.logspace(-1, 2, 8, dtype=F64)[:, None]
    net = coder(14, tolerance=0.15, tied=True)
    out, used = traced(net, y)
    assert 1 < used.min() < used.max() < 14, "eager mode must have left early for the test to say something"
    torch.testing.assert_close(form(net, y), out, **EXACT)


def test_eager_mode_leaves_early():
    y = randn(4, 3)
    net = Unroll(Halving(), 1000, stop=Tolerance(1e-3))
    _, used = traced(net, y)
    assert net[0].calls == used.max() < 20
    assert len(net.iterates(y)) == 1000


def test_a_shared_leaf_of_the_state_goes_on_with_the_batch():
    y = torch.tensor([[1.0], [1000.0]], dtype=F64)
    net = Unroll(Halving(), 100, stop=Tolerance(rtol=0.0, atol=0.1))
    state = net.run(y)
    _, used = traced(net, y)
    assert state.count.shape == () and state.count == used.max() > used.min()


def test_iterates_freeze_with_the_sample():
    y = torch.tensor([[1.0], [1000.0]], dtype=F64)
    net = Unroll(Halving(), 30, stop=Tolerance(rtol=0.0, atol=0.1))
    out, used = traced(net, y)
    iterates = torch.stack(net.iterates(y))
    net.stop = None
    free = torch.stack(net.iterates(y))
    for i, count in enumerate(used.tolist()):
        assert torch.equal(iterates[:count, i], free[:count, i])
        assert bool((iterates[count:, i] == out[i]).all())
    assert used[0] < used[1] < 30


def test_checkpointed_stops_alike_and_gradients_end_where_a_sample_did():
    y = torch.tensor([[1.0], [1000.0]], dtype=F64)

    def slope(gradient, rows):
        net = Unroll(Halving(), 30, stop=Tolerance(rtol=0.0, atol=0.1), **gradient)
        return torch.autograd.grad(net(y[rows]).sum(), net[0].rate)[0]

    both, first, second = slice(0, 2), slice(0, 1), slice(1, 2)
    for gradient in ({}, {"gradient": Checkpointed(4)}):
        torch.testing.assert_close(slope(gradient, both), slope({}, first) + slope({}, second), rtol=1e-12, atol=0)


# ---- At the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rtol": 0.0}, ValueError, "rtol and atol are both 0"),
        ({"rtol": -1e-3}, ValueError, "rtol must be at least 0"),
        ({"atol": -1.0}, ValueError, "atol must be at least 0"),
        ({"rtol": float("nan")}, ValueError, "rtol must be finite"),
        ({"atol": float("inf")}, ValueError, "atol must be finite"),
        ({"rtol": "1e-3"}, TypeError, "rtol must be a real number"),
        ({"atol": None}, TypeError, "atol must be a real number"),
    ],
)
def test_what_tolerance_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Tolerance(**arguments)


@pytest.mark.parametrize("shape", [(5,), (5, 7)])
def test_fewer_dimensions_than_one_sample_has(shape):
    net = Unroll(Halving(event_dim=3), 5, stop=Tolerance())
    with pytest.raises(ValueError, match="event_dim"):
        net(torch.ones(shape, dtype=F64))


@pytest.mark.parametrize("event_dim", [-1, 1.0, None])
def test_an_event_dim_that_is_no_count(event_dim):
    net = Unroll(Halving(event_dim), 5, stop=Tolerance())
    with pytest.raises((TypeError, ValueError), match="event_dim"):
        net(torch.ones(2, 3, dtype=F64))


def test_a_state_without_the_batch_dimensions_cannot_stop():
    class Summing(Halving):
        def init(self, y):
            return CountedState(torch.zeros_like(y), y.new_zeros(3))  # a leaf with a dimension of its own

    with pytest.raises(ValueError, match=r"Summing cannot stop sample by sample: .*\(2,\) \(event_dim=1\), .*count="):
        Unroll(Summing(), 5, stop=Tolerance())(torch.ones(2, 3, dtype=F64))


def test_repr():
    assert repr(Tolerance(rtol=1e-4, atol=0.5)) == "Tolerance(rtol=0.0001, atol=0.5)"
