"""Learned halting: the distribution of the count, the loss over all its outcomes, and stopping sample by sample."""

from __future__ import annotations

import copy
import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unrolled import LISTA, Checkpointed, Step, Tolerance, Trace, Unroll, fit
from unrolled.stopping import Count, ExpectedLoss, Halting, Reading, Settling, Stopping, outcomes

F64 = torch.float64
EXACT = {"rtol": 0.0, "atol": 1e-12}
quick = settings(deadline=None, max_examples=20, derandomize=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def traced(net: Unroll, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    with Trace(net) as trace:
        out = net(*inputs)
    return out, trace.num_iters


# ---- The count -------------------------------------------------------------------------------------------------------


def by_definition(logits: Tensor) -> Tensor:
    """q(n) as it is written."""
    p = logits.sigmoid().tolist()
    T = len(p)
    products = [torch.tensor(p[:n], dtype=F64).prod() * (1 - p[n] if n < T else 1) for n in range(T + 1)]
    return torch.stack(products)


@quick
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6))
def test_the_probabilities_are_the_products(logits):
    count = Count(torch.tensor(logits, dtype=F64))
    torch.testing.assert_close(count.probs, by_definition(count.logits), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(count.probs.sum(), torch.ones((), dtype=F64), **EXACT)
    # The tail, by adding up.
    tails = count.probs.flip(0).cumsum(0).flip(0)[1:]
    torch.testing.assert_close(count.log_reached.exp(), tails, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(count.mean, (count.probs * torch.arange(len(logits) + 1)).sum(), rtol=1e-9, atol=1e-12)


def test_enumeration_is_what_flipping_coins_gives():
    """Brute force: go on with probability p_t until a coin says stop, 200,000 times."""
    logits = torch.tensor([1.0, 0.3, -0.7], dtype=F64)
    generator = torch.Generator().manual_seed(0)
    N = 200_000
    goes = torch.rand(N, 3, generator=generator, dtype=F64) < logits.sigmoid()
    stops = goes.long().cumprod(1).sum(1)
    count = Count(logits)
    shares = torch.bincount(stops, minlength=4) / N
    noise = (count.probs * (1 - count.probs) / N).sqrt()
    assert bool(((shares - count.probs).abs() < 4 * noise).all())
    values = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=F64)
    drawn = values[stops]
    assert abs(drawn.mean() - count.expected(values)) < 4 * drawn.std() / N**0.5
    # Its own draws are such counts as well.
    own = Count(logits.expand(N, 3), first=1).sample(generator)
    assert own.min() == 1 and own.max() == 4
    shares = torch.bincount(own - 1, minlength=4) / N
    assert bool(((shares - count.probs).abs() < 4 * noise).all())


@quick
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=5), st.floats(0.02, 0.98))
def test_the_divergence_is_that_of_the_categorical(logits, prior):
    count = Count(torch.tensor(logits, dtype=F64))
    T = len(logits)
    n = torch.arange(T, dtype=F64)
    geometric = torch.distributions.Geometric(probs=torch.tensor(1 - prior, dtype=F64))
    below = geometric.log_prob(n)  # failures before the first success: n times on, then stop
    rest = torch.tensor(prior, dtype=F64).log() * T
    other = torch.distributions.Categorical(logits=torch.cat([below, rest[None]]))
    own = torch.distributions.Categorical(probs=count.probs)
    expected = torch.distributions.kl_divergence(own, other)
    torch.testing.assert_close(count.kl(prior), expected, rtol=1e-6, atol=1e-9)
    same = Count(torch.full((T,), prior, dtype=F64).logit())
    torch.testing.assert_close(count.kl(same), count.kl(prior), rtol=1e-9, atol=1e-12)
    assert same.kl(prior).abs() < 1e-12


def test_a_prior_prices_every_iteration():
    """KL = n log 1/pi - log(1 - pi) - entropy, for a count far from the end of the range."""
    count = Count(torch.tensor([1.0, -0.5, -60.0, 0.0], dtype=F64))
    entropy = -(count.probs * count.log_probs).sum()
    price = -torch.tensor(0.3, dtype=F64).log()
    torch.testing.assert_close(
        count.kl(0.3), price * count.mean - torch.tensor(0.7, dtype=F64).log() - entropy, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [90.0, 1e4, 1e30])
def test_extreme_logits(dtype, size):
    for signs in itertools.product((-1, 1), repeat=4):
        logits = (size * torch.tensor(signs, dtype=dtype)).requires_grad_()
        count = Count(logits)
        values = torch.arange(5.0, dtype=dtype)
        loss = count.expected(values) + count.kl(0.01) / size + count.mean + count.log_reached.exp().sum()
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        # Certain decisions: the outcome is the first no.
        outcome = signs.index(-1) if -1 in signs else 4
        assert count.decision == outcome and count.probs[outcome] == 1
        torch.testing.assert_close(count.expected(values).detach(), values[outcome], rtol=1e-6, atol=1e-30)
        assert count.sample() == outcome


def test_the_count_is_differentiable():
    logits = randn(2, 3, seed=1).requires_grad_()
    values = randn(2, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda l, v: Count(l).expected(v), (logits, values))
    assert torch.autograd.gradcheck(lambda l: Count(l).kl(0.2), (logits,))
    assert torch.autograd.gradcheck(lambda l: (Count(l).log_probs, Count(l).mean), (logits,))
    assert torch.autograd.gradgradcheck(lambda l: Count(l).kl(0.2), (logits,))


def test_no_decision_at_all():
    count = Count(torch.empty(3, 0), first=1)
    assert count.probs.tolist() == [[1.0]] * 3 and count.mean.tolist() == count.decision.tolist() == [1] * 3
    assert count.kl(0.5).tolist() == [0.0] * 3 and repr(count) == "Count(1 .. 1, batch=(3,))"


def test_log_prob_counts_from_first():
    count = Count(randn(5, 3), first=1)
    drawn = count.sample(torch.Generator().manual_seed(0))
    expected = count.log_probs[torch.arange(5), drawn - 1]
    assert torch.equal(count.log_prob(drawn), expected)


# ---- A network that stops --------------------------------------------------------------------------------------------


def coder(num_iters: int = 12, rule: Stopping | None = None, **options) -> LISTA:
    net = LISTA(randn(6, 10, seed=1), num_iters, alpha=0.4, tied=True, stop=rule, **options)
    return net.double()


def signals() -> Tensor:
    return randn(8, 6) * torch.logspace(-1, 2, 8, dtype=F64)[:, None]


class TestUntrainedIsTheTolerance:
    @quick
    @given(rtol=st.floats(1e-4, 0.3), sharpness=st.floats(0.1, 10.0))
    def test_on_any_signal(self, rtol, sharpness):
        ours = coder(40, Halting(Settling(rtol, sharpness=sharpness)))
        theirs = coder(40, Tolerance(rtol))
        found, used = traced(ours, signals())
        expected, count = traced(theirs, signals())
        assert torch.equal(used, count)
        assert torch.equal(found, expected)

    def test_on_zero(self):
        """No change of nothing settles at once, in both."""
        for rule in (Tolerance(1e-2), Halting(Settling(1e-2))):
            out, used = traced(coder(9, rule), torch.zeros(2, 6, dtype=F64))
            assert used.tolist() == [1, 1] and not out.any()

    def test_nan_never_settles(self):
        net = coder(15, Halting(Settling(0.1)))
        net.steps[0].check = lambda y: None
        y = signals()
        y[2] = torch.nan
        out, used = traced(net, y)
        assert used[2] == 15 and used[3] < 15 and out[3].isfinite().all()


class Walk(NamedTuple):
    x: Tensor  # (batch, 2)
    logit: Tensor  # (batch,)


class Walking(Step):
    """x+ = x + w, with the logit 1 - x_0 of going on kept in the state."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3, dtype=F64))

    def init(self, y):
        return Walk(y, 1 - y[..., 0])

    def forward(self, state, y):
        x = state.x + self.w
        return Walk(x, 1 - x[..., 0])

    def readout(self, state):
        return state.x


class ByState(nn.Module):
    def forward(self, step, before, after):
        return after.logit


def test_every_sample_stops_at_its_first_unlikely_step():
    y = torch.tensor([[0.0, 0.0], [0.5, 0.0], [2.0, 0.0], [-9.0, 0.0]], dtype=F64)
    net = Unroll(Walking(), 8, stop=Halting(ByState()))
    out, used = traced(net, y)
    # Goes on while x_0 <= 1: x_0 = y_0 + 0.3 k.
    assert used.tolist() == [4, 2, 1, 8]
    torch.testing.assert_close(out, y + 0.3 * used.double()[:, None], **EXACT)
    # May a sample stop before the first iteration, the third one does, with what it came with.
    net.stop = Halting(ByState(), at_start=True)
    out, used = traced(net, y)
    assert used.tolist() == [4, 2, 0, 8]
    assert torch.equal(out[2], y[2])
    assert torch.equal(outcomes(net, y).count.decision, used)


@pytest.mark.parametrize("at_start", [False, True])
def test_a_call_is_one_of_the_outcomes(at_start):
    torch.manual_seed(0)
    head = Reading(nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)))
    net = coder(7, Halting(head, at_start=at_start))
    out, used = traced(net, signals())
    ends = outcomes(net, signals())
    assert len(ends.readouts) == len(ends.states) == 8 - (not at_start)
    assert torch.equal(ends.count.decision, used) and len(set(used.tolist())) > 1
    for i, n in enumerate(used.tolist()):
        torch.testing.assert_close(ends.readouts[n - ends.count.first][i], out[i], **EXACT)
    # The readouts are those of the network that does not stop.
    net.stop = None
    free = net.iterates(signals())
    for one, other in zip(ends.readouts[-7:], free):
        torch.testing.assert_close(one, other, **EXACT)


def a_network() -> Reading:
    torch.manual_seed(25)  # one whose decisions differ from signal to signal
    return Reading(nn.Sequential(nn.Linear(10, 8, dtype=F64), nn.Tanh(), nn.Linear(8, 1, dtype=F64)))


@pytest.mark.parametrize("head", [lambda: Settling(0.1), a_network], ids=["settling", "reading"])
def test_an_answer_does_not_depend_on_the_batch(head):
    y = signals()
    net = coder(rule=Halting(head()))
    out, used = traced(net, y)
    assert len(set(used.tolist())) > 2, "the samples must differ for the test to say something"
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(y[order]), out[order], **EXACT)
    torch.testing.assert_close(net(y.reshape(2, 4, 6)), out.reshape(2, 4, 10), **EXACT)
    probs = outcomes(net, y).count.probs
    for i in range(8):
        torch.testing.assert_close(net(y[i]), out[i], **EXACT)
        torch.testing.assert_close(outcomes(net, y[i]).count.probs, probs[i], **EXACT)


def compiled(net, y):
    torch._dynamo.reset()
    return torch.compile(net, fullgraph=True, backend="aot_eager")(y)


# Exported forms are in the contract suite.
FORMS = {"compiled": compiled, "vmap": lambda net, y: torch.vmap(net)(y)}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_eager_answer(form):
    net = coder(6, Halting(Settling(0.1)))
    out, used = traced(net, signals())
    assert used.max() > 1 and used.min() < used.max()
    torch.testing.assert_close(form(net, signals()), out, **EXACT)


def test_eager_mode_leaves_early():
    net = coder(500, Halting(Settling(0.3)))
    calls = []
    net.steps[0].register_forward_hook(lambda *_: calls.append(1))
    _, used = traced(net, signals())
    assert len(calls) == used.max() < 100


# ---- Learning --------------------------------------------------------------------------------------------------------


def square(found, batch):
    return (found - batch[1]).square().sum(-1)


def test_the_expected_loss_is_the_sum_over_outcomes():
    torch.manual_seed(0)
    y, x = randn(8, 6), randn(8, 10, seed=5)  # of moderate size, so that no probability is 0 in the plain form
    net = coder(4, Halting(Reading(nn.Linear(10, 1, dtype=F64)), prior=0.3))
    free = coder(4)
    iterates = free.iterates(y)
    total = torch.zeros((), dtype=F64)
    for i in range(8):
        probs = by_definition(torch.stack([net.stop.head.module(x_k[i]) for x_k in iterates[:3]]).flatten())
        prior = torch.tensor([0.7, 0.3 * 0.7, 0.09 * 0.7, 0.027], dtype=F64)
        total += sum(q * square(x_k[i], (y[i], x[i])) for q, x_k in zip(probs, iterates))
        total += 0.5 * (probs * (probs / prior).log()).sum()
    torch.testing.assert_close(ExpectedLoss(square, weight=0.5)(net, (y, x)), total / 8, rtol=1e-10, atol=0)


def test_gradcheck_of_the_whole():
    """Through the decisions, the iterates, and the iterates into the decisions."""
    y, x = signals()[:2], randn(2, 10, seed=5)
    torch.manual_seed(0)
    net = coder(3, Halting(Reading(nn.Sequential(nn.Linear(10, 1, dtype=F64))), prior=0.3))
    loss = ExpectedLoss(square, weight=0.5)
    names, values = zip(*net.named_parameters())
    assert any(name.startswith("stop.") for name in names)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            return loss(self.net, (y, x))

    whole = Whole()

    def call(*tensors):
        return torch.func.functional_call(whole, {f"net.{n}": t for n, t in zip(names, tensors)}, ())

    assert torch.autograd.gradcheck(call, tuple(v.detach().requires_grad_() for v in values))


def test_gradcheck_of_the_settling_head():
    net = coder(4, Halting(Settling(0.1)))
    loss = ExpectedLoss(square, weight=0.5)
    batch = (signals(), randn(8, 10, seed=5))
    head = net.stop.head
    parameters = [head.log_rtol, head.log_sharpness, head.relative]
    found = torch.autograd.grad(loss(net, batch), parameters)
    for parameter, gradient in zip(parameters, found):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6
                sides.append(loss(net, batch))
                parameter -= sign * 1e-6
        torch.testing.assert_close(gradient, (sides[0] - sides[1]) / 2e-6, rtol=1e-6, atol=1e-7)
        assert gradient != 0


def test_a_price_makes_it_shorter_and_fit_trains_it():
    y, x = randn(8, 6), randn(8, 10, seed=5)
    used = []
    for weight in (0.0, 30.0):
        net = coder(9, Halting(Settling(0.1)))
        fit(net, [(y, x)], ExpectedLoss(square, weight=weight), num_steps=30, seed=0)
        used.append(traced(net, y)[1].double().mean())
    assert used[1] < used[0]


def test_untied_layers_slices_and_copies():
    net = LISTA(randn(6, 10, seed=1), 6, alpha=0.4, stop=Halting(Settling(0.05))).double()
    y = signals()
    out, used = traced(net, y)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(y), out)
    twin.load_state_dict(net.state_dict())
    assert {"stop.head.log_rtol", "stop.head.log_sharpness", "stop.head.relative"} <= set(net.state_dict())
    short = net[:3]
    torch.testing.assert_close(short(y), net(y, num_iters=3), **EXACT)
    assert len(outcomes(short, y).readouts) == len(outcomes(net, y, num_iters=3).readouts) == 3
    assert net.stop is not None and used.max() > 3
    # Going on from a state.
    ends = outcomes(net[2:], y, state=net[:2].run(y))
    assert len(ends.readouts) == 4


def test_a_single_sample_and_a_single_iteration():
    net = coder(5, Halting())
    ends = outcomes(net, signals()[0])
    assert ends.count.probs.shape == (5,) and ends.expected(lambda x: x.sum()).shape == ()
    one = outcomes(net, signals(), num_iters=1)
    assert one.count.probs.shape == (8, 1) and len(one.readouts) == 1
    torch.testing.assert_close(one.expected(lambda x: x.sum(-1)), one.readouts[0].sum(-1), **EXACT)


def test_the_outcomes_leave_the_network_as_it_is():
    net = coder(5, Halting(), gradient=Checkpointed(2))
    rule = net.stop
    outcomes(net, signals())
    assert net.stop is rule and len(net) == 5
    weights = torch.autograd.grad(net(signals()).sum(), net.steps[0].weight)[0]
    assert weights.isfinite().all()


# ---- At the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Halting(prior=0.0), ValueError, "prior must be greater than 0"),
        (lambda: Halting(prior=1.0), ValueError, "prior must be less than 1"),
        (lambda: Halting(prior="half"), TypeError, "prior must be a real number"),
        (lambda: Halting(lambda x: x), TypeError, r"head must be a torch.nn.Module .* Reading\(network\)"),
        (lambda: Settling(0.0), ValueError, "rtol must be greater than 0"),
        (lambda: Settling(sharpness=-1.0), ValueError, "sharpness must be greater than 0"),
        (lambda: Reading(nn.Linear), TypeError, "module must be a torch.nn.Module object"),
        (lambda: Count(torch.ones(3, dtype=torch.long)), TypeError, "logits must be a floating point"),
        (lambda: Count([0.0]), TypeError, "logits must be a floating point .* got list"),
        (lambda: Count(torch.ones(())), ValueError, r"logits must have shape \(..., T\)"),
        (lambda: Count(torch.ones(2), first=-1), ValueError, "first must be at least 0"),
        (lambda: Count(torch.ones(2)).expected(torch.ones(2)), ValueError, r"values must have shape \(..., 3\)"),
        (lambda: Count(torch.ones(2)).kl(2.0), ValueError, "prior must be less than 1"),
        (lambda: ExpectedLoss("mse", weight=1.0), TypeError, "each must be a function"),
        (lambda: ExpectedLoss(square, weight=-1.0), ValueError, "weight must be at least 0"),
        (lambda: ExpectedLoss(square, weight=1.0, num_inputs=0), ValueError, "num_inputs must be at least 1"),
        (lambda: outcomes(coder(3, Tolerance()), signals()), TypeError, "net must be an Unroll with stop=Halting"),
        (lambda: outcomes(nn.Linear(2, 2), signals()), TypeError, "net must be an Unroll with stop=Halting"),
        (
            lambda: coder(3, Halting(Reading(nn.Linear(10, 2, dtype=F64))))(signals()),
            ValueError,
            r"head must return one logit a sample, \(8,\) or \(8, 1\), got shape \(8, 2\)",
        ),
        (
            lambda: outcomes(coder(3, Halting()), signals()).expected(lambda x: x.sum()),
            ValueError,
            r"each must return one number a sample, \(8,\), got shape \(\)",
        ),
        (lambda: Unroll(Walking(), 3, stop=Halting), TypeError, "stop must be None or a rule"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_repr():
    rule = Halting(Settling(0.05), prior=0.2, at_start=True)
    assert "prior=0.2, at_start=True" in repr(rule) and "rtol=0.05, sharpness=1 to start with" in repr(rule)
